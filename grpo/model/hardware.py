"""Which device a run uses, and how: resolved once when it starts, then frozen in its config."""

import ctypes
import logging
import os
import re
import resource
import sys
from pathlib import Path

import torch
from omegaconf import DictConfig

from grpo.config.checks import check_device_map
from grpo.config.errors import ConfigError
from grpo.config.schema import Config
from grpo.config.values import escape

logger = logging.getLogger(__name__)

THREADS = torch.get_num_threads()  # as torch finds them, before any job of a sweep sets another number

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def resolve_hardware(cfg: DictConfig) -> None:
    """Fill, in place, what the hardware group leaves open, the threads, and check that the device can do its part.

    Raises ConfigError where the device asked for is not there, is smaller than the preset's, or lacks its arithmetic.
    """
    device = asked_device(cfg)
    if device.startswith("cuda"):
        _check_card(cfg, device)
    cfg.hardware.device = escape(device.split(":")[0])
    if cfg.hardware.threads is None:
        cfg.hardware.threads = THREADS


def asked_device(cfg: DictConfig) -> str:
    """The device that the config asks for. Raises ConfigError where torch does not see it."""
    check_device_map(cfg.model.device_map)
    by_map = cfg.model.device_map != "auto"
    device = cfg.model.device_map if by_map else cfg.hardware.device
    asked = f"model.device_map={device}" if by_map else f"hardware.device={device}"
    fix = "model.device_map=auto" if by_map else "hardware=auto or hardware=cpu"
    number = int(device.partition(":")[2] or 0)
    if device.startswith("cuda") and number >= (seen := torch.cuda.device_count()):
        raise ConfigError(f"{asked}: torch sees {seen or 'no'} CUDA device{'s' * (seen > 1)} here; use {fix}")
    if device == "mps" and not torch.backends.mps.is_available():
        raise ConfigError(f"{asked}: torch sees no Apple GPU here; use {fix}")
    return device


def _check_card(cfg: DictConfig, device: str) -> None:
    hardware = cfg.hardware
    card = torch.cuda.get_device_properties(device)
    memory = card.total_memory / 1e9
    expected = hardware.card.memory_gb
    if expected is not None and memory < 0.9 * expected:  # a little is always reserved
        raise ConfigError(
            f"the preset is for a card of {expected:g} GB, and {card.name} has {memory:.1f} GB: use hardware=auto, or "
            f"hardware.card.memory_gb={memory:.0f} to try it as it is"
        )
    if "bfloat16" in (hardware.compute_dtype or cfg.model.dtype) and not cuda_multiplies_bfloat16(device):
        asked = "hardware.compute_dtype" if hardware.compute_dtype else "model.dtype"
        fix = "hardware.compute_dtype=float16" if cfg.model.dtype == "float32" else "tuning=lora"
        raise ConfigError(f"{asked}=bfloat16: {card.name} has no bfloat16; use hardware=auto, or {fix}")


def find_device() -> str:
    """The best device that torch sees: cuda, else mps, else cpu."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def cpu_multiplies_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 in hardware; emulated, it is slower than float32."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def cuda_multiplies_bfloat16(device: str) -> bool:
    """Whether a CUDA device multiplies bfloat16 in hardware: AMD's do, NVIDIA's since compute capability 8."""
    return torch.version.hip is not None or torch.cuda.get_device_properties(device).major >= 8


def device_of(config: Config) -> torch.device:
    """The device that a config with its hardware resolved asks for, with its number where that is given."""
    device_map = config.model.device_map
    return torch.device(config.hardware.device if device_map == "auto" else device_map)


def use_hardware(config: Config) -> torch.device:
    """Set torch up as the frozen config says, and return the device."""
    torch.set_num_threads(config.hardware.threads or THREADS)
    device = device_of(config)
    # Set both ways, since the jobs of a sweep share a process. On a CPU this only replaces atomic additions in the
    # gradient of indexing, at no cost worth measuring.
    _use_deterministic_algorithms(device.type == "cpu" or config.deterministic)
    if device.type == "cpu":
        _limit_primitive_caches()
        _keep_freed_memory()
    if device.type == "cuda":
        if device.index is not None:
            torch.cuda.set_device(device)  # else what names no device would take memory of the first one
        torch.cuda.reset_peak_memory_stats(device)
    return device


def _limit_primitive_caches() -> None:
    """Let oneDNN, and torch before it, keep what they prepared for the last few shapes of a product only.

    Working memory is included, batches of text have ever new shapes, and by default the last 1024 are kept. Read when
    the first product is computed.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, "32")


def _keep_freed_memory() -> None:
    """Let the C library keep what tensors on a CPU free, where it otherwise gives the large ones back at once.

    Each page that it asks for again is cleared by the system first: a seventh of a training step's time.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def _use_deterministic_algorithms(wanted: bool) -> None:
    """What torch needs for equal bits from equal inputs, attention's backward pass included; or not."""
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the first product is made
        os.environ.setdefault("FLASH_ATTENTION_DETERMINISTIC", "1")  # read by transformers
    torch.use_deterministic_algorithms(wanted)
    # A property that torch gives the module at import, which types do not show.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False  # autotuning may choose another algorithm each time
    torch.backends.cudnn.deterministic = wanted
    torch.backends.cuda.enable_cudnn_sdp(not wanted)  # cuDNN's attention promises no equal gradients


def peak_memory_gb(device: torch.device) -> float:
    """The most memory used so far, in GB: of the card by tensors on CUDA, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    status = Path("/proc/self/status")
    if status.exists() and (found := re.search(r"VmHWM:\s*(\d+) kB", status.read_text())):
        return int(found[1]) * 1024 / 1e9  # Linux's getrusage counts what the process that started this one held, too
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e9 if sys.platform == "darwin" else peak * 1024 / 1e9
