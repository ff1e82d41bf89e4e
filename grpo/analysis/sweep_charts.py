"""The charts of a sweep, as matplotlib figures."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from grpo.analysis.load import finite_values
from grpo.analysis.sweep import Arm, SweepAnalysis
from grpo.analysis.theme import BLUE, OTHERS, PALETTE, TEXT, legend, new_figure, style
from grpo.runs.sweep_folder import short

MOST_ARMS = len(PALETTE)  # number of arms that get a colour of their own


def curves(sweep: SweepAnalysis, column: str, title: str, unit: str) -> Figure | None:
    """A metric by step, one line per arm: the mean over its seeds, with a band from the lowest to the highest."""
    tables = [_by_step(sweep, arm, column) for arm in sweep.arms]
    window = max(1, max(map(len, tables)) // 20)
    smooth = [table.rolling(window, center=True, min_periods=1).mean() for table in tables]
    title += f", mean of {window} steps" if window > 1 else ""
    return _lines(sweep, [table if table.notna().any(axis=None) else None for table in smooth], title, unit)


def accuracy(sweep: SweepAnalysis) -> Figure | None:
    """Accuracy by step, the mean over an arm's jobs, for arms evaluated during training (eval.every)."""
    tables = []
    for arm in sweep.arms:
        evaluations = pd.concat([sweep.evaluations(job).assign(job=job) for job in arm.jobs])
        tables.append(evaluations.pivot_table(index="step", columns="job", values="accuracy"))
    shown = [table if len(table) > 2 else None for table in tables]  # more than before and after training
    return _lines(
        sweep, shown, _outcome(sweep).capitalize(), "band: lowest to highest seed", percent=True, marker="o", ms=3
    )


def _lines(
    sweep: SweepAnalysis, tables: list[pd.DataFrame | None], title: str, unit: str, percent: bool = False, **marks: Any
) -> Figure | None:
    """Draw a line for each arm that has a table (steps in rows, jobs in columns); returns None if no arm has one."""
    figure = new_figure()
    axes = figure.subplots()
    for color, arm, table in zip(PALETTE, sweep.arms, tables, strict=False):
        if table is None:
            continue
        label = f"{sweep.label(arm)} ({len(arm.jobs)})"
        axes.plot(table.index, table.mean(axis=1), color=color, linewidth=2, label=label, **marks)
        if len(arm.jobs) > 1:
            axes.fill_between(table.index, table.min(axis=1), table.max(axis=1), color=color, alpha=0.15, lw=0)
    if not axes.lines:
        return None
    style(axes, title, unit, percent=percent)
    legend(axes, "arm (jobs)" if len(sweep.arms) <= MOST_ARMS else f"the best {MOST_ARMS} arms (jobs)")
    return figure


def cost(sweep: SweepAnalysis) -> Figure:
    """The outcome of each job against the tokens of its training, and of each arm with its interval."""
    figure = new_figure()
    axes = figure.subplots()
    outcome = "accuracy" if sweep.by_accuracy else "mean_reward"
    for number, arm in enumerate(sweep.arms):
        color = PALETTE[number] if number < MOST_ARMS else OTHERS
        jobs = sweep.jobs.loc[list(arm.jobs)]
        axes.scatter(jobs["num_tokens"], jobs[outcome], color=color, alpha=0.4, s=18)
        estimate = arm.outcome
        center = jobs["num_tokens"].mean()
        if estimate.interval is not None:
            axes.plot([center, center], estimate.interval, color=color)
        label = sweep.label(arm) if number < MOST_ARMS else "others" if number == MOST_ARMS else None
        axes.scatter([center], [estimate.mean], color=color, marker="D", s=36, label=label)
    style(axes, "Outcome and cost", _outcome(sweep), "tokens seen in training", percent=sweep.by_accuracy)
    legend(axes, "diamond: arm with its interval\ndots: jobs")
    return figure


