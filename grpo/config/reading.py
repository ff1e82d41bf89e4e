"""Read files that may be damaged or come from someone else: regular files only, with bounds and one-line errors."""

import stat
from pathlib import Path
from typing import Any

import yaml

from grpo.config.errors import FileError, first_line

MOST_BYTES = 2**29  # of a file that is read into memory as a whole
MOST_YAML_BYTES = 2**18  # the parser takes seconds for that much
MOST_LEVELS = 32  # of nested lists and objects; recursive functions fail at some hundred


def read_file(file: Path, most: int = MOST_BYTES) -> bytes:
    """The content of a regular file of at most `most` bytes.

    Raises FileError for anything else: a pipe or a device may block its reader or never end.
    """
    try:
        found = file.stat()
    except OSError as error:  # missing, a link that leads nowhere, no permission
        raise FileError(f"{file} cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(found.st_mode):
        raise FileError(f"{file} is not a file; remove it or restore the file")
    if found.st_size > most:
        raise FileError(f"{file} has {found.st_size} bytes, and at most {most} are read; restore the file")
    return file.read_bytes()


def check_levels(values: Any, where: str) -> None:
    """Raise FileError if lists and dicts are nested more than MOST_LEVELS deep. where: the file."""
    if _is_deeper(values, MOST_LEVELS):
        raise FileError(f"{where} is nested more than {MOST_LEVELS} levels deep")


def _is_deeper(node: Any, levels: int) -> bool:
    children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    return any(levels == 0 or _is_deeper(child, levels - 1) for child in children if isinstance(child, dict | list))


class _Loader(yaml.SafeLoader):
    """Creates no Python objects, and refuses aliases, with which a small file can expand to any size."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"it has an alias, *{self.peek_event().anchor}; write the value itself")
        return super().compose_node(parent, index)


def read_yaml(file: Path, kind: type) -> Any:
    """Read a YAML file. Raises FileError, with the file's name, if the content is not of `kind`, dict or list."""
    content = read_file(file, MOST_YAML_BYTES)
    try:
        values = yaml.load(content.decode(), _Loader)
    except Exception as error:  # the parser's own errors, and KeyError, OverflowError and others of its constructors
        raise FileError(f"{file} is not valid YAML: {first_line(error)}") from error
    if not isinstance(values, kind):
        what = "a mapping from keys to values" if kind is dict else "a list"
        raise FileError(f"{file} is {'empty' if values is None else 'damaged'}: it must hold {what}")
    check_levels(values, str(file))
    return values
