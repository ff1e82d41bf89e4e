"""A sweep's folder: what was asked for, how far each job is, and what is said of them at the end."""

import json
import logging
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from datetime import datetime
from operator import itemgetter
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from yaml import YAMLError

from grpo.config import ConfigError, FileError
from grpo.run.folder import CHANGEABLE, CUT, OUTPUTS, RunFolder, read_json, write_whole
from grpo.run.halving import Record
from grpo.run.lock import in_use

logger = logging.getLogger(__name__)

SWEEPS = OUTPUTS / "sweeps"
# Of a command line, what is about this launch and not about the sweep.
LAUNCH_KEYS = ("resume", "sweep_dir", "plan", "until_step", "sweep.budget_hours")

# The types of what sweep.json holds, as far as it is read.
RECORD = {"overrides": list, "hydra": list, "keys": list, "planned": list | None, "flags": list, "jobs": list}
RECORD |= {"name": str, "state": str, "sweeper": str}

opened: "SweepFolder | None" = None  # the sweep of this process's launch; Hydra has no place for it after a failure
lock_of_sweep = ExitStack()  # held to the end of the launch


class SweepFolder:
    """Names and small files of one sweep's folder."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def check_same(self, overrides: Sequence[str], sweeper: str, resume: bool | str) -> None:
        """Raise ConfigError where the folder holds a sweep that this command line would not go on with."""
        recorded = self.record()
        if not recorded:
            return
        if not resume:
            raise ConfigError(f"{self.path} holds a sweep already; add resume=true, or choose another sweep_dir")
        if recorded.get("sweeper") != sweeper:
            before = recorded.get("sweeper", "of an older version")
            raise ConfigError(f"{self.path} is a sweep with hydra/sweeper={before}; go on with it by that")
        if _lasting(overrides) != _lasting(recorded["overrides"]):
            given = shlex.join(recorded["overrides"])
            raise ConfigError(f"{self.path} is a sweep of other values; go on with it by the same overrides: {given}")

    def begin(
        self,
        overrides: Sequence[str],
        keys: Sequence[str],
        points: Sequence[Sequence[str]] | None,
        hydra: Sequence[str] = (),
        sweeper: str = "basic",
        flags: Sequence[str] = (),
    ) -> None:
        """Record the overrides, the keys that are swept, and the overrides of each job (None: not known yet).

        hydra: the overrides of Hydra's own keys, such as the launcher; sweeper: which one; flags: where the config
        is. Of a sweep that goes on only `hydra` is new, and of the overrides what may change.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        new = {"overrides": own_overrides(overrides), "hydra": list(hydra)}
        if known := self.record():
            self._write(known | new)
            self.update("running")
            return
        record = new | {"keys": list(keys), "sweeper": sweeper, "flags": list(flags)}
        record |= {"name": self.path.resolve().name, "started": datetime.now().isoformat(timespec="seconds")}
        planned = [of_keys(point, keys) for point in points] if points is not None else None
        self._write(record | {"planned": planned, "state": "running", "jobs": []})
        self.update()

    def going_on(self, overrides: Sequence[str]) -> list[str]:
        """The overrides with which a launch goes on: those recorded in their order, with what is new in these.

        The order numbers the jobs, and says what an override changes that comes after another.
        """
        recorded, new = self.record()["overrides"], {key_of(each): each for each in overrides}
        # Another choice of a group stands against keys of it that were named before.
        regrouped = tuple(f"{key}." for key, each in new.items() if each not in recorded)
        recorded = [each for each in recorded if key_of(each) in new or not key_of(each).startswith(regrouped)]
        known = {key_of(each) for each in recorded}
        return [
            *(new.get(key_of(each), each) for each in recorded),
            *(each for each in overrides if key_of(each) not in known),
        ]

    def record(self) -> dict[str, Any]:
        """The content of sweep.json; `{}` where there is none."""
        file = self.path / "sweep.json"
        record = read_json(file, RECORD) if file.exists() else {}
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
        halving = Record.read(self.path)
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
        planned, status, accuracy = record.get("planned") or [], {}, None
        given = planned[number] if number < len(planned) else []
        try:
            status = run.status() if run else {}
            if run and number >= len(planned):
                given = of_keys(status.get("overrides") or run.first_overrides(), record.get("keys"))
            accuracy = (run.evaluation("after") or {}).get("accuracy") if run else None
        except (ValueError, YAMLError) as broken:  # of one job, which the others have nothing to do with
            status = {"state": "unreadable", "error": str(broken)}
        state = status.get("state", "pending")
        if state == "running" and not in_use(run.path):  # it was killed
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
        write_whole(file, json.dumps(record, indent=1) + "\n")
        file.replace(self.path / "sweep.json")

    def _report(self) -> None:
        from grpo.analysis.sweep_report import write_sweep_report  # here, since it takes a second to import

        try:
            files, headline = write_sweep_report(self.path)
        except Exception as error:  # a report can be made again, and must not hide how the sweep ended
            logger.warning(
                "no report (%s: %s); make it: python -m grpo report sweep_dir=%s",
                type(error).__name__,
                error,
                self.path,
            )
            return
        print(f"{headline}\n  report    {files[0]}")

    def conclude(self) -> bool:
        """At the end of a launch say what became of each job, and how to go on. Returns whether one failed."""
        jobs = self.jobs()
        if not jobs:
            return False
        states = {job["state"] for job in jobs} - {"stopped early"}
        bad = states & {"failed", "unreadable"}
        state = "failed" if bad else "interrupted"
        self.update("finished" if states == {"finished"} else state)
        Console().print(_table(jobs, self.swept))
        for job in jobs:
            if job["state"] in bad:
                print(f"job {job['job']} {job['state']}: {job['error']}")
        print(f"sweep folder: {self.path}")
        self._report()
        halving = Record.read(self.path)
        if states != {"finished"} and (halving is None or halving.state != "finished"):
            record = self.record()
            given = [*record.get("flags", []), "-m", *record["hydra"], *record["overrides"]]
            print(f"  go on     {shlex.join(['python', 'launch.py', *given, 'resume=true', f'sweep_dir={self.path}'])}")
        return bool(bad)


