"""A launch in which something goes wrong at one place: `python tests/inject.py PLACE COUNT FAULT [key=value ...]`.

PLACE is the dotted path of a function; from its COUNT-th call on (COUNT `3`) or at that call only (`3x`), FAULT
happens before it: `kill` (kill -9 of this process), `term`, `int` or `usr1` (that signal, as another process would
send it), `memory` (the error that an allocator raises), `nan` (its result becomes not a number), or `sleep:S`.
PLACE `none` changes nothing. The rest of the command line is launch.py's.
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


def spoiled(result):
    """The same result, with every number that can be not a number made one."""
    import torch

    if isinstance(result, torch.Tensor):
        return result * float("nan")
    if hasattr(result, "loss"):
        return type(result)(result.loss * float("nan"), result.metrics)
    raise TypeError(f"cannot spoil {type(result).__name__}")


def inject(place: str, count: str, fault: str) -> None:
    """Put the fault into the function at that place."""
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
    """Run launch.py with the fault in place; leaves by SystemExit."""
    place, count, fault, *rest = arguments
    if place != "none":
        inject(place, count, fault)
    sys.argv = [str(ROOT / "launch.py"), *rest]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main(sys.argv[1:])
