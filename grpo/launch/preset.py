"""hardware=auto: the preset that fits the device found on this machine."""

import logging
from collections.abc import Callable, Sequence

import torch
from omegaconf import DictConfig, OmegaConf

from grpo.config.overrides import Overrides
from grpo.model.hardware import asked_device, cpu_multiplies_bfloat16, cuda_multiplies_bfloat16, find_device

logger = logging.getLogger(__name__)

# The presets that `auto` chooses among: the first whose memory, in GB, the card has (a little is always reserved).
CUDA_PRESETS = ((70, "a100_80gb"), (36, "a100_40gb"), (20, "rtx_24gb"), (0, "t4_16gb"))


def hardware_found(cfg: DictConfig, overrides: Overrides, compose: Callable[[Sequence[str]], DictConfig]) -> DictConfig:
    """With hardware=auto what `hardware=<preset>` would have composed, for the device found here; else cfg itself.

    overrides: the command line that composed cfg. What it says of a preset's keys stays. compose: composes again.
    """
    if cfg.hardware.device != "auto":
        return cfg
    asked_device(cfg)  # refuses one that is not here
    preset, *adapted = preset_overrides(cfg.model.device_map if cfg.model.device_map != "auto" else find_device())
    logger.info("hardware=auto: %s", " ".join([preset, *adapted]))
    # Of the card, plan=true looks at this machine's instead of at the preset's.
    adapted += [f"hardware.card.{key}=null" for key in cfg.hardware.card]
    # What an experiment sets itself is in cfg already, since `auto` leaves it open.
    still_open = [key for key in Overrides(adapted).keys if OmegaConf.select(cfg, key) is None]
    kept = overrides.without({"hardware", "hardware.device"})
    found = compose([preset, *Overrides(adapted).select(still_open), *kept])
    OmegaConf.copy_cache(from_config=cfg, to_config=found)  # such as the time in a name
    return found


def preset_overrides(device: str) -> list[str]:
    """The preset for a device, by its memory, and then what it lacks or has beyond the preset's card."""
    if not device.startswith("cuda"):
        narrow = device == "cpu" and cpu_multiplies_bfloat16()
        return [f"hardware={device}", *(["hardware.compute_dtype=bfloat16"] if narrow else [])]
    memory = torch.cuda.get_device_properties(device).total_memory / 1e9
    name = next(name for least, name in CUDA_PRESETS if memory >= least)
    if name == "t4_16gb" or cuda_multiplies_bfloat16(device):
        return [f"hardware={name}"]
    return [f"hardware={name}", "hardware.compute_dtype=float16"] if memory >= 36 else ["hardware=t4_16gb"]
