"""Small files and folders of a run: read in one line of error, written whole, and never through a link."""

import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from grpo.config.errors import ConfigError, FileError, first_line
from grpo.config.migrations import Migration, migrate

logger = logging.getLogger(__name__)


def short_path(path: str | Path) -> Path:
    """The path as a person would type it: relative where it lies below the working directory."""
    path = Path(path)
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def read_json(file: Path, types: Mapping[str, Any] = MappingProxyType({})) -> dict:
    """A JSON object from a file. Raises FileError naming the file if it holds anything else.

    types: by name what a value must be where there is one, as an annotation such as `float | None`.
    """
    try:
        record = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise FileError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(record, dict):
        raise FileError(f"{file} is not a JSON object")
    _check_types(record, types, file)
    return record


def read_dataclass(kind: type, file: Path, steps: tuple[Migration, ...] = ()) -> Any:
    """A dataclass from the JSON object in a file. Raises FileError naming the file where it does not fit.

    steps: the migrations of a file that has versions.
    """
    record = read_json(file)
    if steps:
        record = migrate(record, file, steps)
    _check_types(record, get_type_hints(kind), file)
    try:
        return kind(**record)
    except TypeError as error:  # a key is missing, or is not one of its own
        raise FileError(f"{file}: {first_line(error)}") from error


def _check_types(record: dict[str, Any], types: Mapping[str, Any], file: Path) -> None:
    for name in types.keys() & record.keys():
        if not _is_of(record[name], types[name]):
            raise FileError(f"{file}: {name} is {str(record[name])[:80]}, which is not valid here")


def _is_of(value: Any, annotation: Any) -> bool:
    allowed = get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)
    classes = tuple(get_origin(each) or each for each in allowed)
    return isinstance(value, classes) or (float in classes and isinstance(value, int))


def check_links(folder: Path) -> None:
    """Raise ConfigError where a link leads out of a run folder: what is written there would land elsewhere."""
    inside = os.path.realpath(folder)
    for place, folders, files in os.walk(folder):
        for path in (Path(place, name) for name in (*folders, *files)):
            if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(inside):
                raise ConfigError(
                    f"{path} is a link to {path.readlink()}, outside of {folder}; "
                    "replace it by a copy of that, or delete it"
                )
        if "wandb" in folders and (Path(place) == Path(folder) or "config.yaml" in files):
            folders.remove("wandb")  # of a run: in it W&B links to its own logs; nothing of ours is written there


def no_link(path: str, flags: int) -> int:
    """An opener for `open`: raises OSError where the file is a link, which may lead anywhere."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def discard(path: Path) -> None:
    """Remove a file, a folder with all that is in it, or a link but not what it points to, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_atomic(file: Path, content: str | bytes) -> None:
    """Write a small file whole or not at all. Where there is a link, the file takes its place."""
    temporary = file.with_name(file.name + ".tmp")
    if temporary.is_symlink() or not temporary.is_dir():  # a folder is not ours, and is an error below
        temporary.unlink(missing_ok=True)
    with temporary.open("xb") as stream:  # x: never through a link
        stream.write(content.encode() if isinstance(content, str) else content)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(file)
    sync(file.parent)


def commit_folder(folder: Path, target: Path) -> None:
    """Give a complete folder its name, in place of what has it, such that it would outlast a power failure.

    No folder can replace another one in one step: what had the name is called `.<name>.replaced` meanwhile, for
    `restore_replaced`; a name that nobody would give a folder of their own.
    """
    for path in [*folder.iterdir(), folder]:
        sync(path)
    restore_replaced(target)
    old = target.with_name(f".{target.name}.replaced")
    if os.path.lexists(target):
        target.rename(old)
    folder.rename(target)
    sync(target.parent)
    discard(old)


def restore_replaced(target: Path) -> None:
    """After a killed `commit_folder`: give the old folder its name back, or remove it where the new one has it.

    For the process that holds the run folder.
    """
    old = target.with_name(f".{target.name}.replaced")
    if os.path.lexists(target):
        discard(old)
    elif os.path.lexists(old):
        old.rename(target)


def step_of(path: Path) -> int:
    """The step in the name of a checkpoint or of a file of samples; names do not sort by it beyond 999,999."""
    return int(path.stem.removeprefix("step_"))


def sync(path: Path) -> None:
    """Make sure that a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_lines(file: Path) -> list[dict]:
    """The JSON objects of a file, one per line; without what follows the last newline, which a crash has torn.

    Raises FileError naming file and line where any other line is no object.
    """
    lines = file.read_bytes().split(b"\n")[:-1] if file.exists() else []
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # also bytes that are not UTF-8
            raise FileError(f"{file}, line {number}: not valid JSON ({error})") from error
        if not isinstance(row, dict):
            raise FileError(f"{file}, line {number}: not a JSON object")
        rows.append(row)
    return rows


def json_lines(rows: Iterable[dict]) -> str:
    """The text of a file with one JSON object per line."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


@contextmanager
def disk_errors_are_warnings(what: str) -> Iterator[None]:
    """For what a run can do without: a full disk, or a damaged file, must neither end a run nor hide what ended it."""
    try:
        yield
    except (OSError, FileError) as error:
        logger.warning("%s could not be written: %s", what, error)
