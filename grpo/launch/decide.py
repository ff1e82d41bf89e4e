"""Decide and check what a command line asks for, before Hydra starts and before anything is written to disk."""

import argparse
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from grpo.algorithm.objective import check_choices
from grpo.config.checks import check_name, typed
from grpo.config.errors import ConfigError
from grpo.config.hydra_app import Application, without_hydra
from grpo.config.instantiate import check_importable
from grpo.config.objective_checks import check_unused_overrides, unused_overrides
from grpo.config.overrides import Overrides, quoted, text_of
from grpo.config.schema import Config
from grpo.launch.machine import check_machine
from grpo.launch.plan import print_plan
from grpo.rewards.isolated import check_isolated, isolated_functions
from grpo.runs.choice import check_empty, check_parent, choose_run
from grpo.runs.files import short_path
from grpo.runs.folder import RunFolder
from grpo.runs.gpu_queue import LOCAL_LAUNCHERS, remember_gpus
from grpo.runs.locations import has_interpolation, newest_unfinished, outputs, release, remove_empty, reserve
from grpo.runs.lock import locked
from grpo.runs.sweep_folder import SweepFolder
from grpo.sweeps.opening import prepare_sweep

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Launch:
    """A launch that passed every check: the input for Hydra, and the folder, which this process has locked."""

    app: Application
    overrides: list[str]  # passed to Hydra
    config: DictConfig  # as composed, without the `hydra` part; for a sweep, what its jobs have in common
    run: RunFolder | None = None  # the folder of a single run
    sweep: SweepFolder | None = None  # the folder of a sweep


@contextmanager
def decide(flags: argparse.Namespace) -> Iterator[Launch | int]:
    """Decide on the launch that the flags ask for, and hold its folder within the block.

    Yields the exit code if there is nothing to launch: after plan=true 0, or 1 if a run does not fit into memory; 0 if
    the run has already finished. Raises ConfigError or Hydra's exceptions for a command line or config that cannot
    work. Nothing is left on disk then.
    """
    app = Application(flags)
    overrides = with_fork_step(Overrides(flags.overrides))
    composed, is_sweep = app.compose(overrides.lines, flags.multirun)
    if not is_sweep:
        checked = check_runnable(without_hydra(composed), overrides)
        if composed.fork and composed.resume:
            raise ConfigError("fork=true starts a new run: leave resume out; to resume a fork, name its own run_dir")
        if overrides.names("sweep_dir", "hydra.sweep.dir"):
            raise ConfigError("sweep_dir names the folder of a sweep: add -m, or name that of a run with run_dir=...")
        _log_unused([(checked, overrides)])
    if composed.plan:
        yield 0 if print_plan(composed, overrides, is_sweep, check_runnable) else 1
    elif is_sweep:
        with hold_sweep(app, composed, overrides) as launch:
            yield launch
    else:
        with hold_run(app, composed, overrides) as launch:
            yield launch


def with_fork_step(overrides: Overrides) -> Overrides:
    """Replace `checkpoint=` of a fork, which the commands have as well, by `fork_step=`. Raises ConfigError."""
    lines = []
    for key, line in zip(overrides.keys, overrides, strict=True):
        is_choice = key == "checkpoint" and not text_of(line).startswith("{")
        if is_choice and not overrides.value("fork"):
            raise ConfigError(f"{line} is for fork=true; to set when checkpoints are saved: checkpoint.every=...")
        lines.append(f"fork_step={text_of(line)}" if is_choice else line)
    return Overrides(lines)


def check_runnable(config: DictConfig, overrides: Overrides) -> Config:
    """Convert the config of one run to dataclasses. Raises ConfigError if it cannot run on any machine."""
    checked = typed(config)
    check_unused_overrides(checked, overrides)
    isolated = isolated_functions(checked)
    check_importable(checked, without=isolated)
    check_isolated(isolated)
    check_choices(checked.objective)
    if checked.fork:
        check_parent(checked.run_dir)
    return checked


def _log_unused(points: Sequence[tuple[Config, Overrides]]) -> None:
    """Log each note about overrides without effect once; a fork logs those of its own config."""
    notes = [note for config, overrides in points if not config.fork for note in unused_overrides(config, overrides)]
    for note in dict.fromkeys(notes):
        logger.warning(note)


