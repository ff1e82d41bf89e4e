"""The statistics of one run, as `summary.json`."""

import json
import math
from pathlib import Path
from typing import Any

import pandas as pd

from grpo.analysis.accuracy import accuracy_interval, mcnemar_p, pairing_keys
from grpo.analysis.effects import paired_difference
from grpo.analysis.load import (
    component_columns,
    correct_by_problem,
    finite_values,
    is_metric,
    load_metrics,
    read_config,
)
from grpo.analysis.target import time_to_target
from grpo.runs.files import write_atomic
from grpo.runs.folder import RunFolder

# Their values only count up, so a mean or spread of them has no meaning.
COUNTERS = ("step", "iteration", "num_tokens")


def summarize(run_dir: str | Path) -> dict:
    """The statistics of a run, as plain values that are strictly valid JSON (None for an unknown value).

    - `name`: the run folder's name; `state`: that of `status.json`; `steps` and `iterations`: how many are recorded.
    - `metrics`: for each numeric metric `count`, `first`, `last`, `mean`, `std` (sample standard deviation over the
      steps), `min`, `max`, `mean_first_10pct` and `mean_last_10pct` (at least one step), over the steps in which it
      is finite. `reward` and the means of its components also have `best_step`, the first step with their maximum;
      the loss does not, since the GRPO loss does not measure progress.
    - `totals`: `tokens` seen, `seconds` spent in steps.
    - `eval`: `before` and `after`, each only if that evaluation exists, with `accuracy`, `n`, `reward`, `rewards` by
      component and `accuracy_interval` (95 %).
    - `accuracy_difference`: that of the two evaluations, see `accuracy_difference`; None without one of them.
    - `target`: None if the run has none; else `accuracy`, and `reached`, see `time_to_target`, None if it was not.

    Raises FileNotFoundError if `run_dir` is not a run folder, ValueError if one of its files is damaged.
    """
    run_dir = Path(run_dir)
    metrics = load_metrics(run_dir)
    run = RunFolder(run_dir)
    names = [column for column in metrics if is_metric(metrics[column]) and column not in COUNTERS]
    rewards = ["reward", *component_columns(metrics).values()]
    evaluations = run.evaluations()
    return {
        "name": run_dir.resolve().name,
        "state": run.status().get("state"),
        "steps": len(metrics),
        "iterations": int(metrics["iteration"].nunique()),
        "metrics": {name: _statistics(metrics, name, with_best=name in rewards) for name in names},
        "totals": {
            "tokens": _whole(finite_values(metrics, "num_tokens").max()),
            "seconds": _number(finite_values(metrics, "step_time").sum(min_count=1)),
        },
        "eval": {name: _evaluation(evaluations[name]) for name in ("before", "after") if name in evaluations},
        "accuracy_difference": accuracy_difference(evaluations.get("before"), evaluations.get("after")),
        "target": _target(run),
    }


def _target(run: RunFolder) -> dict[str, Any] | None:
    config = read_config(run.path)
    accuracy = (config.get("target") or {}).get("accuracy")
    return None if accuracy is None else {"accuracy": accuracy, "reached": time_to_target(run, config)}


def write_summary(run_dir: str | Path, output_dir: str | Path | None = None) -> Path:
    """Write `summarize(run_dir)` as `summary.json` into the run folder, or into `output_dir`, and return its path."""
    text = json.dumps(summarize(run_dir), indent=2, allow_nan=False) + "\n"
    path = Path(output_dir or run_dir) / "summary.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, text)
    return path


def accuracy_difference(before: dict[str, Any] | None, after: dict[str, Any] | None) -> dict[str, Any] | None:
    """Held-out accuracy after training minus before, over the problems graded in both evaluations; None without any.

    before, after: contents of eval/before.json and eval/after.json. Returns `mean` (-1 to 1), `interval`, its 95 %
    interval [low, high], and `n`, the number of problems. The interval is paired: most problems are as easy or as hard
    after training as before, so it is narrower than those of the two accuracies suggest. With one sample per problem
    also `gained` and `lost`, the numbers of problems that only one of them solves, and `p`, of McNemar's exact test.
    """
    keys = pairing_keys(before, after)
    difference = (correct_by_problem(after, keys) - correct_by_problem(before, keys)).dropna()
    if difference.empty:
        return None
    estimate = paired_difference(difference.to_frame().T)
    low, high = estimate.interval or (-1.0, 1.0)
    found = {"mean": estimate.mean, "interval": [max(-1.0, low), min(1.0, high)], "n": len(difference)}
    one_sample = all(each is not None and each.get("samples", 1) == 1 for each in (before, after))
    if one_sample and difference.isin((-1.0, 0.0, 1.0)).all():
        gained = int((difference == 1.0).sum())
        lost = int((difference == -1.0).sum())
        found |= {"gained": gained, "lost": lost, "p": mcnemar_p(gained, lost)}
    return found


def difference_text(difference: dict[str, Any]) -> str:
    """An `accuracy_difference` with its interval, as text, and whether it shows a difference.

    With one sample per problem McNemar's test decides, which is exact, else the interval.
    """
    low, high = difference["interval"]
    mean, *bounds = (f"{100 * value:+.1f}" for value in (difference["mean"], low, high))
    text = f"{mean} points, 95 % interval {bounds[0]} to {bounds[1]}, paired over {difference['n']} problems"
    if "p" in difference:
        text += f" ({difference['gained']} gained, {difference['lost']} lost; McNemar's p = {difference['p']:.2g})"
    is_shown = difference["p"] < 0.05 if "p" in difference else low > 0 or high < 0
    return text if is_shown else f"{text}; no difference shown"


def _statistics(metrics: pd.DataFrame, name: str, with_best: bool) -> dict:
    values = finite_values(metrics, name).dropna()
    tenth = math.ceil(len(values) / 10)
    statistics = {
        "count": len(values),
        "first": _number(values.iloc[0]) if len(values) else None,
        "last": _number(values.iloc[-1]) if len(values) else None,
        "mean": _number(values.mean()),
        "std": _number(values.std()),
        "min": _number(values.min()),
        "max": _number(values.max()),
        "mean_first_10pct": _number(values.head(tenth).mean()),
        "mean_last_10pct": _number(values.tail(tenth).mean()),
    }
    if with_best:
        statistics["best_step"] = int(metrics.loc[values.idxmax(), "step"]) if len(values) else None
    return statistics


def _evaluation(record: dict) -> dict:
    accuracy = _number(record.get("accuracy"))
    n = _whole(record.get("n"))
    return {
        "accuracy": accuracy,
        "n": n,
        "reward": _number(record.get("reward")),
        "rewards": {component: _number(value) for component, value in (record.get("rewards") or {}).items()},
        "accuracy_interval": accuracy_interval(record),
    }


def _number(value: float | None) -> float | None:
    """A float that JSON can represent: None if the value is missing, NaN or infinite."""
    return None if value is None or not math.isfinite(value) else float(value)


def _whole(value: float | None) -> int | None:
    """A count as an int: None if it is missing, NaN or infinite."""
    return None if value is None or not math.isfinite(value) else int(value)
