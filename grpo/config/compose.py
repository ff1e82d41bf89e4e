"""Compose conf/ outside a launch, and apply the overrides of a command line to a frozen config."""

import logging
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

logger = logging.getLogger(__name__)
GLOBAL_GROUPS = ("experiment", "tuning")  # their files set keys of other groups


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
    the files of experiment= and tuning= are found; with them, all keys and groups that such a file names are replaced,
    except for the name. With reward=..., the accuracy and the prompt of its file are taken over, too.
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
        if key == "reward":
            _copy_keys_of_reward(composed, text_of(line), sources or (CONF_DIR,), result)
    return result


def _copy_keys_of_reward(composed: DictConfig, choice: str, sources: Sequence[Path], result: DictConfig) -> None:
    """Copy the accuracy and the prompt that belong to another file of `reward`.

    Of an evaluation only the accuracy follows the reward in any case. The prompt does if the file sets it; otherwise
    the run keeps its own, with a warning if the accuracy is another one.
    """
    before = result.eval.accuracy
    copy_value(composed, "eval.accuracy", result)
    if "data.system_prompt" in _set_by_reward(choice, sources):
        copy_value(composed, "data.system_prompt", result)
    elif before != result.eval.accuracy:
        logger.warning("reward=%s: data.system_prompt stays; set it if the new reward is for another form", choice)


def _set_by_reward(choice: str, sources: Sequence[Path]) -> set[str]:
    """The keys that a file of `reward` sets, also those of the files of this group that it builds on."""
    files = [file for source in sources if (file := source / "reward" / f"{choice}.yaml").is_file()]
    if not files:  # in a folder of hydra.searchpath
        return set()
    values = yaml.safe_load(files[0].read_text(encoding="utf-8")) or {}
    named: set[str] = set()
    for default in values.pop("defaults", []):
        if isinstance(default, str) and default != "_self_":
            named |= _set_by_reward(default.partition("@")[0].removeprefix("/reward/"), sources)
    return named | set(flatten(values))


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
