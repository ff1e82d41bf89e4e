"""Compose conf/ outside a launch, and apply the overrides of a command line to a frozen config."""

from collections.abc import Sequence

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from grpo.config.errors import ConfigError
from grpo.config.overrides import Overrides
from grpo.config.paths import CONF_DIR
from grpo.config.schema import LAUNCH_KEYS
from grpo.config.values import copy_value, flatten


def compose_config(overrides: Sequence[str]) -> DictConfig:
    """Compose conf/config.yaml with these overrides, as `python launch.py` does."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return compose("config", list(overrides))


def apply_overrides(frozen: DictConfig, composed: DictConfig, overrides: Overrides) -> DictConfig:
    """Return a copy of a frozen config in which the overridden keys have their values from `composed`.

    An override of a group (hardware=cpu) replaces the whole group. Raises ConfigError for an override that is not a key
    or group of the config, such as experiment=..., which would silently change many keys.
    """
    result = frozen.copy()
    for key, line in zip(overrides.dotted_keys, overrides, strict=True):
        if key in LAUNCH_KEYS:
            continue
        if OmegaConf.select(composed, key, default=None) is None and key not in flatten(composed):
            raise ConfigError(f"{line}: cannot be applied to an existing run folder; name the keys themselves")
        copy_value(composed, key, result)
    return result
