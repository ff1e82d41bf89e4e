"""Small files and folders of a run: read with one-line errors, written atomically, and never through a link."""

import errno
import functools
import json
import logging
import os
import re
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from grpo.config.errors import ConfigError, FileError, first_line
from grpo.config.migrations import Migration, migrate
from grpo.config.reading import check_levels, read_file

logger = logging.getLogger(__name__)
DISK_ERRORS = (errno.EIO, errno.ENOSPC, errno.EDQUOT)  # of fsync: what was written is not on the disk


def short_path(path: str | Path) -> Path:
    """The path, relative to the working directory if it is below it."""
    path = Path(path)
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def read_json(file: Path, types: Mapping[str, Any] = MappingProxyType({})) -> dict:
    """Read a JSON object from a file. Raises FileError, with the file's name, if the content is anything else.

    types: name -> type of the value, if it is present, as an annotation such as `list[str] | None`.
    """
    record = _parsed(read_file(file), f"{file} is")
    check_record(record, types, str(file))
    return record


def read_dataclass(kind: type, file: Path, steps: tuple[Migration, ...] = ()) -> Any:
    """Read a dataclass from a JSON file. Raises FileError, with the file's name, if the content does not fit.

    steps: the migrations for a file with a version.
    """
    record = read_json(file)
    if steps:
        record = migrate(record, file, steps)
    check_record(record, get_type_hints(kind), str(file))
    try:
        return kind(**record)
    except TypeError as error:  # a key is missing or unknown
        raise FileError(f"{file}: {first_line(error)}") from error


def _parsed(text: bytes, where: str) -> Any:
    """The JSON value of a text. Raises FileError. where: the beginning of its message."""
    try:
        value = json.loads(text)
        if re.search(rb"\\u[dD][89a-fA-F]", text):  # half a character, which cannot be written to a file
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:  # also bytes that are not UTF-8
        raise FileError(f"{where} not valid JSON: {error}") from error
    return value


def check_record(record: Any, types: Mapping[str, Any], where: str, needed: Iterable[str] = ()) -> None:
    """Raise FileError if a value read from JSON is not an object, or if a value in it does not have its type.

    where: the file, and the line if it has several records. needed: names that must not be missing.
    """
    if not isinstance(record, dict):
        raise FileError(f"{where}: not a JSON object")
    check_levels(record, where)
    if missing := [name for name in needed if name not in record]:
        raise FileError(f"{where}: {missing[0]} is missing")
    for name in types.keys() & record.keys():
        if not _is_of(record[name], types[name]):
            raise FileError(f"{where}: {name} is {str(record[name])[:80]}, which is not valid here")


def _is_of(value: Any, annotation: Any) -> bool:
    """Whether a value read from JSON has the type of an annotation. A tuple is a list there."""
    kind = get_origin(annotation) or annotation
    inner = get_args(annotation)
    if kind is UnionType:
        return any(_is_of(value, each) for each in inner)
    if kind is Any:
        return True
    if kind is tuple:
        return isinstance(value, list) and len(value) == len(inner) and all(map(_is_of, value, inner))
    if kind in (int, float):  # a boolean is no number; numpy and pandas have no larger numbers
        return (type(value) is int and -(2**63) <= value < 2**63) or (type(value) is float and kind is float)
    if not isinstance(value, kind):
        return False
    children = value.values() if kind is dict else value if kind is list else ()
    return not inner or all(_is_of(child, inner[-1]) for child in children)


def check_contents(folder: Path) -> None:
    """Raise ConfigError if a run folder has a link that points outside of it, a pipe, or a device.

    Files would be written to another place, or reading would never end.
    """
    inside = os.path.realpath(folder)
    for place, folders, files in os.walk(folder):
        for path in (Path(place, name) for name in (*folders, *files)):
            try:
                mode = path.lstat().st_mode
            except FileNotFoundError:  # a temporary file of a run in progress
                continue
            if stat.S_ISLNK(mode) and not Path(os.path.realpath(path)).is_relative_to(inside):
                raise ConfigError(
                    f"{path} is a link to {path.readlink()}, outside of {folder}; "
                    "replace it by a copy of that, or delete it"
                )
            if not (stat.S_ISLNK(mode) or stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise ConfigError(f"{path} is a pipe, a socket or a device, which no run writes; delete it")
        if "wandb" in folders and (Path(place) == Path(folder) or "config.yaml" in files):
            folders.remove("wandb")  # W&B's folder has links to its own logs; the suite writes nothing there


def check_files(folder: Path) -> None:
    """Raise ConfigError if a folder contains a pipe or a device, or a link to one: reading it would never end."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise ConfigError(f"{path} is neither a file nor a folder; delete it")


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
    try:
        with temporary.open("xb") as stream:  # x: does not follow a link
            stream.write(content.encode() if isinstance(content, str) else content)
            stream.flush()
            flush_to_disk(stream.fileno())
        temporary.replace(file)
    except OSError:
        with suppress(OSError):
            temporary.unlink()  # it may be what filled the disk
        raise
    sync(file.parent)


def commit_folder(folder: Path, target: Path) -> None:
    """Rename a complete folder to `target`, replacing what exists there, and sync it to disk.

    A folder cannot replace another one in a single step. The old one is therefore first renamed to `.<name>.replaced`,
    a name that users would not choose, from which `restore_replaced` can restore it.
    """
    follow_umask(folder)
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


def follow_umask(folder: Path) -> None:
    """Give the weights in a folder the mode of other new files; safetensors makes them readable only by their owner.

    Not those that a fork shares with its parent.
    """
    probe = folder / ".mode"
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    for file in (each for each in folder.glob("*.safetensors") if each.stat().st_nlink == 1):
        with suppress(PermissionError):  # some file systems have no modes
            file.chmod(mode)


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk, if its file system can do that."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError as error:
        if not path.is_dir():
            raise
        _warn_of_fsync(error.strerror)
        return
    try:
        flush_to_disk(descriptor)
    finally:
        os.close(descriptor)


def flush_to_disk(descriptor: int) -> None:
    """Flush an open file to disk. Network shares and FUSE may refuse that: then a warning is logged, once."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno in DISK_ERRORS:
            raise
        _warn_of_fsync(error.strerror)


@functools.cache  # so that it is logged once
def _warn_of_fsync(reason: str) -> None:
    text = "fsync does not work in this folder (%s); the run continues, but a power failure may damage its newest files"
    logger.warning(text, reason)


def read_lines(file: Path, types: Mapping[str, Any] = MappingProxyType({}), needed: Iterable[str] = ()) -> list[dict]:
    """Read a file of one JSON object per line. An incomplete last line, left by a crash, is ignored.

    Raises FileError, with the file's name and the line number, if any other line is not an object. types: see
    `read_json`; needed: names that each line must have.
    """
    lines = read_file(file).split(b"\n")[:-1] if os.path.lexists(file) else []
    rows = []
    for number, line in enumerate(lines, start=1):
        row = _parsed(line, f"{file}, line {number}:")
        check_record(row, types, f"{file}, line {number}", needed)
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
