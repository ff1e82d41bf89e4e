"""Reads the records of run folders into data frames.

The columns have the metric names of `metrics/metrics.jsonl`.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from grpo.analysis.accuracy import accuracy_interval
from grpo.runs.folder import RunFolder

METRICS_FILE = Path("metrics", "metrics.jsonl")


def load_runs(path: str | Path) -> pd.DataFrame:
    """The metrics of one run, or of every run below a folder such as a sweep: one row per step.

    The first column, `run`, is the run folder relative to `path`, or the folder's name if `path` itself is a run. The
    other columns are the metrics, NaN in rows that do not have them. Runs are sorted by name; the rows of a run are in
    the order in which they were written.

    Raises FileNotFoundError if there is no run, ValueError if a metrics file is damaged; an incomplete last line is
    ignored.
    """
    path = Path(path)
    rows: list[dict[str, Any]] = []
    for name, run_dir in sorted(_find_runs(path).items()):
        rows.extend({**row, "run": name} for row in RunFolder(run_dir).metrics())
    return _frame(rows, ["run", "step", "iteration"])


def load_metrics(run_dir: str | Path) -> pd.DataFrame:
    """The metrics of one run folder, one row per step; empty if the run has completed no step.

    Raises FileNotFoundError if `run_dir` is not a run folder, ValueError if its metrics file is damaged.
    """
    run_dir = Path(run_dir)
    if (run_dir / METRICS_FILE).is_file():
        return _frame(RunFolder(run_dir).metrics(), ["step", "iteration"])
    # A run that stopped before its first step has no metrics file yet.
    if not any((run_dir / name).is_file() for name in ("config.yaml", "status.json")):
        raise FileNotFoundError(f"{run_dir} is no run folder: it has no config.yaml, status.json or {METRICS_FILE}")
    return _frame([], ["step", "iteration"])


def load_evaluations(run_dir: str | Path, of_training: bool = False) -> pd.DataFrame:
    """The evaluations of a run, one row per file in `eval/`; empty if there are none.

    Columns: `name` (the file's name without its ending: before, step_000050, after), `split`, `step`, `n` (problems),
    `accuracy` (0 to 1), `accuracy_low` and `accuracy_high` (its 95 % interval), `reward`, `rewards/<component>` and any
    other single value of the file. Sorted by step, `before` first and `after` last. of_training: without those of
    `grpo evaluate`, which may be of other problems.
    Raises ValueError if a file is damaged.
    """
    rows = []
    for name, record in RunFolder(run_dir).evaluations().items():
        if of_training and not re.fullmatch(r"before|step_\d+|after", name):
            continue
        row = {"name": name} | {key: value for key, value in record.items() if not isinstance(value, (dict, list))}
        row["accuracy_low"], row["accuracy_high"] = accuracy_interval(record) or (None, None)
        row |= {f"rewards/{component}": value for component, value in (record.get("rewards") or {}).items()}
        rows.append(row)
    return _frame(rows, ["name", "split", "step", "n", "accuracy", "reward"])


def correct_by_problem(evaluation: dict[str, Any] | None, keys: Sequence[str] = ("problem_id", "answer")) -> pd.Series:
    """1 (right) or 0 (wrong) for each graded problem of an evaluation, or the share of right samples; may be empty.

    keys: those that identify a problem (`accuracy.pairing_keys`); the index contains their values.
    """
    problems = (evaluation or {}).get("problems") or []
    graded = [each for each in problems if each.get("correct") is not None]
    names = [json.dumps([each.get(key) for key in keys]) for each in graded]
    samples = pd.Series([float(each["correct"]) for each in graded], index=names, dtype=float)
    return samples.groupby(level=0, sort=False).mean()


def read_config(run_dir: str | Path) -> dict:
    """A run's config with the changes of later launches, as plain dicts and lists; empty if there is none."""
    run = RunFolder(run_dir)
    if not run.started():
        return {}
    from omegaconf import OmegaConf

    values: Any = OmegaConf.to_container(run.frozen_config(complete=False), resolve=True)  # a dict
    return values


def finite_values(metrics: pd.DataFrame, column: str) -> pd.Series:
    """A metric as floats, NaN if missing, null or infinite; all NaN if the column does not exist or has no numbers.

    One infinite gradient norm would otherwise make every mean and every axis infinite.
    """
    if column not in metrics or not is_metric(metrics[column]):
        return pd.Series(np.nan, index=metrics.index, name=column)
    return metrics[column].astype(float).replace([np.inf, -np.inf], np.nan)


def is_metric(values: pd.Series) -> bool:
    """Whether a column holds numbers, and not digests or flags."""
    return pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values)


def component_columns(metrics: pd.DataFrame) -> dict[str, str]:
    """The reward components of a run: name -> column of its mean, in the order of the columns."""
    prefix = "rewards/"
    suffix = "/mean"
    columns = [column for column in metrics if column.startswith(prefix) and column.endswith(suffix)]
    return {column.removeprefix(prefix).removesuffix(suffix): column for column in columns}


def _find_runs(path: Path) -> dict[str, Path]:
    """Run name -> run folder for `path` itself or, if it is not a run folder, for all runs below it."""
    if (path / METRICS_FILE).is_file():
        return {path.resolve().name: path}
    if not path.is_dir():
        raise FileNotFoundError(f"no run found: there is no folder {path}")
    run_dirs = [file.parents[1] for file in path.rglob(str(METRICS_FILE))]
    if not run_dirs:
        raise FileNotFoundError(f"no run found: no {METRICS_FILE} in {path} or in any folder below it")
    return {run_dir.relative_to(path).as_posix(): run_dir for run_dir in run_dirs}


def _frame(rows: list[dict], first_columns: list[str]) -> pd.DataFrame:
    """The rows as a frame that begins with `first_columns`, which exist even if no row has them."""
    frame = pd.DataFrame(rows)
    frame = frame.reindex(columns=[*first_columns, *(column for column in frame if column not in first_columns)])
    # A column of nulls only would have the dtype `object`, in which arithmetic and plotting fail.
    return frame.astype({column: float for column in frame if len(frame) and frame[column].isna().all()})
