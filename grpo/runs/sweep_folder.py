"""The folder of a sweep: the overrides it was started with, and the progress of each job."""

import json
import logging
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime
from operator import itemgetter
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException
from yaml import YAMLError

from grpo.config.command_line import arguments_in_shell
from grpo.config.errors import ConfigError, FileError, first_line
from grpo.config.migrations import SWEEP_STEPS, VERSION, migrate
from grpo.config.overrides import Overrides, text_of
from grpo.config.schema import FACTS, PASSING_KEYS, on_resume
from grpo.runs.files import discard, read_json, write_atomic
from grpo.runs.folder import RunFolder
from grpo.runs.halving_state import HalvingState
from grpo.runs.locations import outputs
from grpo.runs.lock import in_use

logger = logging.getLogger(__name__)

RECORDS = ("sweep.json", "multirun.yaml", "halving.json")  # written before any job
# The types of the values that are read from sweep.json.
RECORD: dict[str, Any] = {"overrides": list[str], "hydra": list[str], "keys": list[str], "flags": list[str]}
RECORD |= {"planned": list[list[str]] | None, "jobs": list, "name": str, "state": str, "sweeper": str, "started": str}


class SweepFolder:
    """The paths and small files of the folder of one sweep."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def check_same(self, overrides: Overrides, sweeper: str, resume: bool | str) -> None:
        """Raise ConfigError if the folder has a sweep that this command line does not resume."""
        record = self.record()
        if not record:
            return
        recorded = self.recorded_overrides()
        if not resume:
            raise ConfigError(f"{self.path} already contains a sweep; add resume=true, or choose another sweep_dir")
        if record.get("sweeper") != sweeper:
            before = record.get("sweeper", "of an older version")
            raise ConfigError(f"{self.path} is a sweep with hydra/sweeper={before}; resume it with that")
        if fixed_values(overrides) != fixed_values(recorded):
            given = arguments_in_shell(*recorded)
            raise ConfigError(
                f"{self.path} is a sweep of other values; resume it with the same overrides, if you trust them: {given}"
            )
        for line, override in zip(recorded, recorded.parsed, strict=True):
            if override.key_or_group not in overrides.keys and not _is_harmless(line, override):
                raise ConfigError(
                    f"{self.path / 'sweep.json'} sets {line}; if you trust it, add: {arguments_in_shell(line)}"
                )

    def planned(self, points: Sequence[Sequence[str]] | None) -> list[list[str]]:
        """The recorded overrides of the swept keys of each job, in their order.

        points: the overrides of each job according to the command line, in any order; None: the sweeper chooses them.
        Raises FileError if the record has others: the command line decides what is run.
        """
        record = self.record()
        planned = record.get("planned") or []
        keys = record.get("keys", [])
        if planned and sorted(planned) != sorted(Overrides(point).select(keys).lines for point in points or ()):
            raise FileError(f"{self.path / 'sweep.json'} has other jobs than its overrides give; start a new sweep")
        return planned

    def begin(
        self,
        overrides: Overrides,
        keys: Sequence[str],
        points: Sequence[Sequence[str]] | None,
        hydra: Sequence[str] = (),
        sweeper: str = "basic",
        flags: Sequence[str] = (),
    ) -> None:
        """Record the overrides, the swept keys, and the overrides of each job (None: not known yet) in sweep.json.

        hydra: the overrides of Hydra's own keys, such as the launcher. sweeper: the choice of hydra/sweeper. flags: the
        flags with which the config is found. For a resumed sweep, only `hydra`, `overrides` and `flags` are updated.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        new = {"overrides": overrides.without(PASSING_KEYS).lines, "hydra": list(hydra), "flags": list(flags)}
        if known := self.record():
            self._write(known | new)
            self.update("running")
            return
        record = new | {"keys": list(keys), "sweeper": sweeper}
        record |= {"name": self.path.resolve().name, "started": datetime.now().isoformat(timespec="seconds")}
        planned = [Overrides(point).select(keys).lines for point in points] if points is not None else None
        self._write(record | {"planned": planned, "state": "running", "jobs": []})
        self.update()

    def continued(self, overrides: Overrides) -> Overrides:
        """The overrides of a resumed sweep: the recorded ones, updated by those of this launch."""
        return self.recorded_overrides().continued_by(overrides)

    def recorded_overrides(self) -> Overrides:
        """The overrides in sweep.json, except for those of keys that concern one launch. Raises FileError."""
        try:
            return Overrides(self.record()["overrides"]).without(PASSING_KEYS)
        except HydraException as error:
            raise FileError(f"{self.path / 'sweep.json'}: {first_line(error)}") from error

    def begun(self) -> bool:
        """Whether a sweep was ever started here."""
        return bool(self.record()) or any(self.path.glob("[0-9]*/config.yaml"))

    def holds_records_only(self) -> bool:
        """Whether the folder has no job and no file of a launcher, whose jobs may still wait in a queue."""
        return {each.name for each in self.path.iterdir()} <= {".lock", *RECORDS}

    def discard(self) -> None:
        """Remove the files that describe the sweep, but no job."""
        for name in RECORDS:
            discard(self.path / name)

    def record(self) -> dict[str, Any]:
        """The content of sweep.json; `{}` where there is none."""
        file = self.path / "sweep.json"
        record = migrate(read_json(file, RECORD), file, SWEEP_STEPS) if file.exists() else {}
        if record and not {"overrides", "state"} <= record.keys():
            raise FileError(f"{file} is not the record of a sweep: it lacks overrides or state")
        return record

    @property
    def swept(self) -> list[str]:
        """The keys that are swept."""
        return self.record().get("keys", [])

    def jobs(self) -> list[dict[str, Any]]:
        """The jobs, sorted by number, each with its folder, its overrides of the swept keys, and its progress.

        Jobs that have not started are included as pending, if their overrides are known.
        """
        record = self.record()
        planned = record.get("planned") or []
        halving = HalvingState.read(self.path)
        halved = halving is not None and halving.state == "finished"
        numbered = ((re.match(r"(\d+)(_|$)", path.name), path) for path in sorted(self.path.iterdir()) if path.is_dir())
        # Two jobs can have the same number: if a failed trial succeeds on resume, Optuna then chooses other points.
        begun = [(int(found[1]), RunFolder(path)) for found, path in numbered if found]
        pending = set(range(len(planned))) - {number for number, _ in begun}
        jobs = []
        for number, run in sorted([*begun, *((number, None) for number in pending)], key=itemgetter(0)):
            jobs.append(self._job(number, run, record, halved))
        return jobs

    def _job(self, number: int, run: RunFolder | None, record: dict[str, Any], halved: bool) -> dict[str, Any]:
        planned = record.get("planned") or []
        status = {}
        accuracy = None
        given = planned[number] if number < len(planned) else []
        try:
            status = run.status() if run else {}
            if run and number >= len(planned):
                given = Overrides(status.get("overrides") or run.first_overrides())
                given = given.select(record["keys"]).lines if "keys" in record else given.lines
            accuracy = run.accuracy_at(status.get("step", 0)) if run else None
        except (ValueError, YAMLError) as broken:  # concerns only this job
            status = {"state": "unreadable", "error": str(broken)}
        state = status.get("state", "pending")
        if run is not None and state == "running" and not in_use(run.path):  # it was killed
            state = "interrupted"
        if halved and state == "interrupted":
            state = "stopped early"
        return {
            "job": number,
            "folder": run.path.name if run else None,
            "overrides": given,
            "state": state,
            "step": status.get("step", 0),
            "total_steps": status.get("total_steps"),
            "accuracy": accuracy,
            "error": status.get("error"),
        }

    def update(self, state: str | None = None) -> None:
        """Update sweep.json from the folders of the jobs. state: the new state of the sweep; None: unchanged."""
        record = self.record()
        if record:
            self._write(record | {"state": state or record["state"], "jobs": self.jobs()})

    def _write(self, record: dict[str, Any]) -> None:
        # Several jobs may write at the same time. Each writes the current state to a separate file and renames it.
        file = self.path / f"sweep.json.{os.getpid()}"
        write_atomic(file, json.dumps({"version": VERSION, **record}, indent=1) + "\n")
        file.replace(self.path / "sweep.json")


