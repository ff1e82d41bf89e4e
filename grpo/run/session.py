"""One launch in one run folder: opening it, freezing or reading its config, and leaving it in a known state."""

import logging
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from grpo.compose import apply_overrides, named_keys
from grpo.config import Config, ConfigError, check_training, flatten, to_dict, typed
from grpo.run.before_start import check_folder, check_parent, has_finished
from grpo.run.console import resume_command
from grpo.run.folder import CHANGEABLE, CUT, OUTPUTS, RunFolder
from grpo.run.gpus import claim_gpu, show_all_gpus, takes_any_gpu
from grpo.run.lock import locked
from grpo.run.sweep import SweepFolder, of_keys
from grpo.targets import check_trusted, foreign_targets

logger = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
PRESET_SIZES = ("batch_size", "num_generations", "max_completion_length")
MORE_STEPS = {"grpo.num_steps", "grpo.num_iterations"}


class Exit(SystemExit):
    """An exit that the suite decided, as after a stop signal; any other SystemExit comes from code that it runs."""


@contextmanager
def exits_are_failures(*allowed: type[BaseException]) -> Iterator[None]:
    """Turn SystemExit, KeyboardInterrupt and the like, but for those `allowed`, into a RuntimeError.

    A reward that calls `sys.exit(0)` would otherwise end a run as if it had succeeded.
    """
    try:
        yield
    except (Exception, *allowed):
        raise
    except BaseException as error:
        raise RuntimeError(
            f"{error!r} was raised by code of the run, although no signal asked it to stop; use an Exception there"
        ) from error


@contextmanager
def disk_errors_are_warnings(what: str) -> Iterator[None]:
    """For what a run can do without: a full disk must neither end a run here nor hide what ended it."""
    try:
        yield
    except OSError as error:
        logger.warning("%s could not be written: %s", what, error)


class StopSignals:
    """SIGINT, SIGTERM and SIGUSR1 (what SLURM can send ahead) end the run at once, but within `deferred` with care."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._can_be_dropped: Callable[[], bool] | None = None  # set within `deferred`
        self._again = False

    @property
    def exit_code(self) -> int:
        return 128 + (self.received or 0)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Handle the signals within the block, and restore the former handlers after it."""
        former = {number: signal.signal(number, self._handle) for number in STOP_SIGNALS}
        try:
            yield
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)

    @contextmanager
    def deferred(self, can_be_dropped: Callable[[], bool], save: Callable[[], None]) -> Iterator[None]:
        """Within the block a signal waits for `leave_if_asked`, unless what goes on can be dropped; then `save`.

        A second signal neither waits nor saves.
        """
        self._can_be_dropped = can_be_dropped
        try:
            yield
        except Exit:  # of another exit nobody knows whether the policy is whole
            self._can_be_dropped = None
            if not self._again:
                with disk_errors_are_warnings("a checkpoint of the last step"):
                    save()
            raise
        finally:
            self._can_be_dropped = None

    def ignored_from_here(self) -> None:
        """All is done and saved: a signal that comes now changes nothing."""
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def leave_if_asked(self) -> None:
        """Raise Exit if a signal waits."""
        if self.received is not None:
            raise Exit(self.exit_code)

    def _handle(self, number: int, _: FrameType | None) -> None:
        self._again = self.received is not None
        self.received = number
        if self._again or self._can_be_dropped is None or self._can_be_dropped():
            raise Exit(self.exit_code)


@dataclass
class Run:
    """A run folder in use by this process."""

    folder: RunFolder
    config: Config
    resumed: bool  # goes on from what the folder holds
    forked: bool  # which it took over from another run just now
    done: bool  # finished before, and no further steps are asked for
    stop: StopSignals
    overrides: list[str]  # of this launch's command line
    changes: dict[str, Any]  # what it changes in a run that it goes on with
    until_step: int | None  # where this launch stops, if before the end
    started: float  # by time.monotonic
    seconds_before: float  # of all launches so far

    @property
    def seconds(self) -> float:
        """How long all launches took together, for who pays by the hour."""
        return round(self.seconds_before + time.monotonic() - self.started, 3)

    def end_process(self, error: str) -> None:
        """Record a failure and end this process, from any thread and whatever the others do."""
        _set_state(self.folder, "failed", error)
        print(f"failed: {error}", file=sys.stderr, flush=True)
        os._exit(1)


