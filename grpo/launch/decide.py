"""What a command line asks for, decided and checked before Hydra starts and before anything is on disk."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from omegaconf import DictConfig

from grpo.config.checks import check_name, typed
from grpo.config.errors import ConfigError
from grpo.config.hydra_app import Application, without_hydra
from grpo.config.instantiate import check_importable
from grpo.config.overrides import Overrides, quoted
from grpo.config.schema import Config
from grpo.launch.plan import print_plan
from grpo.runs.choice import check_empty, check_parent, choose_run
from grpo.runs.files import short_path
from grpo.runs.folder import RunFolder, newest_unfinished, outputs, release, reserve
from grpo.runs.gpu_queue import remember_gpus
from grpo.runs.lock import locked
from grpo.runs.sweep_folder import SweepFolder
from grpo.sweeps.opening import prepare_sweep


@dataclass(frozen=True)
class Launch:
    """A launch that nothing speaks against: what Hydra is started with, and the folder, which this process holds."""

    app: Application
    overrides: list[str]  # for Hydra
    config: DictConfig  # as composed, without Hydra's part; in a sweep what its jobs have in common
    run: RunFolder | None = None  # the folder of a single run
    sweep: SweepFolder | None = None  # or that of a sweep


@contextmanager
def decide(flags: argparse.Namespace) -> Iterator[Launch | None]:
    """Hold the folder of the launch that the flags ask for; None where a plan, or no more than a line, was the answer.

    Raises ConfigError, or what Hydra raises, for what cannot be, with nothing left on disk.
    """
    app = Application(flags)
    overrides = Overrides(flags.overrides)
    composed, is_sweep = app.compose(overrides.lines, flags.multirun)
    if not is_sweep:
        check_runnable(without_hydra(composed), overrides)
        if composed.fork and composed.resume:
            raise ConfigError("fork=true starts a new run: leave resume out; to resume a fork, name its own run_dir")
    if composed.plan:
        print_plan(composed, overrides, is_sweep, check_runnable)
        yield None
    elif is_sweep:
        with hold_sweep(app, composed, overrides) as launch:
            yield launch
    else:
        with hold_run(app, composed, overrides) as launch:
            yield launch


def check_runnable(config: DictConfig, overrides: Overrides) -> Config:
    """The config of one run as dataclasses. Raises ConfigError where it cannot run on any machine."""
    checked = typed(config)
    for key in ("beta", "epsilon"):
        own = checked.objective.get(key)
        if own is not None and own != getattr(checked.grpo, key) and overrides.names(f"grpo.{key}"):
            raise ConfigError(
                f"grpo.{key}: the objective has its own, objective.{key}={own:g}; set that one, or "
                f"objective.{key}=null to follow grpo.{key}"
            )
    check_importable(checked)
    if checked.fork:
        check_parent(checked.run_dir)
    return checked


@contextmanager
def hold_run(app: Application, composed: DictConfig, overrides: Overrides) -> Iterator[Launch | None]:
    """Choose, reserve and lock the folder of a single run; None where it has finished already."""
    run = known_folder(without_hydra(composed), overrides)
    if run is None:
        wanted = outputs() / run_name(composed, overrides) / f"{datetime.now():%Y-%m-%d_%H-%M-%S}"
        holding = reserved(wanted, suffix=True)
    else:
        chosen = choose_run(run, composed.resume, overrides)
        if chosen == "done":
            print(f"{run.path} has finished already: nothing to do")
            yield None
            return
        if chosen == "resume":
            run.frozen_config()  # refused here, with nothing written to the folder, if it cannot be read
            holding = locked(run.path)
        else:
            check_empty(run.path)
            holding = reserved(run.path, suffix=False)
    with holding as path:
        own = f"hydra.run.dir={quoted(str(path))}"
        final = [*overrides.without({"hydra.run.dir"}), own]
        yield Launch(app, final, without_hydra(composed), run=RunFolder(path))


def known_folder(config: DictConfig, overrides: Overrides) -> RunFolder | None:
    """The folder that the command line names, or the newest unfinished one where it resumes; None: a new one."""
    named = overrides.value("hydra.run.dir") or (None if config.fork else config.run_dir)
    if named is not None:
        return RunFolder(short_path(named))
    if not config.resume or config.fork:
        return None
    # `auto` is for the same command again, as a queue restarts it, so it stays within the experiment's name.
    found = newest_unfinished(outputs() / config.name if config.resume == "auto" else outputs())
    if found is None and config.resume is True:
        raise ConfigError(
            f"resume=true: no unfinished run below {outputs()}/; name one with run_dir=..., or start without resume"
        )
    return found


def run_name(config: DictConfig, overrides: Overrides) -> str:
    """The name below which a new run is kept; that of its parent for a fork, unless the command line gives one."""
    if not config.fork or overrides.names("name"):
        return config.name
    name = RunFolder(config.run_dir).frozen_config().name
    check_name(name)
    return name


@contextmanager
def reserved(wanted: Path, suffix: bool) -> Iterator[Path]:
    """Hold the folder of a new run for this process. If no run came to be in it, nothing of it stays.

    suffix: give it another name where the wanted one is taken.
    """
    path, created = reserve(wanted, suffix)
    run = RunFolder(path)
    try:
        with locked(path):
            if run.started():
                raise ConfigError(f"{path} became a run of another launch a moment ago; choose another run_dir")
            yield path
    finally:
        if not run.started():
            release(path, created)


@contextmanager
def hold_sweep(app: Application, composed: DictConfig, overrides: Overrides) -> Iterator[Launch]:
    """Choose, reserve and lock the folder of a sweep, and begin its sweep.json."""
    opening = prepare_sweep(composed, overrides, check_runnable)
    path, created = reserve(opening.folder.path, suffix=opening.is_new)
    folder = SweepFolder(path)
    try:
        with locked(path):
            remember_gpus()
            opening.begin(folder)
            yield Launch(app, opening.overrides_for(folder), without_hydra(composed), sweep=folder)
    finally:
        if not folder.record():
            release(path, created)