def _is_harmless(line: str, override: Override) -> bool:
    """Whether a recorded override that the command line does not repeat can neither run code nor read a secret.

    Hydra would resolve an interpolation, read the choice of a group as the path of a file, and put the file's content
    anywhere in the config with a package (+group@package=choice).
    """
    # An interpolation can also be written as $\{...\}.
    plain = override.type is OverrideType.CHANGE and override.package is None and "$" not in line
    return plain and (override.key_or_group in FACTS or bool(re.fullmatch(r"[\w-]*", text_of(line))))


def fixed_values(overrides: Overrides) -> list[str]:
    """The last override of each key that is fixed on resume: swept keys, and keys not marked free or rounding."""
    last = Overrides(list(overrides.without(PASSING_KEYS).last_by_key.values()))
    swept = last.swept
    fixed = [key for key in last.keys if key in swept or on_resume(key.replace("/", ".")) not in ("free", "rounding")]
    return sorted(last.select(fixed))


def newest_sweep(overrides: Overrides, sweeper: str = "basic") -> Path | None:
    """The folder of the sweep started last with these overrides; None if there is none."""
    wanted = (fixed_values(overrides), sweeper)
    found = []
    for file in (outputs() / "sweeps").glob("*/sweep.json"):
        with suppress(ValueError, KeyError, HydraException):  # skip folders that are damaged or of another version
            record = SweepFolder(file.parent).record()
            if (fixed_values(Overrides(record["overrides"])), record["sweeper"]) == wanted:
                found.append((record["started"], file.parent))
    return max(found)[1] if found else None


def short(value: str | None) -> str:
    """Format the value of an override for display: long decimal numbers with four digits, long texts shortened."""
    if value is None:
        return "-"
    try:
        return f"{float(value):.4g}" if len(value) > 8 and not value.lstrip("-").isdigit() else value
    except ValueError:
        return value if len(value) <= 40 else f"{value[:37]}..."
