"""Explain errors of Hydra and OmegaConf to the user: what is wrong with the input, and the fix."""

import difflib
import re
from collections.abc import Sequence

from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from grpo.config.command_line import arguments_in_shell, launch_command, override
from grpo.config.compose import compose_config
from grpo.config.errors import ConfigError, first_line
from grpo.config.other_names import NOT_SUPPORTED, OTHER_NAMES
from grpo.config.paths import CONF_DIR
from grpo.config.values import flatten

NAMED_BY_USER = ("data.template_arguments", "reward.components")  # the user chooses the names of the keys in these
HUB_KEYS = {"model": "model.name", "data": "data.path"}  # group -> its key for a hub name or a folder
EXTRA_PLUGINS = ("joblib", "optuna", "ray", "submitit_local", "submitit_slurm")  # installed with the extra [sweeps]

# Prefixes of Hydra errors that give the override only in their message.
MERGING = "Error merging override "
AMBIGUOUS = "Ambiguous value for argument "


def explain(error: Exception) -> str:
    """One or two lines for the user: what is wrong with the input, and the fix."""
    cause: BaseException | None = error
    while cause is not None:  # Hydra and OmegaConf wrap exceptions, not always with `raise ... from`
        if isinstance(cause, ConfigError):
            return str(cause).strip()
        if isinstance(cause, MissingConfigException):
            missing = cause.missing_cfg_file or ""
            if cause.options or missing.startswith("hydra/"):
                return unknown_choice(missing, cause.options or ())
        if isinstance(cause, ConfigKeyError | ConfigAttributeError) and cause.full_key:
            typed = re.match(r"Could not override '([^']+)'", str(error))  # also the parts below an unknown first one
            below = typed is not None and typed[1].startswith(f"{cause.full_key}.")
            return unknown_key(typed[1] if typed and below else cause.full_key)
        cause = cause.__cause__ or cause.__context__
    if isinstance(error.__cause__, OmegaConfBaseException) and not str(error):  # Hydra's wrapper has no message
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if lines[0].startswith(MERGING):
        return f"{lines[0].removeprefix(MERGING)}: {first_line(error.__cause__ or error)}"
    if lines[0].startswith(AMBIGUOUS):
        override = lines[0].removeprefix(AMBIGUOUS)[1:-1]
        return f"{override} names several values: for one run of each add -m, for a list write key=[a,b]"
    if isinstance(error, OverrideParseException):
        return f"{error.override}: {lines[0]}. {lines[-1]}"
    if isinstance(error, OmegaConfBaseException) and error.full_key:
        return f"{error.full_key}: {lines[0]}"
    return " ".join(lines[:2])


def unknown_key(key: str) -> str:
    """The message for a key that does not exist: its name in this suite, or the most similar keys."""
    last_part = key.rsplit(".", 1)[-1]
    other = OTHER_NAMES.get(key) or OTHER_NAMES.get(last_part)
    if other and other.lstrip("+") != key:
        return f"there is no key '{key}'; here it is called {other}"
    if key.rpartition(".")[0] in NAMED_BY_USER:
        return f"there is no key '{key}' yet; to add it, write +{key}=..."
    reason = NOT_SUPPORTED.get(last_part)
    if reason:
        return f"{key} is not supported: {reason}"
    known = sorted(flatten(compose_config([])))
    groups = sorted(p.name for p in CONF_DIR.iterdir() if p.is_dir())
    near = difflib.get_close_matches(key, known + groups, n=3, cutoff=0.6)
    near += [k for k in known if k.rsplit(".", 1)[-1] == last_part and k not in near]
    similar = f"did you mean {' or '.join(near[:3])}?"
    hint = similar if near else f"`{launch_command('--cfg', 'job')}` prints every key"
    return f"there is no key '{key}'; {hint}"


def unknown_choice(path: str, options: Sequence[str]) -> str:
    """The message for a choice that does not exist in its group, such as hardware/a100 or hydra/launcher/ray."""
    parts = path.split("/", 2 if path.startswith("hydra/") else 1)
    group = "/".join(parts[:-1])
    choice = parts[-1]
    if "/" in choice and group in HUB_KEYS:
        right = arguments_in_shell(override(HUB_KEYS[group], choice))
        return f"{group}= chooses a file of conf/{group}/; for a hub name or a folder give {right}"
    if group.startswith("hydra/") and choice in EXTRA_PLUGINS:
        return f"{group}={choice} needs: pip install -e '.[sweeps]'"
    near = difflib.get_close_matches(choice, options, n=1)
    hint = f" Did you mean {group}={near[0]}?" if near else ""
    return f"there is no {group}={choice}; choose one of {', '.join(options)}.{hint}"
