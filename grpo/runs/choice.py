"""Decide what a launch does with a run folder: start a new run, resume it, or nothing if it has finished."""

from pathlib import Path

from grpo.config.command_line import arguments_in_shell, path_override
from grpo.config.errors import ConfigError
from grpo.config.overrides import Overrides
from grpo.config.schema import MORE_STEPS
from grpo.runs.files import check_contents
from grpo.runs.folder import BEFORE_START, COPIED_BY_FORK, RunFolder
from grpo.runs.lock import left_by_us

# With one of these keys changed, a run that has finished can be trained further.
TRAIN_FURTHER = MORE_STEPS | {"target.accuracy", "target.stop"}
OF_JOB = ("console.log", "status.json")  # further files of a job of a sweep before its run starts


def choose_run(run: RunFolder, resume: bool | str, overrides: Overrides) -> str:
    """Return "fresh" (start a new run), "resume", or "done" (the run has finished).

    resume: False, True, or "auto" (resume if there is something to resume, else start). Raises ConfigError if this
    launch would damage an existing run, or has nothing to resume.
    """
    path = run.path
    if path.exists() and not path.is_dir():
        raise ConfigError(f"{path} is not a folder; choose another one")
    if not resume:
        if run.started():
            raise ConfigError(
                f"{path} already contains a run; resume it: resume=true "
                f"{arguments_in_shell(path_override('run_dir', path))}, or choose another run_dir"
            )
        return "fresh"
    check_contents(path)
    if resume == "auto" and not run.started():
        return "fresh"
    if not path.exists():
        raise ConfigError(
            f"resume=true: there is no folder {path}; leave run_dir out to take the newest unfinished run"
        )
    if not any(path.iterdir()):
        raise ConfigError(f"resume=true: {path} is empty; start a run there without resume=true")
    if not run.started():
        raise ConfigError(f"resume=true: {path} is not a run folder (it has no config.yaml)")
    if run.finished() and not overrides.names(*TRAIN_FURTHER):
        if resume is True:
            raise ConfigError(has_finished(run))
        return "done"
    return "resume"


def has_finished(run: RunFolder) -> str:
    """The error message for resuming a run that has finished."""
    status = run.status()
    at_target = status.get("step", 0) < status.get("total_steps", 0)
    how = "target.stop=false" if at_target else "a larger grpo.num_steps"
    return f"resume=true: {run.path} has finished already; to train it further, add {how}"


def check_empty(path: Path, fork: bool = False, job: bool = False) -> None:
    """Raise ConfigError if a folder is not empty, and therefore cannot be used for a new run.

    Files of a launch that was killed before its run started are accepted. fork: whether the new run is a fork; accept
    what an earlier attempt copied. job: whether it is a job of a sweep; accept what Hydra, the launcher, and an earlier
    attempt that was refused have written.
    """
    if not path.exists():
        return
    if RunFolder(path).has_trained():
        raise ConfigError(f"{path} has lost the config.yaml of its run; restore that, or choose another folder")
    found = sorted(each.name for each in path.iterdir())
    left: tuple[str, ...] = ()
    if job or left_by_us(path):
        left = (*BEFORE_START, *(COPIED_BY_FORK if fork else ()), *(OF_JOB if job else ()))
    foreign = [name for name in found if name not in left and not _is_empty_folder(path / name)]
    if foreign:
        raise ConfigError(f"{path} is not empty (it holds {foreign[0]}); choose a new or an empty folder")
    check_contents(path)


def _is_empty_folder(path: Path) -> bool:
    """Whether a path is an empty folder, such as a separate disk mounted for the checkpoints of a run."""
    return path.is_dir() and not path.is_symlink() and not any(path.iterdir())


def check_parent(parent: str | None) -> None:
    """Raise ConfigError if `parent` is not a run to fork from."""
    if not parent:
        raise ConfigError("fork=true needs the run to start from: run_dir=outputs/...")
    if not RunFolder(parent).started():
        raise ConfigError(f"fork=true: {parent} is not a run folder (it has no config.yaml)")
    check_contents(Path(parent))
