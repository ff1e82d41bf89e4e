"""The device of a run and how it is used: resolved once at the start, then stored in the run's config."""

import ctypes
import logging
import os
import re
import resource
import sys
from pathlib import Path

import torch
from omegaconf import DictConfig

from grpo.c_library import CompilerError, NoCompilerError, load_library
from grpo.config.checks import check_device_map
from grpo.config.errors import ConfigError
from grpo.config.schema import Config
from grpo.config.values import escape

logger = logging.getLogger(__name__)

THREADS = torch.get_num_threads()  # torch's default, read before a job of a sweep sets another number

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # constants of glibc's malloc.h


def resolve_hardware(cfg: DictConfig) -> None:
    """Resolve the hardware group's device and threads in place, and check that the device suits the config.

    Raises ConfigError if the requested device does not exist, has less memory than the preset expects, or does not
    support the dtype.
    """
    device = requested_device(cfg)
    if device.startswith("cuda"):
        _check_card(cfg, device)
    cfg.hardware.device = escape(device.split(":")[0])
    if cfg.hardware.threads is None:
        cfg.hardware.threads = THREADS
    cfg.hardware.compiled_decoding = _can_compile(cfg)


def _can_compile(cfg: DictConfig) -> bool:
    """Whether sampling may use compiled code; logs a warning if it is expected to work and does not."""
    wanted = cfg.hardware.compiled_decoding
    if wanted is False or cfg.hardware.device != "cpu":
        return False
    # It multiplies in float32, so a processor that multiplies bfloat16 may be faster without it. Not measured yet.
    if wanted is None and (cfg.hardware.compute_dtype or cfg.model.dtype) == "bfloat16" and cpu_supports_bfloat16():
        return False
    try:
        load_library()
    except CompilerError as error:
        if wanted or not isinstance(error, NoCompilerError):
            logger.warning("sampling uses torch's operations, not compiled code: %s", error)
        return False
    return True


def requested_device(cfg: DictConfig | Config) -> str:
    """The device that the config requests. Raises ConfigError if torch does not find it."""
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
    if expected is not None and memory < 0.9 * expected:  # some memory is always reserved
        raise ConfigError(
            f"the preset is for a card of {expected:g} GB, and {card.name} has {memory:.1f} GB: use hardware=auto, or "
            f"hardware.card.memory_gb={memory:.0f} to try it anyway"
        )
    if "bfloat16" in (hardware.compute_dtype or cfg.model.dtype) and not cuda_supports_bfloat16(device):
        asked = "hardware.compute_dtype" if hardware.compute_dtype else "model.dtype"
        fix = "hardware.compute_dtype=float16" if cfg.model.dtype == "float32" else "tuning=lora"
        raise ConfigError(f"{asked}=bfloat16: {card.name} has no bfloat16; use hardware=auto, or {fix}")


def find_device() -> str:
    """The best device that torch sees: cuda, else mps, else cpu."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def cpu_supports_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 in hardware; emulated bfloat16 is slower than float32."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def cuda_supports_bfloat16(device: str) -> bool:
    """Whether a CUDA device multiplies bfloat16 in hardware: AMD GPUs do, NVIDIA GPUs from compute capability 8."""
    return torch.version.hip is not None or torch.cuda.get_device_properties(device).major >= 8


def device_of(config: Config) -> torch.device:
    """The device of a config with resolved hardware, with its index if one is given."""
    device_map = config.model.device_map
    return torch.device(config.hardware.device if device_map == "auto" else device_map)


def use_hardware(config: Config) -> torch.device:
    """Set up torch according to the resolved config, and return the device."""
    torch.set_num_threads(config.hardware.threads or THREADS)
    device = device_of(config)
    # Switched on or off in any case, since the jobs of a sweep share a process. On a CPU this only replaces atomic
    # additions in the gradient of indexing, at no measurable cost.
    _use_deterministic_algorithms(device.type == "cpu" or config.deterministic)
    if device.type == "cpu":
        _limit_primitive_caches()
        _keep_freed_memory()
    if device.type == "cuda":
        if device.index is not None:
            torch.cuda.set_device(device)  # or allocations without an explicit device would use the first one
        torch.cuda.reset_peak_memory_stats(device)
    return device


def _limit_primitive_caches() -> None:
    """Limit the caches of oneDNN and torch for prepared matrix products to a few shapes.

    Each entry includes working memory, batches of text constantly have new shapes, and the default is 1024 entries. The
    variables are read when the first product is computed.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, "32")


def _keep_freed_memory() -> None:
    """Make the C library keep the memory of freed CPU tensors instead of returning large blocks to the system.

    The system clears each page that is allocated again, which took a seventh of a training step's time.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def _use_deterministic_algorithms(wanted: bool) -> None:
    """Turn on or off what torch needs for bitwise reproducible results, attention's backward pass included."""
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at the first matrix product
        os.environ.setdefault("FLASH_ATTENTION_DETERMINISTIC", "1")  # read by transformers
    torch.use_deterministic_algorithms(wanted)
    # torch adds this property to the module at import, so type checkers do not know it.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False  # autotuning may choose another algorithm each time
    torch.backends.cudnn.deterministic = wanted
    torch.backends.cuda.enable_cudnn_sdp(not wanted)  # cuDNN's attention does not guarantee reproducible gradients


def free_memory(device: torch.device) -> int:
    """Bytes of memory that can still be allocated on a device, about."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    info = Path("/proc/meminfo")
    if info.exists() and (found := re.search(r"MemAvailable:\s*(\d+) kB", info.read_text(encoding="utf-8"))):
        return min(int(found[1]) * 1024, _left_in_container())
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _left_in_container() -> int:
    """Bytes that the limit of this container (cgroup version 2) leaves; very many without a limit."""
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text(encoding="utf-8").strip()
        used = int((group / "memory.current").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return sys.maxsize
    return sys.maxsize if limit == "max" else max(0, int(limit) - used)


def peak_memory_gb(device: torch.device) -> float:
    """Peak memory so far in GB: of the tensors on the GPU with CUDA, otherwise of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    status = Path("/proc/self/status")
    if status.exists() and (found := re.search(r"VmHWM:\s*(\d+) kB", status.read_text(encoding="utf-8"))):
        return int(found[1]) * 1024 / 1e9  # on Linux, getrusage also counts what the parent process held
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e9 if sys.platform == "darwin" else peak * 1024 / 1e9
