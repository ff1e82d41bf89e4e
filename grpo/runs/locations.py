"""Where runs are stored: the folder of new runs, reserving a folder, finding runs, and the names of jobs."""

import hashlib
import os
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from grpo.config.errors import ConfigError, FileError
from grpo.runs.files import discard, short_path
from grpo.runs.folder import BEFORE_START, RunFolder
from grpo.runs.lock import in_use


def outputs() -> Path:
    """The folder of new runs: $GRPO_OUTPUTS if set, else outputs/.

    outputs/ is in the repository if grpo runs from a checkout, else in the working directory.
    """
    given = os.environ.get("GRPO_OUTPUTS")
    checkout = Path(__file__).resolve().parents[2]
    root = checkout if (checkout / "launch.py").exists() else Path.cwd()
    return short_path(Path(given) if given else root / "outputs")


def reserve(wanted: Path, suffix: bool) -> tuple[Path, list[Path]]:
    """Create a folder that no other launch uses. Returns it, and all folders that were created, parents included.

    suffix: whether to append a number if the folder exists, since two launches may start in the same second. Otherwise
    an existing folder is returned.
    """
    missing = [each for each in wanted.parents if not each.exists()]
    path = wanted
    number = 1
    while True:
        try:
            path.mkdir(parents=True)
            return path, [path, *missing]
        except FileExistsError:
            if not suffix:
                return path, []
            number += 1
            path = wanted.with_name(f"{wanted.name}_{number}")
        except OSError as error:
            remove_empty(missing)
            raise ConfigError(f"{path} cannot be created ({error.strerror}); choose another folder") from error


def release(path: Path) -> None:
    """Remove from a folder what a launch writes before its run starts. Only for the process that holds it."""
    for name in BEFORE_START:
        with suppress(OSError):  # for example on a mounted disk
            discard(path / name)


def remove_empty(folders: Iterable[Path]) -> None:
    """Remove those of the folders that are empty."""
    for folder in folders:
        with suppress(OSError):  # another launch may have put something there
            folder.rmdir()


def run_folders(root: Path) -> list[RunFolder]:
    """Every run folder at or below `root`, oldest first by the time of its config."""
    return [
        RunFolder(file.parent) for file in sorted(root.rglob("config.yaml"), key=_started_at) if _is_run(file.parent)
    ]


def newest_unfinished(root: Path) -> RunFolder | None:
    """The run started last, at or below `root`, among the unfinished runs that can be resumed.

    Skipped are runs in progress, jobs of sweeps (they are resumed with their sweep), and folders that cannot be read
    or have an interpolation in their path.
    """
    return next((run for run in reversed(run_folders(root)) if _can_resume(run, root)), None)


def has_interpolation(folder: Path) -> bool:
    """Whether Hydra would insert other values into the path of a folder, such as environment variables."""
    return "${" in str(folder.absolute())


def _can_resume(run: RunFolder, root: Path) -> bool:
    if has_interpolation(run.path):
        return False
    if any((folder / "sweep.json").exists() for folder in run.path.parents if folder.is_relative_to(root)):
        return False
    try:
        return not run.finished() and not in_use(run.path)
    except FileError:  # a launch with this folder as run_dir reports the error
        return False


def job_folder_name(number: int, overrides: str, longest: int = 80) -> str:
    """The folder name of a sweep's job: `<number>_<overrides>` without `=`, `,` and `/`; if long, it ends in a hash."""
    name = f"{number}_{re.sub(r'[^A-Za-z0-9._+-]+', '_', overrides)}".rstrip("_")
    if len(name) <= longest:
        return name
    return f"{name[: longest - 9]}_{hashlib.sha256(overrides.encode()).hexdigest()[:8]}"


def hydra_record(folder: str, now: str) -> str:
    """The subfolder for Hydra's record of a launch. The record of the first launch is not overwritten."""
    return f".hydra/resumes/{now}" if RunFolder(folder).started() else ".hydra"


def _is_run(folder: Path) -> bool:
    return (folder / "status.json").exists()


def _started_at(file: Path) -> float:
    return file.stat().st_mtime