def heat_map(sweep: SweepAnalysis) -> Figure:
    """The mean outcome for each pair of values of the two swept keys."""
    rows, columns = sweep.keys
    frame = pd.DataFrame([(*arm.values, arm.outcome.mean) for arm in sweep.arms], columns=[rows, columns, "outcome"])
    table = frame.pivot(index=rows, columns=columns, values="outcome")
    table = table.reindex(index=_in_order(sweep, rows), columns=_in_order(sweep, columns))
    figure = new_figure(width=1.6 * len(table.columns) + 2.5, height=0.8 * len(table) + 1.6)
    axes = figure.subplots()
    axes.imshow(table.to_numpy(float), cmap="Blues", aspect="auto")
    middle = np.nanmean([table.min(axis=None), table.max(axis=None)])
    for i, j in np.argwhere(table.notna().to_numpy()):
        value = table.iat[i, j]
        text = f"{value:.1%}" if sweep.by_accuracy else f"{value:.3g}"
        axes.text(j, i, text, ha="center", va="center", color="white" if value > middle else TEXT)
    axes.set_xticks(range(len(table.columns)), map(short, table.columns))
    axes.set_yticks(range(len(table)), map(short, table.index))
    axes.set(xlabel=columns, ylabel=rows)
    axes.set_title(f"Mean {_outcome(sweep)}", loc="left", fontsize=11, color=TEXT)
    return figure


def parallel_coordinates(sweep: SweepAnalysis) -> Figure:
    """Each arm as a line through its values; a better outcome gives a darker line."""
    figure = new_figure(width=1.8 * (len(sweep.keys) + 1) + 1)
    axes = figure.subplots()
    outcomes = np.array([arm.outcome.mean for arm in sweep.arms])
    share = (outcomes - outcomes.min()) / (np.ptp(outcomes) or 1)
    orders = [_in_order(sweep, key) for key in sweep.keys]
    for arm, height in sorted(zip(sweep.arms, share, strict=True), key=lambda pair: pair[1]):
        heights = [order.index(v) / max(1, len(order) - 1) for order, v in zip(orders, arm.values, strict=True)]
        axes.plot([*heights, height], color=BLUE, alpha=0.15 + 0.85 * height, lw=1 + 1.5 * height)
    white = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}
    for position, order in enumerate(orders):
        for number, value in enumerate(order):
            place = (position - 0.04, number / max(1, len(order) - 1))
            axes.text(*place, short(value), ha="right", va="center", fontsize=8, bbox=white)
    form = "{:.1%}" if sweep.by_accuracy else "{:.3g}"
    for height, value in ((0, outcomes.min()), (1, outcomes.max())):
        axes.text(len(orders) + 0.04, height, form.format(value), ha="left", va="center", fontsize=8)
    axes.set_xticks(range(len(orders) + 1), [*sweep.keys, _outcome(sweep)])
    axes.set(yticks=[], xlim=(-0.6, len(orders) + 0.6))
    axes.set_title("Every arm", loc="left", fontsize=11, color=TEXT)
    for position in range(len(orders) + 1):
        axes.axvline(position, color=OTHERS, lw=1, zorder=0)
    return figure


def _by_step(sweep: SweepAnalysis, arm: Arm, column: str) -> pd.DataFrame:
    columns = {}
    for job in arm.jobs:
        metrics = sweep.metrics(job)
        columns[job] = finite_values(metrics, column).set_axis(metrics["step"])
    return pd.DataFrame(columns)


def _in_order(sweep: SweepAnalysis, key: str) -> list[str]:
    """The values of a swept key: sorted if all are numbers, else in the order in which they were given."""
    values = list(dict.fromkeys(sweep.jobs[key].dropna()))
    try:
        return sorted(values, key=float)
    except ValueError:
        return values


def _outcome(sweep: SweepAnalysis) -> str:
    return f"{sweep.split} accuracy" if sweep.by_accuracy else "reward of the last tenth"
