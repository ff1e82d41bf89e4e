"""Small files and folders of a run: read with one-line errors, written atomically, and never through a link."""

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
    """The path, relative to the working directory if it is below it."""
    path = Path(path)
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def read_json(file: Path, types: Mapping[str, Any] = MappingProxyType({})) -> dict:
    """Read a JSON object from a file. Raises FileError, with the file's name, if the content is anything else.

    types: name -> type of the value, if it is present, as an annotation such as `float | None`.
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
    """Read a dataclass from a JSON file. Raises FileError, with the file's name, if the content does not fit.

    steps: the migrations for a file with a version.
    """
    record = read_json(file)
    if steps:
        record = migrate(record, file, steps)
    _check_types(record, get_type_hints(kind), file)
    try:
        return kind(**record)
    except TypeError as error:  # a key is missing or unknown
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
    """Raise ConfigError if a link points outside of a run folder: files would be written to another place."""
    inside = os.path.realpath(folder)
    for place, folders, files in os.walk(folder):
        for path in (Path(place, name) for name in (*folders, *files)):
            if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(inside):
                raise ConfigError(
                    f"{path} is a link to {path.readlink()}, outside of {folder}; "
                    "replace it by a copy of that, or delete it"
                )
        if "wandb" in folders and (Path(place) == Path(folder) or "config.yaml" in files):
            folders.remove("wandb")  # W&B's folder has links to its own logs; the suite writes nothing there


def no_link(path: str, flags: int) -> int:
    """An opener for `open` that raises OSError if the file is a symbolic link, which may point anywhere."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def discard(path: Path) -> None:
    """Remove a file, a folder with its content, or a link but not its target, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_atomic(file: Path, content: str | bytes) -> None:
    """Write a small file atomically. If `file` is a link, the link is replaced, not its target."""
    temporary = file.with_name(file.name + ".tmp")
    if temporary.is_symlink() or not temporary.is_dir():  # a folder of this name causes an error below
        temporary.unlink(missing_ok=True)
    with temporary.open("xb") as stream:  # x: does not follow a link
        stream.write(content.encode() if isinstance(content, str) else content)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(file)
    sync(file.parent)


def commit_folder(folder: Path, target: Path) -> None:
    """Rename a complete folder to `target`, replacing what exists there, and sync it to disk.

    A folder cannot replace another one in a single step. The old one is therefore first renamed to `.<name>.replaced`,
    a name that users would not choose, from which `restore_replaced` can restore it.
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
    """Clean up after a killed `commit_folder`: restore the old folder, or remove it if the new one is in place.

    Only for the process that holds the run folder.
    """
    old = target.with_name(f".{target.name}.replaced")
    if os.path.lexists(target):
        discard(old)
    elif os.path.lexists(old):
        old.rename(target)


def step_of(path: Path) -> int:
    """The step in the name of a checkpoint or samples file. (Beyond 999,999, sorting names does not sort steps.)"""
    return int(path.stem.removeprefix("step_"))


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_lines(file: Path) -> list[dict]:
    """Read a file of one JSON object per line. An incomplete last line, left by a crash, is ignored.

    Raises FileError, with the file's name and the line number, if any other line is not an object.
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
    """Log disk errors within the block as warnings.

    For files that a run can do without: a full disk or a damaged file must neither end a run nor hide the error that
    ended it.
    """
    try:
        yield
    except (OSError, FileError) as error:
        logger.warning("%s could not be written: %s", what, error)
