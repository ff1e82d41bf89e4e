"""Console output during a run: a progress bar on a terminal, plain lines otherwise."""

import io
import os
import select
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from grpo.config.command_line import grpo_command, launch_command, override, path_argument, path_override

PLAIN_LINE_SECONDS = 10  # least time between plain lines; the first and last step always have one


class Numbers(ProgressColumn):
    """The numbers of the last step, truncated at the end of the terminal's line."""

    def render(self, task: Task) -> Text:
        """The text of the column; it is the only one that Rich may make narrower."""
        return Text(task.fields["numbers"], no_wrap=True, overflow="ellipsis")


class _ErrorIgnoringFile(io.FileIO):
    """A file for which a failed write is discarded, without an error."""

    def write(self, data: Any) -> int:
        """Write data, or discard it if that is not possible. Returns the number of bytes taken."""
        try:
            while (written := super().write(data)) is None:  # it would block
                select.select([], [self], [])
        except OSError:
            return memoryview(data).nbytes
        return written


@contextmanager
def ignoring_console_errors() -> Iterator[None]:
    """Within the block, printing to the console raises no exception, so that it cannot end a run.

    Text is discarded if the console no longer exists: a closed terminal, a pipe to a program that has ended, or a file
    on a full disk. Characters that the console's encoding lacks are printed as escapes such as \\u2026.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # closed: otherwise the next file that is opened gets this number, and all printed text
            os.open(os.devnull, os.O_RDWR)
    former = (sys.stdin, sys.stdout, sys.stderr)
    ignoring = (_ignoring_errors(sys.stdout, 1), _ignoring_errors(sys.stderr, 2))
    sys.stdin = sys.stdin or open(0, encoding="utf-8", closefd=False)  # noqa: SIM115  needed within the block
    sys.stdout, sys.stderr = ignoring
    try:
        yield
    finally:
        for stream in ignoring:
            stream.flush()
        sys.stdin, sys.stdout, sys.stderr = former


def _ignoring_errors(stream: Any, number: int) -> Any:
    """A stream like sys.stdout (1) or sys.stderr (2) whose writes do not fail; the same one if it is not a file."""
    settings: dict[str, Any] = {"encoding": "utf-8", "line_buffering": number == 2}
    if stream is not None:
        if not isinstance(stream, io.TextIOWrapper):  # such as that of a notebook
            return stream
        try:
            number = stream.fileno()
            stream.flush()
        except (OSError, ValueError):
            return stream
        settings = {"encoding": stream.encoding, "line_buffering": stream.line_buffering or stream.write_through}
    file = io.BufferedWriter(_ErrorIgnoringFile(number, "w", closefd=False))
    return io.TextIOWrapper(file, errors="backslashreplace", **settings)


class StepDisplay:
    """Shows the progress and the most important metrics of each step."""

    def __init__(self, console: Console, total_steps: int, first_step: int) -> None:
        self._console = console
        self._total = total_steps
        self._first = first_step
        self._started = self._last_line = time.monotonic()
        self._progress: Progress | None = None
        if console.is_terminal:
            bar = [BarColumn(bar_width=10)] if console.width >= 80 else []
            # A narrow terminal truncates the numbers; step and time left are always complete.
            self._progress = Progress(
                TextColumn("step {task.completed}/{task.total}"),
                *bar,
                TimeRemainingColumn(),
                Numbers(),
                console=console,
            )
            self._task = self._progress.add_task("", total=total_steps, completed=first_step - 1, numbers="")

    @contextmanager
    def displayed(self) -> Iterator["StepDisplay"]:
        """Show the progress bar within the block."""
        if self._progress is None:
            yield self
        else:
            with self._progress:
                yield self

    def update(self, row: dict[str, Any]) -> None:
        """Show a metrics row."""
        if self._progress is not None:
            self._progress.update(self._task, completed=row["step"], numbers=live_numbers(row))
            return
        now = time.monotonic()
        if row["step"] in (self._first, self._total) or now - self._last_line >= PLAIN_LINE_SECONDS:
            self._last_line = now
            done = row["step"] - self._first + 1
            left = (now - self._started) / done * (self._total - row["step"])
            time_left = timedelta(seconds=round(left))
            print(f"step {row['step']}/{self._total}  {live_numbers(row)}  {time_left} left", flush=True)


def live_numbers(row: dict[str, Any]) -> str:
    """The most important numbers of a metrics row, in one line."""
    parts = [name.split("/")[1] for name in row if name.startswith("rewards/") and name.endswith("/mean")]
    components = " ".join(f"{part} {_two_digits(row[f'rewards/{part}/mean'])}" for part in parts)
    numbers = [
        f"reward {_two_digits(row['reward'])} ({components})",
        f"length {row['completions/mean_length']:.0f}",
        "loss -" if row["loss"] is None else f"loss {row['loss']:+.4f}",
    ]
    if row.get("kl") is not None:
        numbers.append(f"kl {row['kl']:.3f}")
    return "  ".join([*numbers, f"{row['step_time']:.1f} s"])


def evaluation_table(title: str, evaluations: Mapping[str, Mapping[str, Any] | None]) -> Table:
    """A table of evaluations (contents of eval/*.json), one column for each, with 95 % intervals."""
    shown = {name: result for name, result in evaluations.items() if result}
    results = list(shown.values())
    # Names of graders and values of columns can contain square brackets, which Rich would read as markup.
    table = Table(title=Text(title))
    table.add_column("")
    for name, result in shown.items():
        table.add_column(Text(f"{name} (n={result['n']})"), justify="right")

    def add(label: str, cells: list[str]) -> None:
        if any(cell != "-" for cell in cells):
            table.add_row(Text(label), *cells)

    add("accuracy", [_share(r["accuracy"], r.get("accuracy_interval")) for r in results])
    for part, key in (("graded", "accuracy"), ("pass@k", "share"), ("maj@k", "share")):
        for name in dict.fromkeys(name for r in results for name in r.get(part) or {}):
            label = f"  {name.replace('_', ' ')}" if part == "graded" else part.replace("k", name)
            found = [(r.get(part) or {}).get(name) or {} for r in results]
            add(label, [_share(each.get(key), each.get("interval")) for each in found])
    if any(r.get("missing") for r in results):
        add("no value", [str(r.get("missing", 0)) for r in results])
    add("reward", [_two_digits(r["reward"]) for r in results])
    for component in dict.fromkeys(name for r in results for name in r["rewards"]):  # a fork may have other components
        table.add_row(Text(f"  {component}"), *(_two_digits(r["rewards"].get(component)) for r in results))
    add("mean length", [f"{r['completions/mean_length']:.1f}" for r in results])
    add("truncated", [_share(r.get("completions/clipped_ratio"), None) for r in results])
    for column in dict.fromkeys(column for r in results for column in r.get("by") or {}):
        of_column = [(r.get("by") or {}).get(column) or {} for r in results]
        for value in dict.fromkeys(value for each in of_column for value in each):
            cells = [each.get(value) or {} for each in of_column]
            add(f"{column}={value}", [_share(cell.get("accuracy"), cell.get("interval")) for cell in cells])
    return table


def _share(value: float | None, interval: Sequence[float] | None) -> str:
    if value is None:
        return "-"
    bounds = f" [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]" if interval else ""
    return f"{value:.1%}{bounds}"


def next_commands(run_dir: Path, foreign: Mapping[str, str], more_steps: str | None) -> str:
    """The text that suggests commands to run next.

    foreign: key -> target of the user's own functions, which must be allowed on the command line. more_steps: the
    override with which the run can be extended; None if it cannot.
    """
    name = path_argument("run_dir", run_dir)
    allow = _allowing(foreign)
    lines = [
        f"run folder: {run_dir}",
        *([f"  report    {run_dir / 'report.html'}"] if (run_dir / "report.html").exists() else []),
        f"  plot      {grpo_command('plot', name)}",
        f"  evaluate  {grpo_command('evaluate', name, *allow)}",
        f"  try it    {grpo_command('chat', name, *allow)}",
    ]
    if more_steps is not None:
        lines.append(f"  resume    {resume_command(run_dir, foreign, more_steps)}")
    return "\n".join(lines)


def resume_command(run_dir: Path, foreign: Mapping[str, str], *more: str) -> str:
    """The command that resumes a run. more: further overrides."""
    return launch_command("resume=true", path_override("run_dir", run_dir), *_allowing(foreign), *more)


def _allowing(foreign: Mapping[str, str]) -> list[str]:
    # ++ works whether or not conf/ has the key
    return [override(f"++{key}", target) for key, target in foreign.items()]


def _two_digits(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
