"""One launch in one run folder: open the folder, freeze or read its config, and record how the launch ended."""

import logging
import os
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from grpo.config.command_line import override
from grpo.config.errors import ConfigError, FileError
from grpo.config.hydra_app import compose_again, config_flags
from grpo.config.overrides import Overrides
from grpo.config.schema import Config
from grpo.config.trust import foreign_targets
from grpo.config.values import escape, to_dict
from grpo.launch.freeze import freeze
from grpo.launch.resume import resumed_config
from grpo.runs.choice import TRAIN_FURTHER, check_empty, check_parent, choose_run, has_finished
from grpo.runs.console import resume_command
from grpo.runs.files import discard, disk_errors_are_warnings, short_path
from grpo.runs.folder import COPIED_BY_FORK, RunFolder
from grpo.runs.gpu_queue import claim_gpu, must_choose_gpu, show_all_gpus
from grpo.runs.locations import release, remove_empty
from grpo.runs.lock import locked
from grpo.runs.run import Run
from grpo.runs.stop_signals import Exit, StopSignals, exits_are_failures
from grpo.runs.sweep_folder import SweepFolder

logger = logging.getLogger(__name__)


@contextmanager
def open_run(cfg: DictConfig, decided: RunFolder | None = None) -> Iterator[Run]:
    """Hold a run folder within the block: write or read its config.yaml, and keep its status.json up to date.

    status.json is updated also after a failure. decided: the folder of a single run, which was chosen, checked and
    locked before Hydra started. For a job of a sweep (None) this is done here, on the machine of the job.
    """
    if decided is not None:
        with StopSignals().installed() as stop, _started(decided, cfg, cfg.resume, stop, is_job=False) as run:
            yield run
        return
    folder = job_folder()
    sweep = SweepFolder(Path(HydraConfig.get().sweep.dir).absolute())
    # Some jobs of a resumed sweep may have finished, others not started; SLURM may also restart a job on its own.
    again = cfg.resume or int(os.environ.get("SLURM_RESTART_COUNT", "0")) > 0
    resume = "auto" if again else False
    try:
        if choose_run(folder, resume, command_line()) == "fresh":
            check_empty(folder.path, cfg.fork, job=True)
        with (
            StopSignals().installed() as stop,
            locked(folder.path),
            _started(folder, cfg, resume, stop, is_job=True) as run,
        ):
            yield run
    except ConfigError as error:
        logger.error("%s: %s", folder.path, error)  # immediately, not only after all other jobs have ended
        if not folder.started():
            with disk_errors_are_warnings(f"{folder.path}/status.json"):
                folder.path.mkdir(parents=True, exist_ok=True)
                folder.update_status(state="failed", error=str(error), overrides=command_line().lines)
        raise
    finally:
        with disk_errors_are_warnings(f"{HydraConfig.get().sweep.dir}/sweep.json"):
            sweep.update()


def job_folder() -> RunFolder:
    """The folder that Hydra gave this job of a sweep."""
    return RunFolder(short_path(HydraConfig.get().runtime.output_dir))


def command_line() -> Overrides:
    """The overrides of the experiment that Hydra composed this run with."""
    lines: Any = OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)  # a list of strings
    return Overrides(lines)


@contextmanager
def _started(folder: RunFolder, cfg: DictConfig, resume: bool | str, stop: StopSignals, is_job: bool) -> Iterator[Run]:
    before = folder.status()
    run = _open(folder, cfg, resume, stop, is_job)
    folder = run.folder
    refused = False
    try:
        with exits_are_failures(Exit):
            yield run
    except BaseException as error:
        refused = _is_refused(run, error, is_job)
        if refused:
            _undo(run, before)
        else:
            _record_end(run, error, before if _has_changed_nothing(run, is_job) else None)
        raise
    finally:
        if folder.started() and not run.done and not refused:
            with disk_errors_are_warnings(f"{folder.path}/status.json"):
                folder.update_status(seconds=run.seconds)


def _open(folder: RunFolder, cfg: DictConfig, resume: bool | str, stop: StopSignals, is_job: bool) -> Run:
    import torch  # here, since it takes seconds

    from grpo.launch.preset import hardware_found

    hydra_cfg = HydraConfig.get()
    overrides = command_line()
    launcher = hydra_cfg.launcher._target_
    if is_job and must_choose_gpu(cfg, launcher):
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
        if resumed:
            _discard_record(hydra_cfg)
        else:
            _discard(folder, cfg.fork)
        raise
    done = folder.finished() and not changes.keys() & TRAIN_FURTHER
    if done and resume is True:
        _discard_record(hydra_cfg)
        raise ConfigError(has_finished(folder))
    if done:
        print(f"{folder.path} has finished already: nothing to do")
    else:
        # If the sweeper finds its points itself, this is the only record of them before the first step.
        known = {"overrides": overrides.lines} if is_job else {}
        folder.update_status(state="running", error=None, **known)
    before = folder.status().get("seconds", 0.0)
    return Run(
        RunFolder(folder.path.absolute()),
        config,
        resumed=resumed or cfg.fork,
        forked=cfg.fork and not resumed,
        done=done,
        stop=stop,
        overrides=overrides.lines,
        flags=config_flags(hydra_cfg),
        changes=changes,
        until_step=cfg.until_step,
        started=started,
        seconds_before=before,
    )


