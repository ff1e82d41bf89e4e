"""Reward functions that hang, crash and change global state. The module imports no torch."""

import contextlib
import ctypes
import hashlib
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path


def lengths(completions, **columns):
    return [float(len(each[0]["content"])) for each in completions]


async def later(completions):
    return (None, 3)


def scaled(completions, answer, *, factor, offset=0.5):
    return [factor * float(each) + offset for each in answer]


def invalid(completions):
    return [1.0, "one"]


def raises(completions):
    raise ValueError("as asked")


def hangs_in_c(completions):
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)


def holds_the_interpreter_lock(completions):
    return [float(sum(range(10**12)))] * len(completions)


def catches_everything(completions):
    while True:
        with contextlib.suppress(BaseException):
            time.sleep(60)


def leaves(completions):
    sys.exit(3)


def leaves_at_once(completions):
    os._exit(3)


def crashes(completions):
    ctypes.string_at(0)


def kills_itself(completions):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)


def disturbs(completions):
    random.seed(1)
    os.chdir("/")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["DISTURBED"] = "1"
    return [0.0] * len(completions)


def progress(completions, trainer_state, **columns):
    return ["torch" in sys.modules or "transformers" in sys.modules, trainer_state.global_step]


def prints(completions):
    print("from a reward")
    print("an error", file=sys.stderr)
    return [0.0] * len(completions)


class Counts:
    """Returns how often it was called."""

    def __init__(self):
        self.calls = 0

    def __call__(self, completions):
        self.calls += 1
        return [float(self.calls)] * len(completions)


def says_its_process_and_hangs(completions):
    Path("pid").write_text(str(os.getpid()))
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)


class FailsLater:
    """An object that can be built only until the file `spent` exists."""

    def __init__(self):
        if Path("spent").exists():
            raise OSError("the port is taken")

    def __call__(self, completions):
        return [1.0] * len(completions)


def closes_everything(completions):
    threading.Thread(target=time.sleep, args=(60,)).start()  # so that the process lives on
    os.closerange(3, 100)
    return [0.0] * len(completions)


def forks_and_dies(completions):
    if os.fork() == 0:
        time.sleep(60)
    os.kill(os.getpid(), signal.SIGKILL)


def ends_with_an_unnamed_signal(completions):
    os.kill(os.getpid(), 40)
    time.sleep(60)
