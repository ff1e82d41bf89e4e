"""A queue for the GPUs of one machine: each job of a sweep takes a free GPU, or waits for one."""

import os
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout
from omegaconf import DictConfig

POLL_S = 1.0
VISIBLE_DEVICES_VARIABLE = "GRPO_SWEEP_VISIBLE_DEVICES"
SUBMITIT_LOCAL = "hydra_plugins.hydra_submitit_launcher.submitit_launcher.LocalLauncher"
# Launchers that start jobs on this machine without assigning GPUs to them. The jobs of other launchers use the GPUs
# that they are given.
LOCAL_LAUNCHERS = (
    "hydra._internal.core_plugins.basic_launcher.BasicLauncher",
    "hydra_plugins.hydra_grpo.LocalLauncher",
    "hydra_plugins.hydra_joblib_launcher.joblib_launcher.JoblibLauncher",
    SUBMITIT_LOCAL,
)

_held: FileLock | None = None  # the lock of this process's GPU; released by the system when the process ends


def must_choose_gpu(cfg: DictConfig, launcher: str) -> bool:
    """Whether a job must choose a GPU of this machine itself, since its launcher (a `_target_`) assigns none."""
    return launcher in LOCAL_LAUNCHERS and {cfg.hardware.device, cfg.model.device_map} <= {"auto", "cuda"}


def remember_gpus() -> None:
    """Record, at the start of a sweep, which GPUs it may use, for `show_all_gpus` in its jobs."""
    os.environ[VISIBLE_DEVICES_VARIABLE] = os.environ.get("CUDA_VISIBLE_DEVICES", "all")


def show_all_gpus(launcher: str) -> None:
    """Make the GPUs of the sweep visible again in a job of submitit's local executor, which hides those not requested.

    Must be called before torch looks for GPUs.
    """
    noted = os.environ.get(VISIBLE_DEVICES_VARIABLE)
    if launcher != SUBMITIT_LOCAL or noted is None:
        return
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    if noted != "all":
        os.environ["CUDA_VISIBLE_DEVICES"] = noted


def claim_gpu(count: int, folder: Path | None = None) -> str | None:
    """Reserve one of the `count` visible GPUs for this process and hide the others; wait while all are reserved.

    Must be called before torch uses a GPU. Across all launchers and sweeps of a user, each GPU has one job at a time.
    folder: the folder of the lock files. Returns the GPU's name in CUDA_VISIBLE_DEVICES; None if there is no GPU.
    """
    global _held
    if _held is not None or count == 0:
        return os.environ.get("CUDA_VISIBLE_DEVICES")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [name.strip() for name in visible.split(",")] if visible else [str(number) for number in range(count)]
    folder = folder or Path(tempfile.gettempdir(), f"grpo-gpus-{os.getuid()}")
    folder.mkdir(exist_ok=True)
    has_printed = False
    while True:
        for name in names:
            lock = FileLock(folder / name.replace("/", "_"))
            with suppress(Timeout):
                lock.acquire(timeout=0)
                _held = lock
                os.environ["CUDA_VISIBLE_DEVICES"] = name
                return name
        if not has_printed:
            print(f"waiting for one of the GPUs {', '.join(names)}", flush=True)
            has_printed = True
        time.sleep(POLL_S)
