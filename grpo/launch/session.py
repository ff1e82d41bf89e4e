"""One launch in one run folder: opening it, freezing or reading its config, and leaving it in a known state."""

import logging
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from grpo.config.hydra_app import compose_again
from grpo.config.instantiate import foreign_targets
from grpo.config.overrides import Overrides
from grpo.config.schema import Config, ConfigError, FileError, to_dict
from grpo.launch.freeze import freeze
from grpo.launch.resume import resumed_config
from grpo.runs.choice import MORE_STEPS, check_parent, choose_run, has_finished
from grpo.runs.console import resume_command
from grpo.runs.folder import RunFolder, short_path
from grpo.runs.gpu_queue import claim_gpu, show_all_gpus, takes_any_gpu
from grpo.runs.lock import locked
from grpo.runs.sweep_folder import SweepFolder

logger = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


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
    """For what a run can do without: a full disk, or a damaged file, must neither end a run nor hide what ended it."""
    try:
        yield
    except (OSError, FileError) as error:
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
    def installed(self) -> Iterator["StopSignals"]:
        """Handle the signals within the block, and restore the former handlers after it."""
        former = {number: signal.signal(number, self._handle) for number in STOP_SIGNALS}
        try:
            yield self
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
def open_run(cfg: DictConfig, decided: RunFolder | None = None) -> Iterator[Run]:
    """Hold a run folder: config.yaml written or read back, status.json true also after a failure.

    decided: the folder of a single run, chosen, checked and locked before Hydra started. A job of a sweep does so here,
    on its own machine.
    """
    if decided is not None:
        with StopSignals().installed() as stop, _started(decided, cfg, cfg.resume, stop, is_job=False) as run:
            yield run
        return
    folder = job_folder()
    # Of a sweep's jobs, some may have finished and some never begun; SLURM may start one again by itself.
    again = cfg.resume or int(os.environ.get("SLURM_RESTART_COUNT", "0")) > 0
    resume = "auto" if again else False
    try:
        choose_run(folder, resume, command_line())
        with (
            StopSignals().installed() as stop,
            locked(folder.path),
            _started(folder, cfg, resume, stop, is_job=True) as run,
        ):
            yield run
    except ConfigError as error:
        logger.error("%s: %s", folder.path, error)  # at once, and not only after all other jobs
        if not folder.started():
            with disk_errors_are_warnings(f"{folder.path}/status.json"):
                folder.path.mkdir(parents=True, exist_ok=True)
                folder.update_status(state="failed", error=str(error), overrides=command_line().lines)
        raise
    finally:
        with disk_errors_are_warnings(f"{HydraConfig.get().sweep.dir}/sweep.json"):
            SweepFolder(HydraConfig.get().sweep.dir).update()


def job_folder() -> RunFolder:
    """The folder that Hydra gave this job of a sweep."""
    return RunFolder(short_path(HydraConfig.get().runtime.output_dir))


def command_line() -> Overrides:
    """The overrides of the experiment that Hydra composed this run with."""
    return Overrides(OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False))


@contextmanager
def _started(folder: RunFolder, cfg: DictConfig, resume: bool | str, stop: StopSignals, is_job: bool) -> Iterator[Run]:
    run = _open(folder, cfg, resume, stop, is_job)
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


def _open(folder: RunFolder, cfg: DictConfig, resume: bool | str, stop: StopSignals, is_job: bool) -> Run:
    import torch  # here, since it takes seconds

    from grpo.model.hardware import hardware_found

    hydra_cfg, overrides = HydraConfig.get(), command_line()
    launcher = hydra_cfg.launcher._target_
    if is_job and takes_any_gpu(cfg, launcher):
        show_all_gpus(launcher)
        claim_gpu(torch.cuda.device_count())
    started = time.monotonic()
    changes: dict[str, Any] = {}
    resumed = folder.started()
    try:
        cfg = hardware_found(cfg, overrides, lambda lines: compose_again(hydra_cfg, lines))
        if resumed:
            config, changes = resumed_config(folder, cfg, overrides)
        else:
            config = new_config(folder, cfg, overrides, is_job)
    except (ConfigError, OmegaConfBaseException, HydraException, SystemExit):
        if not resumed:
            _discard(folder, cfg.fork)
        raise
    done = folder.finished() and not changes.keys() & set(MORE_STEPS)
    if done and resume is True:
        raise ConfigError(has_finished(folder))
    if done:
        print(f"{folder.path} has finished already: nothing to do")
    else:
        # A sweeper that finds its points itself leaves no other record of them before the first step.
        known = {"overrides": overrides.lines} if is_job else {}
        folder.update_status(state="running", error=None, **known)
    before = folder.status().get("seconds", 0.0)
    return Run(
        folder,
        config,
        resumed=resumed or cfg.fork,
        forked=cfg.fork,
        done=done,
        stop=stop,
        overrides=overrides.lines,
        changes=changes,
        until_step=cfg.until_step,
        started=started,
        seconds_before=before,
    )


def new_config(folder: RunFolder, cfg: DictConfig, overrides: Overrides, is_job: bool) -> Config:
    """Freeze the config of a new run or fork, and write it. Raises ConfigError."""
    if is_job:
        _name_in_tracking(cfg, overrides)
    if cfg.fork:
        check_parent(cfg.run_dir)  # a job of a sweep that is resumed may not have begun
        from grpo.launch.fork import fork  # imports torch

        return fork(folder, cfg, overrides)
    config = freeze(cfg)
    folder.write_config(config)
    return config


def _name_in_tracking(cfg: DictConfig, overrides: Overrides) -> None:
    """Let W&B show the jobs of a sweep as one group, each by the values that it has."""
    record = SweepFolder(HydraConfig.get().sweep.dir).record()
    own = overrides.select(record["keys"]).lines
    cfg.tracking.tags = list(dict.fromkeys([*cfg.tracking.tags, *(tag[:64] for tag in own)]))  # W&B's longest
    if cfg.tracking.group is None:
        cfg.tracking.group = record["name"]
    if cfg.tracking.name is None:
        cfg.tracking.name = " ".join(own) or None


def _record_end(run: Run, error: BaseException) -> None:
    if isinstance(error, Exit):
        _set_state(run.folder, "interrupted", None)
        command = resume_command(run.folder.path, foreign_targets(to_dict(run.config)))
        recorded = run.folder.changes()
        pending = [f"{key}={value}" for key, value in run.changes.items() if recorded.get(key) != value]
        print(f"interrupted; go on with: {' '.join([command, *pending])}", flush=True)
        return
    if isinstance(error, ConfigError) and not isinstance(error, FileError) and (not run.resumed or run.forked):
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
    """Remove what a launch created that could not even start, so that no empty run stands in the way."""
    for name in ("config.yaml", "status.json", ".lock", "launch.log"):
        (folder.path / name).unlink(missing_ok=True)
    for name in (".hydra", "checkpoints", "metrics", "eval") if forked else (".hydra",):
        shutil.rmtree(folder.path / name, ignore_errors=True)
    with suppress(OSError):  # it may hold what a launcher prints to
        folder.path.rmdir()