@contextmanager
def open_run(cfg: DictConfig) -> Iterator[Run]:
    """Hold the launch's run folder: config.yaml written or read back, status.json true also after a failure."""
    folder = RunFolder(short_path(Path(HydraConfig.get().runtime.output_dir)))
    sweep, stop = HydraConfig.get().mode == RunMode.MULTIRUN, StopSignals()
    # Of a sweep's jobs, some may have finished and some never begun; SLURM may start one again by itself.
    again = cfg.resume or int(os.environ.get("SLURM_RESTART_COUNT", "0")) > 0
    resume = "auto" if again and sweep else cfg.resume
    try:
        check_folder(folder, resume, HydraConfig.get().overrides.task)
        with stop.installed(), locked(folder.path):
            run = _open(folder, cfg, resume, stop)
            try:
                with exits_are_failures(Exit):
                    yield run
            except BaseException as error:
                _record_end(run, error)
                raise
            finally:
                if folder.started() and not run.done:
                    with disk_errors_are_warnings(f"{folder.path}/status.json"):
                        folder.update_status(seconds=run.seconds)
    except ConfigError as error:
        if sweep:  # said at once, and not only after all other jobs
            logger.error("%s: %s", folder.path, error)
            if not folder.started():
                overrides = list(HydraConfig.get().overrides.task)  # the record of them is gone
                with disk_errors_are_warnings(f"{folder.path}/status.json"):
                    folder.path.mkdir(parents=True, exist_ok=True)
                    folder.update_status(state="failed", error=str(error), overrides=overrides)
        raise
    finally:
        if sweep:
            with disk_errors_are_warnings(f"{HydraConfig.get().sweep.dir}/sweep.json"):
                SweepFolder(HydraConfig.get().sweep.dir).update()


def _open(folder: RunFolder, cfg: DictConfig, resume: bool | str, stop: StopSignals) -> Run:
    import torch  # here, since it takes seconds

    from grpo.engine.hardware import hardware_found

    overrides = list(HydraConfig.get().overrides.task)
    launcher = HydraConfig.get().runtime.choices["hydra/launcher"]
    if HydraConfig.get().mode == RunMode.MULTIRUN and takes_any_gpu(cfg, launcher):
        show_all_gpus(launcher)
        claim_gpu(torch.cuda.device_count())
    started = time.monotonic()
    cfg = hardware_found(cfg, overrides)
    changes: dict[str, Any] = {}
    resumed = folder.started()
    if resumed:
        config, changes = resumed_config(folder, cfg, overrides)
    else:
        try:
            config = fresh_config(folder, cfg, overrides)
        except (ConfigError, SystemExit):
            _discard(folder, cfg.fork)
            raise
    done = folder.finished() and not changes.keys() & MORE_STEPS
    if done and resume is True:
        raise ConfigError(has_finished(folder))
    if done:
        print(f"{folder.path} has finished already: nothing to do")
    else:
        folder.update_status(state="running", error=None)
    before = folder.status().get("seconds", 0.0)
    return Run(
        folder,
        config,
        resumed=resumed or cfg.fork,
        forked=cfg.fork,
        done=done,
        stop=stop,
        overrides=overrides,
        changes=changes,
        until_step=cfg.until_step,
        started=started,
        seconds_before=before,
    )


