"""Turn a composed config into the one of config.yaml, in the same way for new, forked and resumed runs."""

from omegaconf import DictConfig

from grpo.config.checks import check_training, typed
from grpo.config.schema import Config


def freeze(cfg: DictConfig) -> Config:
    """Resolve the hardware of `cfg`, in place, and return the checked config. Raises ConfigError."""
    from grpo.model.hardware import resolve_hardware  # imports torch

    resolve_hardware(cfg)
    config = typed(cfg)
    check_training(config)
    return config
