"""Signals that request a run to stop, and exits that no signal requested."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


class Exit(SystemExit):
    """An exit requested by the suite, such as after a stop signal. Other SystemExits come from code that it runs."""


@contextmanager
def exits_are_failures(*allowed: type[BaseException]) -> Iterator[None]:
    """Convert SystemExit, KeyboardInterrupt and similar exceptions, except those `allowed`, into RuntimeError.

    A reward that calls `sys.exit(0)` would otherwise end a run as if it had succeeded.
    """
    passed_on: tuple[type[BaseException], ...] = (Exception, *allowed)
    try:
        yield
    except passed_on:
        raise
    except BaseException as error:
        raise RuntimeError(
            f"{error!r} was raised by code of the run, although no signal asked it to stop; use an Exception there"
        ) from error


def stop_signals() -> tuple[signal.Signals, ...]:
    """The stop signals to handle: not SIGHUP where it is ignored, as it is for a program started with nohup."""
    is_ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return tuple(each for each in STOP_SIGNALS if each != signal.SIGHUP or not is_ignored)


class StopSignals:
    """Ends the run after SIGINT, SIGTERM, SIGHUP (the terminal was closed) or SIGUSR1 (SLURM, before it ends a job).

    The run ends immediately, except within `deferred`.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.again = False  # whether a second signal asked to end the run without saving
        self._can_abort: Callable[[], bool] | None = None  # set within `deferred`

    @property
    def exit_code(self) -> int:
        """The exit code of a process that the received signal ends."""
        return 128 + (self.received or 0)

    @contextmanager
    def installed(self) -> Iterator["StopSignals"]:
        """Handle the signals within the block, and restore the previous handlers after it."""
        former = {number: signal.signal(number, self._handle) for number in stop_signals()}
        try:
            yield self
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)

    @contextmanager
    def deferred(self, can_abort: Callable[[], bool]) -> Iterator[None]:
        """Defer signals within the block until `exit_if_requested`.

        can_abort: returns whether the current work can be abandoned; if so, a signal is not deferred. A second
        signal is not deferred either. SIGHUP never counts as the second one, since a closed terminal sends several.
        """
        self._can_abort = can_abort
        try:
            yield
        finally:
            self._can_abort = None

    def ignore_signals(self) -> None:
        """Ignore all further signals. To be called when the run is complete and saved."""
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def exit_if_requested(self) -> None:
        """Raise Exit if a signal was received."""
        if self.received is not None:
            raise Exit(self.exit_code)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGHUP:
            return
        self.again = self.received is not None
        self.received = number
        if self.again or self._can_abort is None or self._can_abort():
            raise Exit(self.exit_code)
