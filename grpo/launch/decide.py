"""What a command line asks for, decided and checked before Hydra starts and before anything is on disk."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from grpo.algorithm.objective import check_choices
from grpo.config.checks import check_followed, check_name, typed
from grpo.config.errors import ConfigError
from grpo.config.hydra_app import Application, without_hydra
from grpo.config.instantiate import check_importable
from grpo.config.overrides import Overrides, quoted
from grpo.config.schema import Config
from grpo.launch.plan import print_plan
from grpo.runs.choice import check_empty, check_parent, choose_run
from grpo.runs.files import short_path
from grpo.runs.folder import RunFolder, newest_unfinished, outputs, release, remove_empty, reserve
from grpo.runs.gpu_queue import remember_gpus
from grpo.runs.lock import locked
from grpo.runs.sweep_folder import SweepFolder
from grpo.sweeps.opening import prepare_sweep


@dataclass(frozen=True)
class Launch:
    """A launch that passed every check: what Hydra is started with, and the folder, which this process holds."""

    app: Application
    overrides: list[str]  # for Hydra
    config: DictConfig  # as composed, without Hydra's part; in a sweep what its jobs have in common
    run: RunFolder | None = None  # the folder of a single run
    sweep: SweepFolder | None = None  # or that of a sweep


@contextmanager
def decide(flags: argparse.Namespace) -> Iterator[Launch | None]:
    """Hold the folder of the launch that the flags ask for; None where there is nothing to launch: after a plan, or
    where the run has finished.

    Raises ConfigError, or what Hydra raises, for a command or config that cannot work, with nothing left on disk.
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
    check_followed(checked, overrides)
    check_importable(checked)
    check_choices(checked.objective)
    if checked.fork:
        check_parent(checked.run_dir)
    return checked


@contextmanager
def hold_run(app: Application, composed: DictConfig, overrides: Overrides) -> Iterator[Launch | None]:
    """Choose, reserve and lock the folder of a single run; None where it has finished already."""
    config = without_hydra(composed)
    run = known_folder(config, named_folder(composed.hydra.run, "${run_dir}"))
    if run is None:
        wanted = outputs() / run_name(config, overrides) / f"{datetime.now():%Y-%m-%d_%H-%M-%S}"
        holding = reserved(wanted, suffix=True)
    else:
        chosen = choose_run(run, config.resume, overrides)
        if chosen == "done":
            print(f"{run.path} has finished already: nothing to do")
            yield None
            return
        if chosen == "resume":
            run.frozen_config()  # refused here, with nothing written to the folder, if it cannot be read
            holding = locked(run.path)
        else:
            check_empty(run.path, config.fork)
            holding = reserved(run.path, suffix=False)
    with holding as path:
        own = f"hydra.run.dir={quoted(str(path))}"
        yield Launch(app, [*overrides.without({"hydra.run.dir"}), own], config, run=RunFolder(path))


def named_folder(place: DictConfig, default: str) -> str | None:
    """The folder that hydra.run or hydra.sweep names, on the command line or in a config; None: conf's own default."""
    written: Any = OmegaConf.to_container(place, resolve=False)  # a dict
    return None if written["dir"] == default else str(place.dir)


def known_folder(config: DictConfig, named: str | None = None) -> RunFolder | None:
    """The folder that the launch names, or the newest unfinished one where it resumes; None: a new one.

    named: by hydra.run.dir. A fork's run_dir is another folder, that of its parent.
    """
    path = named or (None if config.fork else config.run_dir)
    if path is not None:
        return RunFolder(short_path(path))
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
    """Hold the folder of a new run for this process. Where no run starts in it, it is removed again.

    suffix: give it another name where the wanted one is taken.
    """
    path, created = reserve(wanted, suffix)
    run = RunFolder(path)
    try:
        with locked(path):
            try:
                if run.started():
                    raise ConfigError(f"{path} became a run of another launch a moment ago; choose another run_dir")
                yield path
            finally:
                # While it is locked, since only its holder may remove anything.
                if not run.started() and not run.has_trained():
                    release(path)
    finally:
        remove_empty(created)


@contextmanager
def hold_sweep(app: Application, composed: DictConfig, overrides: Overrides) -> Iterator[Launch]:
    """Choose, reserve and lock the folder of a sweep, and begin its sweep.json.

    Where Hydra refuses a new sweep, so that no launcher got a job, both are removed again.
    """
    named = composed.sweep_dir or named_folder(composed.hydra.sweep, "${sweep_dir}")
    opening = prepare_sweep(composed, overrides, named, check_runnable)
    path, created = reserve(opening.folder.path, suffix=opening.is_new)
    folder = SweepFolder(path)
    try:
        with locked(path):
            if folder.begun() != opening.begun:
                raise ConfigError(f"{path} became a sweep of another launch a moment ago; choose another sweep_dir")
            remember_gpus()
            opening.begin(folder)
            try:
                yield Launch(app, opening.overrides_for(folder), without_hydra(composed), sweep=folder)
            finally:
                if not opening.begun and folder.holds_records_only():
                    folder.discard()
                    release(path)
    finally:
        remove_empty(created)
