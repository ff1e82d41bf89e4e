"""Signals that ask a run to stop, and exits that no signal asked for."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from grpo.runs.files import disk_errors_are_warnings

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Exit(SystemExit):
    """An exit that the suite decided, as after a stop signal; any other SystemExit comes from code that it runs."""


@contextmanager
def exits_are_failures(*allowed: type[BaseException]) -> Iterator[None]:
    """Turn SystemExit, KeyboardInterrupt and the like, but for those `allowed`, into a RuntimeError.

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


class StopSignals:
    """SIGINT, SIGTERM and SIGUSR1 (what SLURM can send ahead) end the run at once, but within `deferred` with care."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._can_be_dropped: Callable[[], bool] | None = None  # set within `deferred`
        self._again = False

    @property
    def exit_code(self) -> int:
        """The exit code of a process that the received signal ends."""
        return 128 + (self.received or 0)

    @contextmanager
    def installed(self) -> Iterator["StopSignals"]:
        """Handle the signals within the block, and restore the former handlers after it."""
        former = {number: signal.signal(number, self._handle) for number in STOP_SIGNALS}
        try:
            yield self
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)

    @contextmanager
    def deferred(self, can_be_dropped: Callable[[], bool], save: Callable[[], None]) -> Iterator[None]:
        """Within the block a signal waits for `leave_if_asked`, unless the present work can be dropped; then `save`.

        A second signal neither waits nor saves.
        """
        self._can_be_dropped = can_be_dropped
        try:
            yield
        except Exit:  # of another exit nobody knows whether the policy is whole
            self._can_be_dropped = None
            if not self._again:
                with disk_errors_are_warnings("a checkpoint of the last step"):
                    save()
            raise
        finally:
            self._can_be_dropped = None

    def ignored_from_here(self) -> None:
        """All is done and saved: a signal that comes now changes nothing."""
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def leave_if_asked(self) -> None:
        """Raise Exit if a signal waits."""
        if self.received is not None:
            raise Exit(self.exit_code)

    def _handle(self, number: int, _: FrameType | None) -> None:
        self._again = self.received is not None
        self.received = number
        if self._again or self._can_be_dropped is None or self._can_be_dropped():
            raise Exit(self.exit_code)
