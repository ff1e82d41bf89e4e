"""Hydra launcher for one machine: each job of a sweep runs in its own process, one job per GPU at a time."""

import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import FrameType
from typing import Any

import cloudpickle
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, configure_log, filter_overrides, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

from grpo.config.errors import ConfigError, first_line
from grpo.config.overrides import Overrides
from grpo.runs.console import ignoring_console_errors
from grpo.runs.folder import RunFolder
from grpo.runs.gpu_queue import must_choose_gpu
from grpo.runs.stop_signals import STOP_SIGNALS, stop_signals
from grpo.runs.sweep_folder import SweepFolder

logger = logging.getLogger(__name__)

HALVING = "hydra_plugins.hydra_grpo.HalvingSweeper"
STOPPED = tuple(128 + number for number in STOP_SIGNALS)  # exit codes of a run that was ended by a stop signal


@dataclass
class _Job:
    place: int  # index in the list of this launch
    number: int
    name: str  # its overrides of the swept keys
    overrides: list[str]
    folder: Path
    process: multiprocessing.process.BaseProcess
    result: Connection
    started: float


class LocalLauncher(Launcher):
    """Runs each job in its own process, so a job that crashes or is killed for its memory does not affect the others.

    jobs_at_once: number of jobs that run in parallel; None: one per GPU if the jobs choose their GPU themselves, else
    one. Jobs that run in parallel print to console.log in their folders. A stop signal is passed on to the jobs, which
    save, and the launcher waits for them.
    """

    def __init__(self, jobs_at_once: int | None = None) -> None:
        self.jobs_at_once = jobs_at_once

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Called by Hydra once before `launch`."""
        self.context = hydra_context
        self.function = task_function
        self.config = config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run jobs; returns the result or exception of each, in order. Raises SystemExit after a stop signal."""
        setup_globals()
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        target = self.config.hydra.launcher._target_
        at_once = self.jobs_at_once or (_gpus() if must_choose_gpu(self.config, target) else 0) or 1
        if at_once > 1:
            _share_cores(at_once)
        waiting = deque((place, initial_job_idx + place, list(each)) for place, each in enumerate(job_overrides))
        running: dict[Any, _Job] = {}  # by the sentinel of the job's process
        returns: dict[int, JobReturn] = {}  # by the job's place
        record = SweepFolder(self.config.hydra.sweep.dir).record()
        is_halving = self.config.hydra.sweeper._target_ == HALVING  # each launch is a rung, with its own number of jobs
        known = 0 if is_halving else len(record.get("planned") or ())
        progress = Progress(max(known, initial_job_idx + len(job_overrides)), at_once)
        self.swept = record.get("keys")
        with _Forwarding(running) as stop:
            while (waiting and not stop.received) or running:
                while waiting and len(running) < at_once and not stop.received:
                    place, number, overrides = waiting.popleft()
                    config = self._composed(number, overrides)
                    before = _done_before(config)
                    if before is not None:
                        returns[place] = before
                    elif not stop.received:
                        job = self._start(place, number, overrides, config, progress.name(number), quiet=at_once > 1)
                        running[job.process.sentinel] = job
                        stop.pass_on(job)  # a signal that was received while the job was started
                for sentinel in wait(list(running)) if running else ():
                    job = running.pop(sentinel)
                    returns[job.place] = done = _outcome(job, stopped=bool(stop.received))
                    completed = done.status == JobStatus.COMPLETED
                    print(progress.ended(job, completed, list(running.values()), len(waiting)), flush=True)
        if stop.received:
            raise SystemExit(128 + stop.received)
        return [returns[place] for place in range(len(job_overrides))]

    def _composed(self, number: int, overrides: list[str]) -> DictConfig:
        config = self.context.config_loader.load_sweep_config(self.config, overrides)
        with open_dict(config):
            config.hydra.job.id = config.hydra.job.num = number
        return config

    def _start(
        self, place: int, number: int, overrides: list[str], config: DictConfig, label: str, quiet: bool
    ) -> _Job:
        shown = Overrides(overrides) if self.swept is None else Overrides(overrides).select(self.swept)
        name = " ".join(filter_overrides(shown.lines))
        folder = Path(config.hydra.sweep.dir, config.hydra.sweep.subdir)
        folder.mkdir(parents=True, exist_ok=True)
        where = f"printing to {folder / 'console.log'}" if quiet else f"folder {folder.name}"
        print(f"{label}: {name} ({where})", flush=True)
        receiver, sender = multiprocessing.Pipe(duplex=False)
        call = cloudpickle.dumps((self.context, self.function, config, Singleton.get_state()))
        # "spawn" starts a new interpreter: a forked process cannot use CUDA if this process has initialized it.
        process = multiprocessing.get_context("spawn").Process(
            target=_run, args=(call, sender, folder / "console.log" if quiet else None), name=f"job {number}"
        )
        process.start()
        sender.close()
        return _Job(place, number, name, overrides, folder, process, receiver, time.monotonic())


