"""Run launch.py with a fault in one function: `python tests/inject.py PLACE COUNT FAULT [key=value ...]`.

PLACE is the dotted path of the function. The fault happens before its COUNT-th call and all later ones (COUNT `3`), or
before that call only (`3x`). FAULT is `kill` (kill -9 of this process), `term`, `int`, `usr1` or `hup` (that signal,
as sent by another process), `memory` (the error that an allocator raises), `nan` (the result of the call becomes NaN),
`sleep:S` (wait for S seconds), or the message of a ValueError. PLACE `none` changes nothing. The other arguments are
passed to launch.py.
"""

import functools
import importlib
import os
import runpy
import signal
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "int": signal.SIGINT, "usr1": signal.SIGUSR1}
SIGNALS["hup"] = signal.SIGHUP


def spoiled(result):
    """The same result, with NaN in its tensor or its loss."""
    import torch

    if isinstance(result, torch.Tensor):
        return result * float("nan")
    if hasattr(result, "loss"):
        return type(result)(result.loss * float("nan"), result.metrics)
    raise TypeError(f"cannot spoil {type(result).__name__}")


def inject(place: str, count: str, fault: str) -> None:
    """Replace the function at `place` by one in which the fault happens."""
    path, name = place.rsplit(".", 1)
    try:
        owner = importlib.import_module(path)
    except ModuleNotFoundError:  # a method
        module, cls = path.rsplit(".", 1)
        owner = getattr(importlib.import_module(module), cls)
    original, calls = getattr(owner, name), 0
    once, at = count.endswith("x"), int(count.rstrip("x"))

    @functools.wraps(original)
    def faulty(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == at or (calls > at and not once):
            if fault in SIGNALS:
                os.kill(os.getpid(), SIGNALS[fault])
            elif fault == "memory":
                raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate")
            elif fault == "nan":
                return spoiled(original(*args, **kwargs))
            elif fault.startswith("sleep:"):
                time.sleep(float(fault.removeprefix("sleep:")))
            else:
                raise ValueError(fault)
        return original(*args, **kwargs)

    setattr(owner, name, faulty)


def main(arguments: list[str]) -> None:
    """Run launch.py with the fault in place. Ends with SystemExit."""
    place, count, fault, *rest = arguments
    if place != "none":
        inject(place, count, fault)
    sys.argv = [str(ROOT / "launch.py"), *rest]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main(sys.argv[1:])
