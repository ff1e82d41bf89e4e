"""One launch in one run folder: opening it, freezing or reading its config, and leaving it in a known state."""

import logging
import shutil
import signal
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from grpo.compose import apply_overrides
from grpo.config import Config, ConfigError, flatten, typed
from grpo.run.before_start import check_folder
from grpo.run.console import resume_command
from grpo.run.folder import OUTPUTS, RunFolder
from grpo.targets import check_trusted

logger = logging.getLogger(__name__)

# What may change when a run goes on: how it is watched and kept, and how the work is cut.
CHANGEABLE = ("tracking.", "checkpoint.", "samples.", "eval.every", "eval.after")
CUT = tuple(f"hardware.{key}" for key in ("micro_batch_size", "rollout_rows", "threads", "device", "autocast"))
CUT += ("model.device_map",)
MORE_STEPS = {"grpo.num_steps", "grpo.num_iterations"}


class StopSignals:
    """SIGINT and SIGTERM end the run at once, but within `deferred` only when its block is complete."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._deferring = False

    @property
    def exit_code(self) -> int:
        return 128 + (self.received or 0)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Handle the signals within the block, and restore the former handlers after it."""
        former = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Let the block finish; the caller looks at `received` after it. A second signal does not wait."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False

    def _handle(self, number: int, _: FrameType | None) -> None:
        wait = self._deferring and self.received is None
        self.received = number
        if not wait:
            raise SystemExit(self.exit_code)


@dataclass
class Run:
    """A run folder in use by this process."""

    folder: RunFolder
    config: Config
    resumed: bool
    done: bool  # finished before, and no further steps are asked for
    stop: StopSignals

    def objective(self) -> float | None:
        """What a sweep maximises: held-out accuracy after training, or else the mean reward of the last step."""
        after, rows = self.folder.evaluation("after"), self.folder.metrics()
        if after is not None and rows and after["step"] == rows[-1]["step"]:
            return after["accuracy"]
        return rows[-1]["reward"] if rows else None


@contextmanager
def open_run(cfg: DictConfig) -> Iterator[Run]:
    """Hold the launch's run folder: config.yaml written or read back, status.json true also after a failure."""
    folder = RunFolder(short_path(Path(HydraConfig.get().runtime.output_dir)))
    resume = cfg.resume
    if resume and HydraConfig.get().mode == RunMode.MULTIRUN:
        resume = "auto"  # of a sweep's jobs, some may have finished and some never begun
    overrides = list(HydraConfig.get().overrides.task)
    check_folder(folder, resume, overrides)
    with folder.locked():
        resumed, changes = folder.started(), {}
        if resumed:
            config, changes = resumed_config(folder, cfg, overrides)
            folder.record_changes(changes)
        else:
            try:
                config = fresh_config(cfg)
            except ConfigError:
                _discard(folder)
                raise
            folder.write_config(config)
        done = folder.finished() and not changes.keys() & MORE_STEPS
        run = Run(folder, config, resumed, done, StopSignals())
        if not done:
            folder.update_status(state="running", error=None)
        with run.stop.installed():
            try:
                yield run
            except BaseException as error:
                _record_end(run, error)
                raise


def fresh_config(cfg: DictConfig) -> Config:
    """The config of a new run, with the hardware resolved and everything checked again."""
    from grpo.engine.hardware import resolve_hardware  # imports torch

    resolve_hardware(cfg)
    if HydraConfig.get().mode == RunMode.MULTIRUN and cfg.tracking.group is None:
        cfg.tracking.group = Path(HydraConfig.get().sweep.dir).name  # the arms of a sweep are one group in W&B
    return typed(cfg)


def resumed_config(folder: RunFolder, cfg: DictConfig, overrides: list[str]) -> tuple[Config, dict[str, Any]]:
    """The frozen config of a run that goes on, and by dotted key what this command line changes in it.

    Raises ConfigError with the old and the new value where a change would make another experiment of it, and where
    the folder asks to run a function that nothing here names.
    """
    frozen = folder.frozen_config()
    # The first command line may be given again as it was; only what was changed since is compared by its value.
    again = {override for override in folder.first_overrides() if not _is_changed(override, folder.changes())}
    changed = apply_overrides(frozen, cfg, [override for override in overrides if override not in again])
    before, after = flatten(frozen), flatten(changed)
    differing = [key for key in before | after if before.get(key) != after.get(key)]
    refused = [key for key in differing if not key.startswith(CHANGEABLE + CUT) and not _is_longer(key, before, after)]
    if refused:
        changes = ", ".join(f"{key}: {before.get(key)} -> {after.get(key)}" for key in refused)
        raise ConfigError(
            f"resume=true: {folder.path} was started with other values ({changes}); start a new run for them"
        )
    if any(key.startswith(CUT) for key in differing):
        logger.warning("the work is cut in another way from here on: equal up to rounding, no longer bit for bit")
    check_trusted(changed, cfg, folder.path)
    return typed(changed), {key: after.get(key) for key in differing}


def _is_changed(override: str, changes: dict[str, Any]) -> bool:
    key = override.partition("=")[0].replace("/", ".")
    return any(changed == key or changed.startswith(f"{key}.") for changed in changes)


def _is_longer(key: str, before: dict[str, Any], after: dict[str, Any]) -> bool:
    """Whether a changed key only adds steps to the end, so that those already made would have been the same."""
    if key not in MORE_STEPS or after[key] < before[key] or before["grpo.lr_schedule"] != "constant":
        return False
    return key == "grpo.num_iterations" or before["grpo.num_iterations"] == 1


def short_path(path: Path) -> Path:
    """The path as a person would type it: relative where it lies below the working directory."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _record_end(run: Run, error: BaseException) -> None:
    if isinstance(error, SystemExit):
        if not run.folder.finished():  # else it came while the charts were drawn
            run.folder.update_status(state="interrupted", error=None)
            print(f"interrupted; go on with: {resume_command(run.folder.path)}", flush=True)
        return
    if isinstance(error, ConfigError) and not run.resumed:
        _discard(run.folder)
        return
    run.folder.update_status(state="failed", error=f"{type(error).__name__}: {error}")
    logger.info("the run failed", exc_info=error)  # into launch.log; the console gets the one line below
    logger.error("%s failed: %s: %s", run.folder.path, type(error).__name__, error)
    error.logged = True
    # Hydra keeps a failed job's exception for the rest of a sweep, and with its frames the model.
    traceback.clear_frames(error.__traceback__)


def _discard(folder: RunFolder) -> None:
    """Remove what a launch made that could not even start, so that no empty run stands in the way."""
    for name in ("config.yaml", "status.json", ".lock", "launch.log"):
        (folder.path / name).unlink(missing_ok=True)
    shutil.rmtree(folder.path / ".hydra", ignore_errors=True)
    for path in (folder.path, folder.path.parent):
        if not any(path.iterdir()) and (path == folder.path or path.is_relative_to(OUTPUTS)) and path != OUTPUTS:
            path.rmdir()
