"""A time limit for a block of code of the user, also for code that cannot be interrupted."""

import functools
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from grpo.rewards import watchdog

logger = logging.getLogger(__name__)


def end_process(error: str) -> None:
    """End this process as a failure, from any thread and without waiting for the others."""
    print(f"failed: {error}", file=sys.stderr, flush=True)
    os._exit(1)


class TimeLimitExceeded(BaseException):
    """Not an Exception, so that a reward function that catches Exception does not catch it."""


class RunningTime:
    """Seconds for which this process has run, not counting the time while it is stopped (SIGSTOP, Ctrl-Z).

    Between two ticks at most the time of two ticks counts, or the processor time used if that is more: a call into C
    that holds the interpreter lock keeps the thread from ticking.
    """

    def __init__(self, tick_s: float) -> None:
        self._tick_s = tick_s
        self._mark = (0.0, time.monotonic(), time.process_time())

    def seconds(self) -> float:
        """Seconds so far."""
        counted, when, used = self._mark
        most = max(2 * self._tick_s, time.process_time() - used)
        return counted + min(time.monotonic() - when, most)

    def tick(self) -> float:
        """Update and return the seconds so far. Only one thread may call it, every `tick_s` seconds."""
        counted = self.seconds()
        self._mark = (counted, time.monotonic(), time.process_time())
        return counted


@contextmanager
def time_limit(
    seconds: float | None, error: str, on_hang: Callable[[str], None] = end_process, status_file: Path | None = None
) -> Iterator[None]:
    """Raise TimeLimitExceeded in the block after `seconds`, and again each second if the block catches it.

    It is raised by a signal, which interrupts what a thread cannot: sleeping, Python loops and regular expressions. A
    thread sets the timer again if the block has used it itself. A block that has not ended after twice its time, and at
    least two seconds more than its time, cannot be interrupted, as in a long call into C. Then the thread calls
    `on_hang` with the error message, which must end the process. If the block does not let the thread run, as in
    `9**9**9`, the watchdog, another process, kills this one and writes the error into status_file.
    """
    if seconds is None:
        yield
        return
    limit = seconds + max(2.0, seconds)
    tick_s = min(0.5, seconds / 10)
    clock = RunningTime(tick_s)
    over = threading.Event()
    by_signal = threading.current_thread() is threading.main_thread()

    def stop(*_: object) -> None:
        if over.is_set():
            return
        left = seconds - clock.seconds()
        if left <= 0:
            raise TimeLimitExceeded
        signal.setitimer(signal.ITIMER_REAL, left, 1.0)  # the process was stopped meanwhile

    def watch() -> None:
        while not over.wait(tick_s):
            _tell_watchdog("beat")
            ran = clock.tick()
            if ran > limit:
                on_hang(error)
            disarmed = signal.getitimer(signal.ITIMER_REAL)[0] == 0
            if by_signal and ran > seconds and disarmed and signal.getsignal(signal.SIGALRM) is stop:
                signal.setitimer(signal.ITIMER_REAL, 0.001, 1.0)

    status = None if status_file is None else str(status_file)
    _tell_watchdog(json.dumps({"limit": limit, "error": error, "status": status}))
    former = signal.signal(signal.SIGALRM, stop) if by_signal else None
    thread = threading.Thread(target=watch, name="reward time limit", daemon=True)
    thread.start()
    try:
        if by_signal:
            signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
        yield
    finally:
        over.set()
        thread.join()
        _tell_watchdog("end")
        if by_signal:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, former)
    if clock.seconds() > seconds:  # the block caught the exception, or was in C
        raise TimeLimitExceeded


def _tell_watchdog(line: str) -> None:
    process = _watchdog(os.getpid())
    if process is None:
        return
    stream = process.stdin
    assert stream is not None  # because of PIPE
    with suppress(OSError):  # it was killed, or reads no more: then only the thread keeps the limit
        os.write(stream.fileno(), f"{line}\n".encode())


@functools.cache
def _watchdog(process: int) -> subprocess.Popen[bytes] | None:
    """Start the watchdog of this process, in a session of its own, so that it gets no signals of the terminal.

    None, with a warning, if it cannot be started: then only a thread of this process keeps the limit.
    """
    command = [sys.executable, "-I", "-S", watchdog.__file__, str(process)]
    try:
        started = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True)
    except OSError as error:
        logger.warning("reward.timeout_s does not end calls that hold the interpreter's lock: no watchdog (%s)", error)
        return None
    assert started.stdin is not None
    os.set_blocking(started.stdin.fileno(), False)
    return started