class Progress:
    """Console messages about the jobs of a sweep while they run; the messages number the jobs from 1."""

    def __init__(self, total: int, at_once: int) -> None:
        self._total = total
        self._at_once = at_once
        self._seconds: list[float] = []  # of the jobs that completed

    def name(self, number: int) -> str:
        """The name of a job in messages; number: from 0, as in the name of its folder."""
        return f"job {number + 1} of {self._total}"

    def ended(self, job: _Job, completed: bool, running: list[_Job], waiting: int) -> str:
        """The message for a job that ended, with an estimate of the time left for the other jobs of this launch."""
        now = time.monotonic()
        seconds = now - job.started
        state = _state(job.folder)
        if completed and state == "interrupted":  # by until_step, which successive halving sets
            state = "paused"
        line = f"{self.name(job.number)} ({job.name}): {state} after {duration(seconds)}"
        if completed:
            self._seconds.append(seconds)
            outcome = _outcome_of(job.folder)
            if outcome is not None:
                name, value = outcome
                line += f", {name} {value:.1%}" if name.endswith("accuracy") else f", {name} {value:.2f}"
        others = len(running) + waiting
        if others and self._seconds:
            usual = sum(self._seconds) / len(self._seconds)
            left = sum(max(0.0, usual - (now - each.started)) for each in running) + waiting * usual
            line += f"; about {duration(left / min(self._at_once, others))} left for {others} more"
        return line


def duration(seconds: float) -> str:
    """A duration in seconds, minutes or hours."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _done_before(config: DictConfig) -> JobReturn | None:
    """The result of a job that finished before the sweep was resumed, so that no process is started for it; or None."""
    run = RunFolder(Path(config.hydra.sweep.dir, config.hydra.sweep.subdir))
    if not config.resume or _state(run.path) != "finished":
        return None
    print(f"{run.path} has finished already: nothing to do", flush=True)
    done = JobReturn(status=JobStatus.COMPLETED)
    done.return_value = run.objective()
    return done


def _state(folder: Path) -> str:
    try:
        return RunFolder(folder).status().get("state", "failed")
    except ValueError:  # damaged: the job's own process reports it, and the other jobs must continue
        return "unreadable"


def _outcome_of(folder: Path) -> tuple[str, float] | None:
    try:
        return RunFolder(folder).outcome()
    except ValueError:  # a damaged file of this job, which must not end the others
        return None


def _run(call: bytes, sender: Connection, console: Path | None) -> None:
    """Run a job in its own process, and send its return value or its exception to the launcher."""
    os.setpgrp()  # so that Ctrl-C reaches the job only once, through the launcher: a second signal ends it unsaved
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if console is not None:
        file = os.open(console, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        sys.stdout.flush()
        for stream in (1, 2):
            os.dup2(file, stream)
    sys.path.append(os.getcwd())  # as in run_command
    with ignoring_console_errors():
        _run_job(call, sender)


def _run_job(call: bytes, sender: Connection) -> None:
    context, function, config, singletons = cloudpickle.loads(call)
    setup_globals()
    Singleton.set_state(singletons)
    done = run_job(
        hydra_context=context,
        task_function=function,
        config=config,
        job_dir_key="hydra.sweep.dir",
        job_subdir_key="hydra.sweep.subdir",
    )
    if done.status == JobStatus.COMPLETED:
        sender.send((done.return_value, None))
        return
    failure = done._return_value  # its type may not be importable in the launcher's process
    refused = isinstance(failure, ConfigError)
    sender.send((None, failure if refused else JobFailed(f"{type(failure).__name__}: {first_line(failure)}")))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None  # the launcher started this process
    wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)


def _outcome(job: _Job, stopped: bool) -> JobReturn:
    """The result of a job that has ended."""
    job.process.join()
    code = job.process.exitcode
    assert code is not None  # it has ended
    try:
        value, error = job.result.recv()
    except EOFError:  # the process ended before it sent a result
        reason = f"its process ended with {_describe_exit(code)}"
        value = None
        error = JobFailed(f"job {job.number} ({job.name}): {reason}")
        run = RunFolder(job.folder)
        left = code in STOPPED  # by a signal to this job alone: the job has saved and recorded its state itself
        if not (stopped or left or _state(run.path) in ("finished", "failed", "unreadable")):
            run.update_status(state="failed", error=reason)
            logger.error("%s failed: %s", job.folder, reason)
    done = JobReturn(overrides=job.overrides, status=JobStatus.FAILED if error else JobStatus.COMPLETED)
    done.return_value = error or value
    return done


def _describe_exit(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    hint = " (possibly out of memory)" if -code == signal.SIGKILL else ""
    return f"{signal.Signals(-code).name}{hint}"


class JobFailed(Exception):
    """A job of the sweep failed. The job has logged the error itself, with the traceback in its launch.log."""

    logged = True


class _Forwarding:
    """Passes stop signals on to the running jobs."""

    def __init__(self, running: dict[Any, _Job]) -> None:
        self.running = running
        self.received = 0
        self._former: dict[int, Any] = {}

    def __enter__(self) -> "_Forwarding":
        self._former = {number: signal.signal(number, self._handle) for number in stop_signals()}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        self.received = number
        for job in self.running.values():
            self.pass_on(job)

    def pass_on(self, job: _Job) -> None:
        """Send a job the received signal, if there is one; the job may have ended already."""
        pid = job.process.pid
        if self.received and pid is not None:
            with suppress(ProcessLookupError):
                os.kill(pid, self.received)


def _share_cores(jobs: int) -> None:
    """Give each of several jobs at once its share of the cores, as the default of hardware.threads.

    A job inherits the variable, and torch reads it when the job imports it. A value of the user is kept.
    """
    if "OMP_NUM_THREADS" in os.environ:
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = max(1, cores // jobs)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    print(f"{jobs} jobs at once on {cores} cores: each uses {threads} unless hardware.threads is set", flush=True)


def _gpus() -> int:
    import torch  # imported here, since that takes seconds; counting GPUs does not initialize CUDA

    return torch.cuda.device_count()