def fresh_config(folder: RunFolder, cfg: DictConfig, overrides: list[str]) -> Config:
    """Freeze the config of a new run, with the hardware resolved and everything checked again."""
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        sweep = SweepFolder(HydraConfig.get().sweep.dir)
        own = of_keys(overrides, sweep.swept)
        cfg.tracking.tags = list(dict.fromkeys([*cfg.tracking.tags, *(tag[:64] for tag in own)]))  # W&B's longest
        if cfg.tracking.group is None:
            cfg.tracking.group = sweep.record()["name"]  # the arms of a sweep are one group in W&B
        if cfg.tracking.name is None:
            cfg.tracking.name = " ".join(own) or None
    if cfg.fork:
        check_parent(cfg.run_dir, False)  # a job of a sweep that goes on may not have begun
        from grpo.run.fork import fork  # imports torch

        return fork(folder, cfg, overrides)
    from grpo.engine.hardware import resolve_hardware  # imports torch

    resolve_hardware(cfg)
    config = typed(cfg)
    check_training(config)
    config.until_step = None  # this launch's alone
    folder.write_config(config)
    return config


def resumed_config(folder: RunFolder, cfg: DictConfig, overrides: list[str]) -> tuple[Config, dict[str, Any]]:
    """The frozen config of a run that goes on, and by dotted key what this command line changes in it.

    Raises ConfigError with the old and the new value where a change would make another experiment of it, and where
    the folder asks to run a function that nothing here names.
    """
    from grpo.engine.hardware import resolve_hardware  # imports torch

    frozen = folder.frozen_config()
    # The first command line may be given again as it was; only what was changed since is compared by its value.
    first = {override.partition("=")[0]: override for override in folder.first_overrides()}  # the last of a key counts
    again = {override for override in first.values() if not _is_changed(override, folder.changes())}
    new = [override for override in overrides if override not in again]
    changed = apply_overrides(frozen, cfg, new)
    check_trusted(changed, cfg, folder.path)
    resolve_hardware(changed)
    for size in PRESET_SIZES:  # only defaults of grpo.*, which is frozen: another preset cuts the same work otherwise
        changed.hardware[size] = frozen.hardware[size]
    # Other digits, and another place in W&B, are asked for by their names and not by a group such as tracking=offline.
    kept = {"hardware.compute_dtype", "tracking.group", "tracking.name", "tracking.tags"}
    for key in kept - named_keys(new):
        OmegaConf.update(changed, key, OmegaConf.select(frozen, key), merge=False)
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
    if isinstance(error, Exit):
        _set_state(run.folder, "interrupted", None)
        command = resume_command(run.folder.path, foreign_targets(to_dict(run.config)))
        recorded = run.folder.changes()
        pending = [f"{key}={value}" for key, value in run.changes.items() if recorded.get(key) != value]
        print(f"interrupted; go on with: {' '.join([command, *pending])}", flush=True)
        return
    if isinstance(error, ConfigError) and (not run.resumed or run.forked):
        _discard(run.folder, run.forked)
        return
    _set_state(run.folder, "failed", f"{type(error).__name__}: {error}")
    logger.info("the run failed", exc_info=error)  # into launch.log; the console gets the one line below
    logger.error("%s failed: %s: %s", run.folder.path, type(error).__name__, error)
    error.logged = True
    # Hydra keeps a failed job's exception for the rest of a sweep, and with its frames the model.
    traceback.clear_frames(error.__traceback__)


def _set_state(folder: RunFolder, state: str, error: str | None) -> None:
    with disk_errors_are_warnings(f"{folder.path}/status.json"):
        folder.update_status(state=state, error=error)


def _discard(folder: RunFolder, forked: bool) -> None:
    """Remove what a launch made that could not even start, so that no empty run stands in the way."""
    for name in ("config.yaml", "status.json", ".lock", "launch.log"):
        (folder.path / name).unlink(missing_ok=True)
    for name in (".hydra", "checkpoints", "metrics", "eval") if forked else (".hydra",):
        shutil.rmtree(folder.path / name, ignore_errors=True)
    for path in (folder.path, folder.path.parent):
        if not any(path.iterdir()) and (path == folder.path or path.is_relative_to(OUTPUTS)) and path != OUTPUTS:
            path.rmdir()