def run_sweep_or_run(command: Callable[[], int]) -> int:
    """Run a command, and where it was a sweep say what became of its jobs. Returns its exit code; 1 if a job failed."""
    failed = unreadable = False
    try:
        code = command()
    finally:
        if opened is not None:
            for number in (signal.SIGINT, signal.SIGTERM):  # all is over but the telling
                signal.signal(number, signal.SIG_IGN)
            try:
                failed = opened.conclude()
            except FileError as error:
                print(f"error: {error}", file=sys.stderr)
                unreadable = True
            lock_of_sweep.close()
    return 1 if failed else 2 if unreadable else code


def key_of(override: str) -> str:
    """The key of an override without its `+`."""
    return override.partition("=")[0].lstrip("+")


def own_overrides(overrides: Sequence[str]) -> list[str]:
    """A sweep's command line without what is only about the launch."""
    return [each for each in overrides if key_of(each) not in LAUNCH_KEYS]


def _lasting(overrides: Sequence[str]) -> list[str]:
    """Of a sweep's overrides what cannot change when its runs go on: the last of each key, and all that is swept."""
    last = {key_of(each): each for each in own_overrides(overrides)}
    # With a dot at its end, so that a group such as tracking=offline counts as its keys do.
    changeable = [key for key in last if f"{key}.".startswith(CHANGEABLE + CUT)]
    parsed = OverridesParser.create().parse_overrides([last[key] for key in changeable])
    free = {key for key, each in zip(changeable, parsed, strict=True) if not each.is_sweep_override()}
    return sorted(each for key, each in last.items() if key not in free)


def with_params(overrides: Sequence[str], sweeper: DictConfig) -> list[str]:
    """The overrides of a sweep with what the sweeper's own params add before them."""
    named = {key_of(each) for each in overrides}
    params = OmegaConf.to_container(sweeper.get("params") or OmegaConf.create(), resolve=False)
    return [*(f"{key}={value}" for key, value in params.items() if key_of(key) not in named), *overrides]


def swept_keys(overrides: Sequence[str]) -> list[str]:
    """The keys that take several values, in the order given."""
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    return list(dict.fromkeys(each.get_key_element().lstrip("+") for each in parsed if each.is_sweep_override()))


def is_grid(sweeper: DictConfig) -> bool:
    """Whether the sweeper takes all combinations of the values, and does not find its points itself."""
    return sweeper._target_.endswith(("BasicSweeper", "HalvingSweeper"))


def grid(overrides: Sequence[str], sweeper: DictConfig) -> list[list[str]] | None:
    """The overrides of each job of a sweep over all combinations; None where the sweeper finds its points itself."""
    if not is_grid(sweeper):
        return None
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    batches = BasicSweeper.split_arguments(parsed, max_batch_size=None)
    return [job for batch in batches for job in batch]


def spelt_out(overrides: Sequence[str], points: Sequence[Sequence[str]]) -> list[str]:
    """Overrides with what is swept as plain lists of the values, in the order that they have in these points."""
    values: dict[str, dict[str, None]] = {}
    for point in points:
        for each in point:
            values.setdefault(key_of(each), {})[each.partition("=")[2]] = None
    return [
        f"{each.partition('=')[0]}={','.join(values[key])}" if len(values.get(key := key_of(each), ())) > 1 else each
        for each in overrides
    ]


def named(overrides: Sequence[str]) -> list[str]:
    """The keys that overrides name, as Hydra's override_dirname spells them."""
    return [each.key_or_group for each in OverridesParser.create().parse_overrides(list(overrides))]


def of_keys(overrides: Sequence[str], keys: Sequence[str] | None) -> list[str]:
    """Those of the overrides that are of these keys; None: all."""
    return [each for each in overrides if keys is None or key_of(each) in keys]


def newest_sweep(overrides: Sequence[str], sweeper: str = "basic") -> Path | None:
    """The folder of the sweep started last with these overrides."""
    wanted, found = (_lasting(overrides), sweeper), []
    for file in SWEEPS.glob("*/sweep.json"):
        with suppress(ValueError, KeyError):  # of another version, or broken: not this one
            record = read_json(file)
            if (_lasting(record["overrides"]), record["sweeper"]) == wanted:
                found.append((record["started"], file.parent))
    return max(found)[1] if found else None


def short(value: str) -> str:
    """An override's value for people to read: a long decimal number with four digits, a long text cut."""
    try:
        return f"{float(value):.4g}" if len(value) > 8 and not value.lstrip("-").isdigit() else value
    except ValueError:
        return value if len(value) <= 40 else f"{value[:37]}..."


def _table(jobs: list[dict[str, Any]], keys: Sequence[str]) -> Table:
    table = Table(title="jobs of the sweep")
    for column in ("job", *keys, "state", "step", "held-out accuracy"):
        table.add_column(column, justify="left" if column == "state" else "right", overflow="fold")
    for job in jobs:
        values = dict(each.lstrip("+").split("=", 1) for each in job["overrides"])
        steps = f"{job['step']}/{job['total_steps']}" if job["total_steps"] else "-"
        accuracy = "-" if job["accuracy"] is None else f"{job['accuracy']:.1%}"
        shown = (escape(short(values.get(key, "-"))) for key in keys)  # a list looks like Rich's markup
        table.add_row(str(job["job"]), *shown, job["state"], steps, accuracy)
    return table
