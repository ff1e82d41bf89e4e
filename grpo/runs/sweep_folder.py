"""A sweep's folder: what was asked for, and how far each job is."""

import json
import logging
import os
import re
import shlex
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime
from operator import itemgetter
from pathlib import Path
from typing import Any

from hydra.errors import HydraException
from yaml import YAMLError

from grpo.config.errors import ConfigError, FileError
from grpo.config.migrations import SWEEP_STEPS, VERSION, migrate
from grpo.config.overrides import Overrides
from grpo.config.schema import PASSING_KEYS, on_resume
from grpo.runs.files import discard, read_json, write_atomic
from grpo.runs.folder import RunFolder, outputs
from grpo.runs.halving_state import HalvingState
from grpo.runs.lock import in_use

logger = logging.getLogger(__name__)

RECORDS = ("sweep.json", "multirun.yaml", "halving.json")  # what is written before any job
# The types of what sweep.json holds, as far as it is read.
RECORD: dict[str, Any] = {"overrides": list, "hydra": list, "keys": list, "planned": list | None, "flags": list}
RECORD |= {"jobs": list, "name": str, "state": str, "sweeper": str}


class SweepFolder:
    """Names and small files of one sweep's folder."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def check_same(self, overrides: Overrides, sweeper: str, resume: bool | str) -> None:
        """Raise ConfigError where the folder holds a sweep that this command line would not resume."""
        recorded = self.record()
        if not recorded:
            return
        if not resume:
            raise ConfigError(f"{self.path} holds a sweep already; add resume=true, or choose another sweep_dir")
        if recorded.get("sweeper") != sweeper:
            before = recorded.get("sweeper", "of an older version")
            raise ConfigError(f"{self.path} is a sweep with hydra/sweeper={before}; resume it with that")
        if fixed_values(overrides) != fixed_values(Overrides(recorded["overrides"])):
            given = shlex.join(recorded["overrides"])
            raise ConfigError(f"{self.path} is a sweep of other values; resume it with the same overrides: {given}")

    def begin(
        self,
        overrides: Overrides,
        keys: Sequence[str],
        points: Sequence[Sequence[str]] | None,
        hydra: Sequence[str] = (),
        sweeper: str = "basic",
        flags: Sequence[str] = (),
    ) -> None:
        """Record the overrides, the keys that are swept, and the overrides of each job (None: not known yet).

        hydra: the overrides of Hydra's own keys, such as the launcher; sweeper: which one; flags: where the config
        is. Of a sweep that is resumed only `hydra` is new, and of the overrides what may change.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        new = {"overrides": overrides.without(PASSING_KEYS).lines, "hydra": list(hydra)}
        if known := self.record():
            self._write(known | new)
            self.update("running")
            return
        record = new | {"keys": list(keys), "sweeper": sweeper, "flags": list(flags)}
        record |= {"name": self.path.resolve().name, "started": datetime.now().isoformat(timespec="seconds")}
        planned = [Overrides(point).select(keys).lines for point in points] if points is not None else None
        self._write(record | {"planned": planned, "state": "running", "jobs": []})
        self.update()

    def continued(self, overrides: Overrides) -> Overrides:
        """The overrides with which a launch resumes: those recorded, with what is new in these."""
        return Overrides(self.record()["overrides"]).continued_by(overrides)

    def begun(self) -> bool:
        """Whether a sweep was ever started here."""
        return bool(self.record()) or any(self.path.glob("[0-9]*/config.yaml"))

    def holds_records_only(self) -> bool:
        """Whether there is no job, and nothing of a launcher, which may have jobs that wait in a queue."""
        return {each.name for each in self.path.iterdir()} <= {".lock", *RECORDS}

    def discard(self) -> None:
        """Remove what describes the sweep, and no job of it."""
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
        """Each job by its number, with its folder, its overrides of the swept keys, and how far it is.

        Those that have not begun are there too, as pending, where it is known what they will be.
        """
        record = self.record()
        planned = record.get("planned") or []
        halving = HalvingState.read(self.path)
        halved = halving is not None and halving.state == "finished"
        numbered = ((re.match(r"(\d+)(_|$)", path.name), path) for path in sorted(self.path.iterdir()) if path.is_dir())
        # Of a number there can be two: a trial that failed, and now does not, leads Optuna elsewhere from there on.
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
            accuracy = (run.evaluation("after") or {}).get("accuracy") if run else None
        except (ValueError, YAMLError) as broken:  # of one job, which the others have nothing to do with
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
        """Write sweep.json anew from what the jobs' folders say; `state` is the sweep's where it changes."""
        record = self.record()
        if record:
            self._write(record | {"state": state or record["state"], "jobs": self.jobs()})

    def _write(self, record: dict[str, Any]) -> None:
        # Several jobs may do so at once; each writes the truth, in a file of its own before it gets its name.
        file = self.path / f"sweep.json.{os.getpid()}"
        write_atomic(file, json.dumps({"version": VERSION, **record}, indent=1) + "\n")
        file.replace(self.path / "sweep.json")


def fixed_values(overrides: Overrides) -> list[str]:
    """Of a sweep's overrides what cannot change when it is resumed: the last of each key, and all that is swept."""
    last = Overrides(list(overrides.without(PASSING_KEYS).last_by_key.values()))
    swept = last.swept
    fixed = [key for key in last.keys if key in swept or on_resume(key.replace("/", ".")) not in ("free", "rounding")]
    return sorted(last.select(fixed))


def newest_sweep(overrides: Overrides, sweeper: str = "basic") -> Path | None:
    """The folder of the sweep started last with these overrides."""
    wanted = (fixed_values(overrides), sweeper)
    found = []
    for file in (outputs() / "sweeps").glob("*/sweep.json"):
        with suppress(ValueError, KeyError, HydraException):  # of another version, or broken: not this one
            record = SweepFolder(file.parent).record()
            if (fixed_values(Overrides(record["overrides"])), record["sweeper"]) == wanted:
                found.append((record["started"], file.parent))
    return max(found)[1] if found else None


def short(value: str) -> str:
    """An override's value for people to read: a long decimal number with four digits, a long text shortened."""
    try:
        return f"{float(value):.4g}" if len(value) > 8 and not value.lstrip("-").isdigit() else value
    except ValueError:
        return value if len(value) <= 40 else f"{value[:37]}..."
