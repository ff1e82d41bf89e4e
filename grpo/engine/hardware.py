"""Which device a run uses, and how: resolved once when it starts, then frozen in its config."""

import ctypes
import logging
import os
import re
import resource
import sys
from pathlib import Path

import torch
import yaml
from omegaconf import DictConfig

from grpo.config import CONF_DIR, Config, ConfigError

logger = logging.getLogger(__name__)

THREADS = torch.get_num_threads()  # as torch finds them, before any job of a sweep sets another number
# The presets that `auto` chooses among: the first whose memory, in GB, the card has (a little is always reserved).
CUDA_PRESETS = ((70, "a100_80gb"), (36, "a100_40gb"), (20, "rtx_24gb"), (0, "t4_16gb"))

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def resolve_hardware(cfg: DictConfig) -> None:
    """Fill, in place, what the hardware group leaves open: the device, the preset's sizes, the threads.

    Keys that are set stay. Raises ConfigError where the device asked for is not there.
    """
    hardware = cfg.hardware
    wanted = cfg.model.device_map if cfg.model.device_map != "auto" else hardware.device
    device = find_device() if wanted == "auto" else wanted
    asked = "hardware.device" if cfg.model.device_map == "auto" else "model.device_map"
    mend = "hardware=auto or hardware=cpu" if cfg.model.device_map == "auto" else "model.device_map=auto"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"{asked}={device}: torch sees no CUDA device here; use {mend}")
    if device == "mps" and not torch.backends.mps.is_available():
        raise ConfigError(f"{asked}=mps: torch sees no Apple GPU here; use {mend}")
    if hardware.device == "auto":
        name = preset(device)
        logger.info("hardware=auto: using the preset %s", name)
        for key, value in yaml.safe_load((CONF_DIR / "hardware" / f"{name}.yaml").read_text()).items():
            if hardware[key] is None:  # and so not `card`: this machine's is looked at instead
                hardware[key] = value
        if device == "cpu" and hardware.compute_dtype is None and cpu_multiplies_bfloat16():
            hardware.compute_dtype = "bfloat16"
    hardware.device = device.split(":")[0]
    if hardware.threads is None:
        hardware.threads = THREADS


def find_device() -> str:
    """The best device that torch sees: cuda, else mps, else cpu."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def cpu_multiplies_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 in hardware; emulated, it is slower than float32."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def preset(device: str) -> str:
    """The name of the hardware preset for a device, by its memory."""
    if not device.startswith("cuda"):
        return device
    memory = torch.cuda.get_device_properties(device).total_memory / 1e9
    return next(name for least, name in CUDA_PRESETS if memory >= least)


def use_hardware(config: Config) -> torch.device:
    """Set torch up as the frozen config says, and return the device."""
    torch.set_num_threads(config.hardware.threads or THREADS)
    device_map = config.model.device_map
    device = torch.device(config.hardware.device if device_map == "auto" else device_map)
    # Set both ways, since the jobs of a sweep share a process. On a CPU this only replaces atomic additions in the
    # gradient of indexing, at no cost worth measuring.
    _use_deterministic_algorithms(device.type == "cpu" or config.deterministic)
    if device.type == "cpu":
        _keep_freed_memory()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    return device


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
    torch.utils.deterministic.fill_uninitialized_memory = False
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
