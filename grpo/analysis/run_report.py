"""The report of one run: report.html, a single file that needs no network."""

import base64
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from grpo.analysis import audit
from grpo.analysis.charts import SHEET, drawn_panels, read_run, write_charts
from grpo.analysis.doctor import Finding, dtype_of, find_problems
from grpo.analysis.load import component_columns, read_config
from grpo.analysis.page import render
from grpo.analysis.summary import difference_text, summarize
from grpo.analysis.target import target_text
from grpo.analysis.wrong_answers import CATEGORIES, why_wrong
from grpo.metric_table import component_ranges, of_components
from grpo.runs.files import write_atomic
from grpo.runs.folder import RunFolder

SHOWN_STEPS = 12  # at most this many sampled steps are shown, evenly spaced from the first to the last
SHOWN_EXAMPLES = 3  # wrong completions of each category
SHOWN_HISTORIES = 5  # problems that are shown through the steps
SHOWN_GROUPS = 3  # groups shown of each of these steps; a group is all completions of one problem


def write_run_report(run_dir: str | Path, output_dir: str | Path | None = None) -> Path:
    """Write report.html into a run's folder and return its path; plots/ and summary.json are written again, too.

    With `output_dir`, all files are written there. Raises FileNotFoundError if `run_dir` is not a run folder,
    ValueError if it has no completed step or is damaged.
    """
    run_dir = Path(run_dir)
    charts = write_charts(run_dir, output_dir)
    (sheet,) = [file for file in charts if file.name == SHEET]
    file = Path(output_dir or run_dir) / "report.html"
    write_atomic(file, render("run.html", **content(run_dir, sheet)))
    return file


def content(run_dir: Path, sheet: Path) -> dict[str, Any]:
    """The variables of the page's template. sheet: the picture of all charts."""
    run = RunFolder(run_dir)
    config = read_config(run_dir)
    summary = summarize(run_dir)
    samples = audit.load_samples(run_dir, SHOWN_STEPS)
    data = read_run(run_dir)
    units = {metric.name: metric.unit for metric in of_components(component_columns(data.metrics))}
    return {
        "title": data.title,
        "summary": summary,
        "units": units,
        "preflight": run.preflight(),
        "findings": findings(run_dir),
        "charts": ", ".join(panel.title for panel in drawn_panels(data)),
        "picture": base64.b64encode(sheet.read_bytes()).decode(),
        "headline": headline(summary),
        "target": summary["target"] and target_text(summary["target"]["accuracy"], summary["target"]["reached"]),
        "evaluations": summary["eval"],
        "wrong": _wrong(run),
        "histories": _histories(run),
        "evaluated": dict.fromkeys(name for each in summary["eval"].values() for name in each["rewards"]),
        "tables": _audit_tables(samples),
        "extremes": _extremes(samples),
        "steps": _completions(samples),
        "components": audit.components(samples),
        "config": yaml.safe_dump(config, sort_keys=False, allow_unicode=True),
    }


def findings(run_dir: str | Path) -> list[Finding]:
    """What the doctor finds in the metrics and evaluations of a run."""
    run = RunFolder(run_dir)
    config = read_config(run_dir)
    after = run.evaluation("after")
    evaluations = [*run.training_evaluations().values(), *([after] if after else [])]
    return find_problems(run.metrics(), evaluations, component_ranges(config), dtype_of(config))


def headline(summary: dict[str, Any]) -> str | None:
    """Test accuracy before and after training and the difference, in one sentence; None without an evaluation."""
    graded = {name: each for name, each in summary["eval"].items() if each["accuracy"] is not None}
    if not graded:
        return None
    scores = ", ".join(f"{each['accuracy']:.1%} {name} training" for name, each in graded.items())
    if summary["accuracy_difference"] is not None:
        return f"Test accuracy: {scores}; {difference_text(summary['accuracy_difference'])}."
    counts = " and ".join(str(n) for n in dict.fromkeys(each["n"] for each in graded.values()))
    return f"Test accuracy: {scores} ({counts} problems)."


def _wrong(run: RunFolder) -> dict[str, Any] | None:
    """Wrong completions before and after training: counts by category, and examples from the latest evaluation."""
    evaluations = {name: run.evaluation(name) for name in ("before", "after")}
    rows = {name: _readable(each) for name, each in evaluations.items() if each}
    found = {name: [(why_wrong(row), row) for row in each] for name, each in rows.items()}
    if not any(category for each in found.values() for category, _ in each):
        return None
    counts = {name: Counter(category for category, _ in each) for name, each in found.items()}
    latest = found[list(found)[-1]]
    examples = {kind: [row for category, row in latest if category == kind][:SHOWN_EXAMPLES] for kind in CATEGORIES}
    return {"meaning": CATEGORIES, "counts": counts, "examples": examples}


def _histories(run: RunFolder) -> list[dict[str, Any]]:
    """Problems through the steps of training: those of every evaluation whose outcome changes most."""
    evaluations = [each for each in run.choosing_evaluations() if each.get("problems")]
    by_problem: dict[str, list[dict[str, Any]]] = {}
    for each in evaluations:
        for row in _readable(each):
            if row.get("sample", 0) == 0:
                by_problem.setdefault(row["problem_id"], []).append({"step": each["step"], **row})
    whole = [rows for rows in by_problem.values() if len(rows) == len(evaluations) > 1]
    changes = [sum(one.get("correct") != other.get("correct") for one, other in pairwise(rows)) for rows in whole]
    ranked = sorted(zip(changes, whole, strict=True), key=lambda pair: -pair[0])[:SHOWN_HISTORIES]
    return [{"prompt": rows[0]["prompt"], "answer": rows[0]["answer"], "rows": rows} for _, rows in ranked]


def _readable(evaluation: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows that have the texts which are shown; those of version 0 have no prompt."""
    texts = ("problem_id", "prompt", "completion", "answer")
    return [row for row in evaluation.get("problems", []) if all(isinstance(row.get(name), str) for name in texts)]


def _audit_tables(samples: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Title -> table with the sampled steps as columns."""
    if samples.empty:
        return {}
    tables = {
        f"Values of {name}, share of completions": audit.distribution(samples, name)
        for name in audit.components(samples)
    }
    if {"answer", "completion"} <= set(samples) and samples["answer"].notna().all():
        tables["Right by the answer block or the last number, share of completions"] = audit.agreement(samples)
    return tables | {"Signs of gaming": audit.signs_of_gaming(samples)}


def _extremes(samples: pd.DataFrame) -> dict[str, list[dict[str, Any]]]:
    if samples.empty:
        return {}
    top, bottom = audit.extremes(samples)
    return {"Highest reward": top.to_dict("records"), "Lowest reward": bottom.to_dict("records")}


def _completions(samples: pd.DataFrame) -> dict[int, list[list[dict[str, Any]]]]:
    """Step -> groups; a group is a list of completions of one problem."""
    if samples.empty:
        return {}
    return {
        int(step): [
            group.to_dict("records")
            for _, group in list(samples[samples["step"] == step].groupby("problem_id", sort=False))[:SHOWN_GROUPS]
        ]
        for step in sorted(samples["step"].unique())
    }
