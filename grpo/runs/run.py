"""The object that a launch passes to the training loop: one run with its folder, config and stop signals."""

import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grpo.config.schema import Config
from grpo.runs.files import disk_errors_are_warnings, short_path
from grpo.runs.folder import RunFolder
from grpo.runs.stop_signals import StopSignals


@dataclass
class Run:
    """A run folder in use by this process."""

    folder: RunFolder  # with an absolute path, since code of the user may change the working directory
    config: Config
    resumed: bool  # continues from the content of the folder
    forked: bool  # this launch copied that content from another run
    done: bool  # has finished before, and no further steps are requested
    stop: StopSignals
    overrides: list[str]  # of this launch's command line
    changes: dict[str, Any]  # changes of this launch to a resumed run, by dotted key
    until_step: int | None  # step at which this launch stops; None: at the end
    started: float  # by time.monotonic
    seconds_before: float  # total time of all earlier launches
    flags: list[str] = field(default_factory=list)  # of this launch, with which Hydra found its config
    recorded: bool = False  # this launch is in launches.jsonl, and has begun

    @property
    def shown_path(self) -> Path:
        """The path of the folder for messages and commands; that of `folder` is absolute."""
        return short_path(self.folder.path)

    @property
    def seconds(self) -> float:
        """The total time of all launches, in seconds."""
        return round(self.seconds_before + time.monotonic() - self.started, 3)

    def record_state(self, state: str, error: str | None) -> None:
        """Record the state of the run in status.json."""
        with disk_errors_are_warnings(f"{self.shown_path}/status.json"):
            self.folder.update_status(state=state, error=error)

    def end_process(self, error: str) -> None:
        """Record a failure and end this process, from any thread, without waiting for other threads."""
        self.record_state("failed", error)
        print(f"failed: {error}", file=sys.stderr, flush=True)
        os._exit(1)
