"""The end of a sweep: a table of its jobs, the report, and the command that resumes it."""

import logging
import signal
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from grpo.config.command_line import grpo_command, launch_command, path_argument, path_override
from grpo.config.overrides import Overrides
from grpo.runs.files import disk_errors_are_warnings
from grpo.runs.halving_state import HalvingState
from grpo.runs.stop_signals import STOP_SIGNALS
from grpo.runs.sweep_folder import SweepFolder, short

logger = logging.getLogger(__name__)


def conclude(sweep: SweepFolder) -> bool:
    """Print the state of each job, write the report, and print how to resume. Returns whether a job failed."""
    for number in STOP_SIGNALS:  # all jobs have ended, so there is nothing left to stop
        signal.signal(number, signal.SIG_IGN)
    if sweep.holds_records_only():
        return False
    jobs = sweep.jobs()
    states = {job["state"] for job in jobs} - {"stopped early"}
    bad = states & {"failed", "unreadable"}
    state = "failed" if bad else "interrupted"
    with disk_errors_are_warnings(f"{sweep.path}/sweep.json"):
        sweep.update("finished" if states == {"finished"} else state)
    Console().print(_table(jobs, sweep.swept))
    for job in jobs:
        if job["state"] in bad:
            print(f"job {job['job']} {job['state']}: {job['error']}")
    print(f"sweep folder: {sweep.path}")
    _report(sweep)
    halving = HalvingState.read(sweep.path)
    if states != {"finished"} and (halving is None or halving.state != "finished"):
        record = sweep.record()
        given = [*record.get("flags", []), "-m", *record["hydra"], *record["overrides"], "resume=true"]
        print(f"  resume    {launch_command(*given, path_override('sweep_dir', sweep.path))}")
    return bool(bad)


def _report(sweep: SweepFolder) -> None:
    from grpo.analysis.sweep_report import write_sweep_report  # imported here, since that takes a second

    try:
        files, headline = write_sweep_report(sweep.path)
    except Exception as error:  # a failed report can be written later, and must not hide how the sweep ended
        command = grpo_command("report", path_argument("sweep_dir", sweep.path))
        logger.warning("no report (%s: %s); write it with: %s", type(error).__name__, error, command)
        return
    print(f"{headline}\n  report    {files[0]}")


def _table(jobs: list[dict[str, Any]], keys: Sequence[str]) -> Table:
    table = Table(title="jobs of the sweep")
    for column in ("job", *keys, "state", "step", "accuracy"):
        table.add_column(column, justify="left" if column == "state" else "right", overflow="fold")
    for job in jobs:
        values = Overrides(job["overrides"]).texts
        steps = f"{job['step']}/{job['total_steps']}" if job["total_steps"] else "-"
        accuracy = "-" if job["accuracy"] is None else f"{job['accuracy']:.1%}"
        shown = (escape(short(values.get(key, "-"))) for key in keys)  # a list would be read as Rich markup
        table.add_row(str(job["job"]), *shown, job["state"], steps, accuracy)
    return table
