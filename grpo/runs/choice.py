"""What a launch does with a run folder: start a new run, resume, or nothing, where it has finished."""

from pathlib import Path

from grpo.config.errors import ConfigError
from grpo.config.overrides import Overrides
from grpo.config.schema import MORE_STEPS
from grpo.runs.files import check_links
from grpo.runs.folder import BEFORE_START, COPIED_BY_FORK, RunFolder
from grpo.runs.lock import left_by_us

OF_JOB = ("console.log", "status.json")  # what a job of a sweep has beside them before its run starts


def choose_run(run: RunFolder, resume: bool | str, overrides: Overrides) -> str:
    """`fresh`, `resume` or `done`.

    resume: false | true | auto, which resumes if there is something to resume. Raises ConfigError where this launch
    would spoil the folder, or has nothing to resume.
    """
    path = run.path
    if path.exists() and not path.is_dir():
        raise ConfigError(f"{path} is not a folder; choose another one")
    if not resume:
        if run.started():
            raise ConfigError(
                f"{path} holds a run already; resume it: resume=true run_dir={path}, or choose another run_dir"
            )
        return "fresh"
    check_links(path)
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
    if run.finished() and not overrides.names(*MORE_STEPS):
        if resume is True:
            raise ConfigError(has_finished(run))
        return "done"
    return "resume"


def has_finished(run: RunFolder) -> str:
    """What to say where a run is to be resumed that has no steps left."""
    return f"resume=true: {run.path} has finished already; to train it further, add a larger grpo.num_steps"


def check_empty(path: Path, fork: bool = False, job: bool = False) -> None:
    """Raise ConfigError where a new run would be among files that are not of a launch that was killed before its start.

    fork: whether the new run is a fork, which may find what an earlier try of it had copied. job: whether it is a job
    of a sweep, for which Hydra and the launcher have written there already, as may an earlier try that was refused.
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


def _is_empty_folder(path: Path) -> bool:
    """Such as a disk of its own that is mounted for the checkpoints of a run."""
    return path.is_dir() and not path.is_symlink() and not any(path.iterdir())


def check_parent(parent: str | None) -> None:
    """Raise ConfigError where there is nothing to fork from."""
    if not parent:
        raise ConfigError("fork=true needs the run to start from: run_dir=outputs/...")
    if not RunFolder(parent).started():
        raise ConfigError(f"fork=true: {parent} is not a run folder (it has no config.yaml)")
    check_links(Path(parent))