def new_config(folder: RunFolder, cfg: DictConfig, overrides: Overrides, is_job: bool) -> Config:
    """Freeze the config of a new run or fork, and write it. Raises ConfigError."""
    if is_job:
        _name_in_tracking(cfg, overrides)
    now = datetime.now().isoformat(timespec="seconds")
    # Before config.yaml, so that a run that can be resumed has this record.
    folder.record_launch({"time": now, "overrides": overrides.lines})
    if cfg.fork:
        check_parent(cfg.run_dir)  # a job of a resumed sweep may not have started before
        from grpo.launch.fork import fork  # imports torch

        return fork(folder, cfg, overrides)
    config = freeze(cfg)
    folder.write_config(config)
    return config


def _name_in_tracking(cfg: DictConfig, overrides: Overrides) -> None:
    """Let W&B show the jobs of a sweep as one group, and name each job by its swept values."""
    record = SweepFolder(HydraConfig.get().sweep.dir).record()
    own = overrides.select(record.get("keys", [])).lines
    tags = [escape(tag[:64]) for tag in own]  # maximum length in W&B
    cfg.tracking.tags = list(dict.fromkeys([*cfg.tracking.tags, *tags]))
    if cfg.tracking.group is None:
        cfg.tracking.group = escape(record.get("name"))
    if cfg.tracking.name is None:
        cfg.tracking.name = escape(" ".join(own)) or None


def _record_end(run: Run, error: BaseException, before: Mapping[str, Any] | None) -> None:
    """Record and print how a launch ended. before: the status to restore, if the launch has changed nothing."""
    if before is not None:
        _restore_state(run, before)
    if isinstance(error, Exit):
        if before is None:
            run.record_state("interrupted", None)
        recorded = run.folder.changes()
        changed = {key: value for key, value in run.changes.items() if recorded.get(key) != value}
        pending = [override(key, value) for key, value in changed.items()]
        command = resume_command(run.folder.path, foreign_targets(to_dict(run.config)), *pending)
        print(f"interrupted; resume with: {command}", flush=True)
        return
    if before is None:
        run.record_state("failed", f"{type(error).__name__}: {error}")
    logger.info("the run failed", exc_info=error)  # to launch.log; the console shows only the line below
    logger.error("%s failed: %s: %s", run.shown_path, type(error).__name__, error)
    vars(error)["logged"] = True  # for `report_errors`
    # Hydra keeps the exception of a failed job until the sweep ends, and its frames would keep the model in memory.
    traceback.clear_frames(error.__traceback__)


def _is_refused(run: Run, error: BaseException, is_job: bool) -> bool:
    """Whether a launch ended because of its config or command line, before it did anything.

    Not for a resumed job of a sweep: its state is `failed`, so that the sweep shows why it did not continue. Nor for a
    damaged file of a new run, which is kept to be looked at.
    """
    if not isinstance(error, ConfigError) or run.recorded:
        return False
    return _has_changed_nothing(run, is_job) or (not _continues(run) and not isinstance(error, FileError))


def _has_changed_nothing(run: Run, is_job: bool) -> bool:
    """Whether a launch that resumes a run ended before it began, so that the run keeps its former state."""
    return _continues(run) and not run.recorded and not is_job


def _continues(run: Run) -> bool:
    return run.resumed and not run.forked


def _restore_state(run: Run, before: Mapping[str, Any]) -> None:
    """Record the state that a run had before a launch that changed nothing. One that was killed is interrupted."""
    state = before.get("state", "failed")
    run.record_state("interrupted" if state == "running" else state, before.get("error"))


def _undo(run: Run, before: Mapping[str, Any]) -> None:
    """Leave a run as it was before a launch that was refused; before: its status then."""
    if _continues(run):
        _restore_state(run, before)
        _discard_record(HydraConfig.get())
    else:
        _discard(run.folder, run.forked)


def _discard(folder: RunFolder, forked: bool) -> None:
    """Remove the files of a launch that was refused before its first step, so that no empty run is left."""
    for name in ("config.yaml", "status.json", "digests.json", *(COPIED_BY_FORK if forked else ())):
        with suppress(OSError):  # so as not to hide the error that ended the launch
            discard(folder.path / name)
    release(folder.path)
    remove_empty([folder.path])  # not if it contains the output of a launcher


def _discard_record(hydra_cfg: HydraConf) -> None:
    """Remove Hydra's record of a launch that cannot resume its run."""
    record = Path(hydra_cfg.runtime.output_dir, str(hydra_cfg.output_subdir))
    if record.parent.name == "resumes":
        discard(record)
        remove_empty([record.parent])
