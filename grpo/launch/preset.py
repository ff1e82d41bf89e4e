"""hardware=auto: the preset that fits the device found on this machine."""

import logging
from collections.abc import Callable, Sequence

import torch
from omegaconf import DictConfig, OmegaConf

from grpo.config.overrides import Overrides
from grpo.model.hardware import cpu_supports_bfloat16, cuda_supports_bfloat16, find_device, requested_device

logger = logging.getLogger(__name__)

# The presets for `auto`, each with the least memory of the card in GB; the first that fits is chosen. The limits are
# below the nominal sizes, since some memory is always reserved.
CUDA_PRESETS = ((70, "a100_80gb"), (36, "a100_40gb"), (20, "rtx_24gb"), (0, "t4_16gb"))


def hardware_found(cfg: DictConfig, overrides: Overrides, compose: Callable[[Sequence[str]], DictConfig]) -> DictConfig:
    """Compose hardware=auto as `hardware=<preset>` for the device of this machine; otherwise return cfg itself.

    overrides: those that cfg was composed with; keys of the preset that they set keep their values. compose: composes a
    config from overrides.
    """
    if cfg.hardware.device != "auto":
        return cfg
    preset, *adapted = found_overrides(cfg)
    logger.info("hardware=auto: %s", " ".join([preset, *adapted]))
    # So that plan=true uses the card of this machine, not the preset's.
    adapted += [f"hardware.card.{key}=null" for key in cfg.hardware.card]
    # `auto` leaves these keys null. One that is not null was set by an experiment or override, and is kept.
    still_open = [key for key in Overrides(adapted).keys if OmegaConf.select(cfg, key) is None]
    kept = overrides.without({"hardware", "hardware.device"})
    found = compose([preset, *Overrides(adapted).select(still_open), *kept])
    OmegaConf.copy_cache(from_config=cfg, to_config=found)  # keeps resolved values, such as the time in a name
    return found


def found_overrides(cfg: DictConfig) -> list[str]:
    """What hardware=auto becomes on this machine. Raises ConfigError if model.device_map names a missing device."""
    requested_device(cfg)
    return preset_overrides(cfg.model.device_map if cfg.model.device_map != "auto" else find_device())


def preset_overrides(device: str) -> list[str]:
    """The preset for a device, by its memory, followed by overrides where the device differs from the preset's card."""
    if not device.startswith("cuda"):
        narrow = device == "cpu" and cpu_supports_bfloat16()
        return [f"hardware={device}", *(["hardware.compute_dtype=bfloat16"] if narrow else [])]
    memory = torch.cuda.get_device_properties(device).total_memory / 1e9
    name = next(name for least, name in CUDA_PRESETS if memory >= least)
    if name == "t4_16gb" or cuda_supports_bfloat16(device):
        return [f"hardware={name}"]
    return [f"hardware={name}", "hardware.compute_dtype=float16"] if memory >= 36 else ["hardware=t4_16gb"]
