"""The software and hardware of a launch, as far as they can affect its results."""

import platform
from pathlib import Path

import numpy as np
import torch
import transformers

from grpo.c_library import compiler_version


def environment(device: torch.device) -> dict[str, str]:
    """Versions and hardware that can affect rounding."""
    result = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": np.__version__,
        "processor": _processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
    }
    if device.type == "cpu":
        result["c_compiler"] = compiler_version()
    if device.type == "cuda":
        result["gpu"] = torch.cuda.get_device_name(device)
        result["cuda"] = str(torch.version.cuda)
    return result


def _processor() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
