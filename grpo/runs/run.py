"""What a launch and the training loop share: one run with its folder, config and stop signals."""

import os
import sys
import time
from dataclasses import dataclass
from typing import Any

from grpo.config.schema import Config
from grpo.runs.files import disk_errors_are_warnings
from grpo.runs.folder import RunFolder
from grpo.runs.stop_signals import StopSignals


@dataclass
class Run:
    """A run folder in use by this process."""

    folder: RunFolder
    config: Config
    resumed: bool  # continues from what the folder holds
    forked: bool  # which it took over from another run just now
    done: bool  # finished before, and no further steps are asked for
    stop: StopSignals
    overrides: list[str]  # of this launch's command line
    changes: dict[str, Any]  # what it changes in a run that it resumes
    until_step: int | None  # where this launch stops, if before the end
    started: float  # by time.monotonic
    seconds_before: float  # of all launches so far

    @property
    def seconds(self) -> float:
        """How long all launches took together."""
        return round(self.seconds_before + time.monotonic() - self.started, 3)

    def record_state(self, state: str, error: str | None) -> None:
        """Say in status.json how the run stands."""
        with disk_errors_are_warnings(f"{self.folder.path}/status.json"):
            self.folder.update_status(state=state, error=error)

    def end_process(self, error: str) -> None:
        """Record a failure and end this process, from any thread and whatever the others do."""
        self.record_state("failed", error)
        print(f"failed: {error}", file=sys.stderr, flush=True)
        os._exit(1)
