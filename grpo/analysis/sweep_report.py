"""The report of a sweep: report.html, a single file that needs no network, and sweep.csv."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import matplotlib

from grpo.analysis import sweep_charts
from grpo.analysis.page import embedded, render
from grpo.analysis.sweep import SweepAnalysis, verdict
from grpo.runs.files import write_atomic
from grpo.runs.halving_state import SEED, HalvingState
from grpo.runs.sweep_folder import short

FEW_SEEDS = 3


def write_sweep_report(path: str | Path, output_dir: str | Path | None = None) -> tuple[list[Path], str]:
    """Write report.html and sweep.csv into a sweep's folder or `output_dir`; return their paths and the headline.

    Raises FileNotFoundError if `path` is not a sweep folder.
    """
    sweep = SweepAnalysis(path)
    folder = Path(output_dir or sweep.folder.path)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "sweep.csv", sweep.jobs.to_csv())
    page = render("sweep.html", **content(sweep, folder))
    write_atomic(folder / "report.html", page)
    return [folder / "report.html", folder / "sweep.csv"], headline(sweep)


def content(sweep: SweepAnalysis, output_dir: Path) -> dict[str, Any]:
    """The variables of the template of the page, which is written into `output_dir`."""
    states = sweep.jobs["state"].value_counts()
    with matplotlib.rc_context({"text.parse_math": False}):  # a value may contain a dollar sign
        charts = {name: embedded(figure) for name, figure in _charts(sweep).items()}
    return {
        "title": f"Sweep {sweep.folder.path.resolve().name}",
        "counts": ", ".join(f"{_count(count, 'job')} {state}" for state, count in states.items()),
        "outcome": f"{sweep.split} accuracy" if sweep.by_accuracy else "mean reward of the last tenth of the steps",
        "unit": ", points" if sweep.by_accuracy else "",
        "headline": headline(sweep),
        "warnings": warnings(sweep),
        "commands": sweep.commands() if sweep.arms else None,
        "budget": _budget(sweep),
        "effects": sweep.effects(),
        "reward_effects": sweep.effects(in_reward=True) if sweep.by_accuracy else [],
        "arms": [
            {
                "label": sweep.label(arm),
                "jobs": len(arm.jobs),
                "outcome": arm.outcome,
                "gap_to_best": sweep.gap_to_best.get(arm),
            }
            for arm in sweep.arms
        ],
        "charts": charts,
        "table": {"columns": ["job", *sweep.jobs.columns.drop(["folder", "error"])], "rows": _rows(sweep, output_dir)},
        "failed": [{"job": job, **row} for job, row in sweep.unfinished[["folder", "state", "error"]].iterrows()],
        "short": short,
        "verdict": verdict,
        "form": _form(sweep),
        "change": (lambda value: f"{100 * value:+.1f}") if sweep.by_accuracy else _change,
        "reward_change": _change,
    }


def _form(sweep: SweepAnalysis) -> Callable[[float], str]:
    return (lambda value: f"{value:.1%}") if sweep.by_accuracy else (lambda value: f"{value:.3f}")


def _change(value: float) -> str:
    return f"{value:+.3f}"


def headline(sweep: SweepAnalysis) -> str:
    """The result of the sweep in one or two sentences."""
    if not sweep.arms:
        return "No job has finished, so there is nothing to compare."
    best = sweep.arms[0]
    form = _form(sweep)
    outcome = best.outcome
    interval = ", 95 % interval {} to {}".format(*map(form, outcome.interval)) if outcome.interval is not None else ""
    of_split = f"{form(outcome.mean)} {sweep.split} accuracy"
    score = of_split if sweep.by_accuracy else f"a mean reward of {form(outcome.mean)}"
    if not sweep.keys:
        return f"{score[0].upper()}{score[1:]}{interval}, over {_count(len(best.jobs), 'seed')}."
    if sweep.by_accuracy and all(arm.outcome.mean == 0 for arm in sweep.arms):
        return f"No arm solved a {sweep.split} problem, so none can be called best."
    text = f"Best: {sweep.label(best)} with {score}{interval}{_on_test(sweep)}."
    if len(sweep.arms) == 1:
        return text
    if not sweep.gap_to_best:
        return f"{text} It shares no seed or problem with another arm, so it was not compared."
    others = len(sweep.arms) - 1
    if len(sweep.gap_to_best) == others and all(arm.outcome.mean == outcome.mean for arm in sweep.arms):
        every = "Both" if others == 1 else f"All {len(sweep.arms)}"
        return f"{every} arms have the same result, {score}, so none can be called best."
    even = [sweep.label(arm) for arm, difference in sweep.gap_to_best.items() if not difference.excludes_zero]
    if even:
        count = f"{len(even)} of the {others} other arms" if others > 1 else "the other arm"
        named = "; ".join(even[:4]) + ("; ..." if len(even) > 4 else "")
        return f"{text} Not shown to be better than {count} ({named})."
    above = (
        "every other arm"
        if len(sweep.gap_to_best) == others
        else f"{len(sweep.gap_to_best)} of the {others} other arms"
    )
    single = sum(difference.seeds == 1 for difference in sweep.gap_to_best.values())
    if single == len(sweep.gap_to_best):
        return f"{text} With the one seed that they share it is above {above}; another seed may give another order."
    rest = f"; of {single} of them by one seed alone" if single else ""
    return f"{text} It is above {above} by more than chance explains{rest}."


def _on_test(sweep: SweepAnalysis) -> str:
    """The best arm's accuracy on the test problems, to be added to that on the validation problems."""
    found = sweep.test_accuracy
    if found is None:
        return ""
    interval = " ({:.1%} to {:.1%})".format(*found.interval) if found.interval is not None else ""
    return f"; on the test problems {found.mean:.1%}{interval}"


