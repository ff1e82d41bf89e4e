"""Compose conf/ outside a launch, and apply the overrides of a command line to a frozen config."""

from collections.abc import Sequence
from pathlib import Path

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from grpo.config.errors import ConfigError
from grpo.config.overrides import Overrides, text_of
from grpo.config.paths import CONF_DIR
from grpo.config.schema import LAUNCH_KEYS
from grpo.config.values import copy_value, flatten

GLOBAL_GROUPS = ("experiment", "tuning")  # their files set keys of other groups
GROUPS_WITH_OTHER_KEYS = ("reward",)  # their files set keys of their own group, and perhaps of others


def compose_config(overrides: Sequence[str]) -> DictConfig:
    """Compose conf/config.yaml with these overrides, as `python launch.py` does."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return compose("config", list(overrides))


def apply_overrides(
    frozen: DictConfig, composed: DictConfig, overrides: Overrides, sources: Sequence[Path] = ()
) -> DictConfig:
    """Return a copy of a frozen config in which the overridden keys have their values from `composed`.

    An override of a group (hardware=cpu) replaces the whole group. Raises ConfigError for an override that is not a key
    or group of the config, such as experiment=..., which would silently change many keys. sources: the folders in which
    the files of experiment=, tuning= and reward= are found; with them, all keys and groups that such a file names are
    replaced, except for the name.
    """
    result = frozen.copy()
    for key, line in zip(overrides.dotted_keys, overrides, strict=True):
        if key in LAUNCH_KEYS:
            continue
        if sources and key in GLOBAL_GROUPS:
            for each in _named_in_file(key, text_of(line), sources):
                copy_value(composed, each, result)
            continue
        if OmegaConf.select(composed, key, default=None) is None and key not in flatten(composed):
            raise ConfigError(f"{line}: cannot be applied to an existing run folder; name the keys themselves")
        copy_value(composed, key, result)
        if sources and key in GROUPS_WITH_OTHER_KEYS and _is_global(key, text_of(line), sources):
            for each in _named_in_file(key, text_of(line), sources):
                if not each.startswith(f"{key}."):
                    copy_value(composed, each, result)
    return result


def _is_global(group: str, choice: str, sources: Sequence[Path]) -> bool:
    """Whether the file of a group also sets keys of other groups."""
    lines = _file(group, choice, sources).read_text(encoding="utf-8").splitlines()
    return ["#", "@package", "_global_"] in [line.split() for line in lines]


def _file(group: str, choice: str, sources: Sequence[Path]) -> Path:
    files = [source / group / f"{choice}.yaml" for source in sources]
    file = next((each for each in files if each.is_file()), None)
    if file is None:
        raise ConfigError(f"{group}={choice}: there is no file {group}/{choice}.yaml in the config folders")
    return file


def _named_in_file(group: str, choice: str, sources: Sequence[Path]) -> list[str]:
    """The dotted keys and groups that a file of `experiment` or `tuning` sets, except for the name and those of Hydra.

    Raises ConfigError if there is no such file.
    """
    if choice == "null":
        return []
    file = _file(group, choice, sources)
    values = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    named: list[str] = []
    for default in values.pop("defaults", []):
        if default == "_self_":
            continue
        if isinstance(default, str):  # another file of this group, or with a slash in front of its group, of any
            path, _, option = default.partition("@")[0].rpartition("/")
            path = path if default.startswith("/") else f"{group}/{path}"
            chosen = {path: option}
        else:
            chosen = default
        for path, option in chosen.items():
            words = path.removeprefix("optional ").removeprefix("override ")
            other = words.partition("@")[0].strip("/").replace("/", ".")
            choice = "null" if option is None else str(option)
            named += _named_in_file(other, choice, sources) if other in GLOBAL_GROUPS else [other]
    named += flatten(values) if values else []
    # An adapter is replaced as a whole, since a run may have none.
    named = ["model.lora" if key.startswith("model.lora.") else key for key in named]
    return [key for key in dict.fromkeys(named) if key != "name" and not f"{key}.".startswith("hydra.")]
