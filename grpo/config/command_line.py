"""Write commands and arguments that a user can paste into a shell in any directory.

All commands that the project prints are written here: quoted for the shell, also for Hydra if it parses them, and with
absolute paths.
"""

import os
import re
import shlex
from pathlib import Path

from hydra.errors import HydraException

from grpo.config.overrides import Overrides, quoted
from grpo.config.paths import LAUNCH


def launch_command(*arguments: str) -> str:
    """The command for a launch with these arguments, such as those from `override`."""
    return shlex.join([*LAUNCH, *arguments])


def grpo_command(name: str, *arguments: str) -> str:
    """The command `python -m grpo <name>` with these arguments."""
    return shlex.join(["python", "-m", "grpo", name, *arguments])


def arguments_in_shell(*arguments: str) -> str:
    """Arguments to add to a command."""
    return shlex.join(arguments)


def override(key: str, value: object) -> str:
    """The override that sets a key to exactly this value: None, a bool, a number, text, or a list or dict of them."""
    return f"{key}={_in_hydra(value)}"


def path_override(key: str, path: str | Path) -> str:
    """The override that sets a key to a path, as absolute path."""
    return override(key, os.path.abspath(path))


def path_argument(key: str, path: str | Path) -> str:
    """A path as an argument of `python -m grpo`, whose commands take run_dir, sweep_dir and output_dir literally."""
    return f"{key}={os.path.abspath(path)}"


def _in_hydra(value: object) -> str:
    """A value in the grammar of Hydra's overrides."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_in_hydra(child)}" for key, child in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(_in_hydra(child) for child in value) + "]"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    text = str(value)
    return text if isinstance(value, int | float) or _is_plain(text) else quoted(text)


def _is_plain(text: str) -> bool:
    """Whether Hydra reads this text as itself without quotes, and not as a number, true or null."""
    if not re.fullmatch(r"[A-Za-z0-9_./-]+", text):
        return False
    try:
        return Overrides([f"key={text}"]).value("key") == text
    except HydraException:
        return False
