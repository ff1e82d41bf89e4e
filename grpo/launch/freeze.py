"""From a composed config to the one that config.yaml holds: the same for a new, a forked and a resumed run."""

from omegaconf import DictConfig

from grpo.config.checks import check_training, typed
from grpo.config.schema import Config


def freeze(cfg: DictConfig) -> Config:
    """The config with its hardware resolved, checked as a whole. cfg is changed. Raises ConfigError."""
    from grpo.model.hardware import resolve_hardware  # imports torch

    resolve_hardware(cfg)
    config = typed(cfg)
    check_training(config)
    return config