def _count(count: int, what: str) -> str:
    return f"{count} {what}{'s' if count != 1 else ''}"


def warnings(sweep: SweepAnalysis) -> list[str]:
    """The limits of the comparison that a reader of the headline should know."""
    messages = []
    if sweep.arms_tried > 1 and sweep.arms:
        messages.append(
            f"The score of the best of {sweep.arms_tried} arms is too high on average, since it chose the arm. "
            + ("Its test accuracy is not, for these seeds; the" if sweep.test_accuracy else "The")
            + " command on fresh seeds gives a fair one."
        )
    # The largest number of seeds in a comparison; without comparisons, the number of jobs of the best arm.
    seeds = max(
        (each.seeds for each in sweep.gap_to_best.values()), default=len(sweep.arms[0].jobs) if sweep.arms else 0
    )
    if seeds == 1:
        fix = "add seed=1,2,3" if SEED not in sweep.swept else "let the jobs of other seeds finish"
        messages.append(f"With one seed the intervals cover new problems, not new training runs; {fix}.")
    elif 1 < seeds < FEW_SEEDS:
        messages.append(f"{seeds} seeds say little about how training runs vary; use at least three.")
    apart = len(sweep.arms) - 1 - len(sweep.gap_to_best)
    if sweep.arms and apart > 0:
        messages.append(f"Not compared, because they share no seed or problem with the best: {apart} arms.")
    if len(sweep.unfinished) and sweep.arms:
        messages.append(
            f"Not included, because they did not finish: {len(sweep.unfinished)} of {_count(len(sweep.jobs), 'job')}."
        )
    if sweep.arms and not sweep.by_accuracy:
        messages.append(
            "Not every finished job has an evaluation on the same problems (eval.after), so rewards in training are "
            "compared."
        )
    return messages


def _budget(sweep: SweepAnalysis) -> dict[str, Any] | None:
    """For a sweep by halving, its rungs and the time spent, with a label for each arm; else None."""
    record = HalvingState.read(sweep.folder.path)
    if record is None:
        return None
    values = sweep.jobs.loc[[jobs[0] for jobs in record.arms], sweep.keys]
    labels = [" ".join(f"{key}={short(value)}" for key, value in row.items()) for _, row in values.iterrows()]
    return record.summary() | {"labels": labels}


def _charts(sweep: SweepAnalysis) -> dict[str, Any]:
    if not sweep.arms:
        return {}
    figures = {
        "Reward by step": sweep_charts.curves(sweep, "reward", "Reward", "band: lowest to highest seed"),
        "Accuracy by step": sweep_charts.accuracy(sweep),
        "Completion length by step": sweep_charts.curves(sweep, "completions/mean_length", "Output length", "tokens"),
        "Outcome against cost": sweep_charts.cost(sweep),
    }
    if len(sweep.keys) == 2 and sweep.is_grid:
        figures["Both keys"] = sweep_charts.heat_map(sweep)
    elif len(sweep.keys) > 1:
        figures["All keys"] = sweep_charts.parallel_coordinates(sweep)
    return {name: figure for name, figure in figures.items() if figure is not None}


def _rows(sweep: SweepAnalysis, output_dir: Path) -> list[dict[str, Any]]:
    """For each job its table cells, and the link from `output_dir` to its own report if it has one."""
    rows = []
    jobs = sweep.jobs.drop(columns=["folder", "error"])
    shares = [column.endswith("accuracy") or column.startswith("accuracy") for column in jobs]
    for job, *values in jobs.itertuples():
        folder = sweep.jobs.loc[job, "folder"]
        report = sweep.folder.path / str(folder) / "report.html"
        has_report = bool(folder) and report.is_file()
        link = quote(Path(os.path.relpath(report, output_dir)).as_posix())
        cells = [_cell(value, is_share) for value, is_share in zip(values, shares, strict=True)]
        rows.append({"job": job, "cells": cells, "report": link if has_report else None})
    return rows


def _cell(value: object, is_share: bool) -> str:
    if value is None or value != value:  # NaN
        return ""
    if not isinstance(value, float):
        return short(str(value))
    if is_share:
        return f"{value:.1%}"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