@contextmanager
def hold_run(app: Application, composed: DictConfig, overrides: Overrides) -> Iterator[Launch | int]:
    """Choose, reserve and lock the folder of a single run. Yields 0 if the run has already finished."""
    config = without_hydra(composed)
    run = known_folder(config, named_folder(composed.hydra.run, "${run_dir}"))
    if run is None:
        wanted = outputs() / run_name(config, overrides) / f"{datetime.now():%Y-%m-%d_%H-%M-%S}"
        check_no_interpolation(wanted)
        holding = reserved(wanted, suffix=True)
    else:
        check_no_interpolation(run.path)
        chosen = choose_run(run, config.resume, overrides)
        if chosen == "done":
            print(f"{run.path} has finished already: nothing to do")
            yield 0
            return
        if chosen == "resume":
            run.frozen_config()  # raises FileError here, before anything is written, if it cannot be read
            holding = locked(run.path)
        else:
            check_empty(run.path, config.fork)
            holding = reserved(run.path, suffix=False)
    with holding as path:
        own = f"hydra.run.dir={quoted(str(path))}"
        yield Launch(app, [*overrides.without({"hydra.run.dir"}), own], config, run=RunFolder(path))


def check_no_interpolation(folder: Path) -> None:
    """Raise ConfigError for a path in which Hydra would insert other values, such as environment variables."""
    if has_interpolation(folder):
        raise ConfigError(f"{folder.absolute()}: the path of a run or sweep must not contain ${{; choose another one")


def named_folder(place: DictConfig, default: str) -> str | None:
    """The folder of hydra.run or hydra.sweep (`place`), if the user has set it; None for the default of conf/."""
    written: Any = OmegaConf.to_container(place, resolve=False)  # a dict
    return None if written["dir"] == default else str(place.dir)


def known_folder(config: DictConfig, named: str | None = None) -> RunFolder | None:
    """The folder that the user has set, or with `resume` the newest unfinished run; None if a new folder is needed.

    named: the folder set by hydra.run.dir, or None. The run_dir of a fork is ignored, since it is the parent's folder.
    """
    path = named or (None if config.fork else config.run_dir)
    if path is not None:
        return RunFolder(short_path(path))
    if not config.resume or config.fork:
        return None
    # `auto` is for repeating the same command, for example by a job queue, so only runs of the same name are searched.
    found = newest_unfinished(outputs() / config.name if config.resume == "auto" else outputs())
    if found is None and config.resume is True:
        raise ConfigError(
            f"resume=true: no unfinished run below {outputs()}/; name one with run_dir=..., or start without resume"
        )
    return found


def run_name(config: DictConfig, overrides: Overrides) -> str:
    """The name of a new run. A fork has the name of its parent, unless the command line sets one."""
    if not config.fork or overrides.names("name"):
        return config.name
    name = RunFolder(config.run_dir).frozen_config().name
    check_name(name)
    return name


@contextmanager
def reserved(wanted: Path, suffix: bool) -> Iterator[Path]:
    """Create and lock the folder of a new run within the block, and remove it afterwards if no run started in it.

    suffix: append a number to the name if the folder exists.
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
                # Done within the lock, since only the process that holds the folder may remove files.
                if not run.started() and not run.has_trained():
                    release(path)
    finally:
        remove_empty(created)


@contextmanager
def hold_sweep(app: Application, composed: DictConfig, overrides: Overrides) -> Iterator[Launch]:
    """Choose, reserve and lock the folder of a sweep, and write its sweep.json.

    If Hydra rejects a new sweep before a launcher has received a job, the folder and sweep.json are removed again.
    """
    named = composed.sweep_dir or named_folder(composed.hydra.sweep, "${sweep_dir}")
    points: list[tuple[Config, Overrides]] = []

    def check(config: DictConfig, of_point: Overrides) -> Config:
        points.append((check_runnable(config, of_point), of_point))
        return points[-1][0]

    opening = prepare_sweep(composed, overrides, named, check)
    _log_unused(points)
    check_no_interpolation(opening.folder.path)
    if composed.hydra.launcher._target_ in LOCAL_LAUNCHERS:
        check_machine(opening.configs, opening.unknown)
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
