"""The charts of one run, as PNG files. A file shows one or more of the panels in `PANELS`."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from grpo.analysis.load import (
    component_columns,
    finite_values,
    load_evaluations,
    load_metrics,
    read_config,
)
from grpo.analysis.summary import write_summary
from grpo.analysis.theme import (
    BLUE,
    GREEN,
    GREY,
    MUTED,
    ORANGE,
    PINK,
    RED,
    SKY,
    TEXT,
    VIOLET,
    legend,
    new_figure,
    style,
)
from grpo.metric_table import Metric, component_ranges, of_components
from grpo.runs.files import write_atomic

DPI = 120
SMALL = (9.0, 5.4)  # inches
TALL = (9.0, 7.0)
SHEET = "training_progress.png"  # all panels, in two columns
OF_SHEET = (5.6, 3.5)  # one of them
COLORS = {
    "loss": RED,
    "reward": BLUE,
    "correctness": GREEN,
    "format": ORANGE,
    "completions/mean_length": VIOLET,
    "completions/clipped_ratio": RED,
    "validation": BLUE,
    "test": ORANGE,
    "train": GREY,
    "kl": PINK,
    "entropy": GREEN,
    "grad_norm": SKY,
}
MARKERS = {"validation": "o", "test": "D", "train": "s"}
ACCURACY = "Accuracy"  # title of a panel
OTHER_COMPONENTS = (PINK, SKY, VIOLET, RED, GREY)


@dataclass(frozen=True)
class RunData:
    """The data for the panels of one run."""

    title: str
    metrics: pd.DataFrame
    evaluations: pd.DataFrame
    length_limit: int | None  # tokens
    maxima: dict[str, float]  # highest value of each reward component that declares its range; `reward`: of their sum
    window: int  # steps in the running mean, odd; 1: no smoothing, as there are too few steps

    @property
    def steps(self) -> pd.Series:
        """The step of each row."""
        return self.metrics["step"]

    def has(self, column: str) -> bool:
        """Whether a metric has a finite value in any step."""
        return bool(finite_values(self.metrics, column).notna().any())

    def smooth(self, column: str) -> pd.Series:
        """The running mean of a metric."""
        return finite_values(self.metrics, column).rolling(self.window, center=True, min_periods=1).mean()

    def curves(self, title: str) -> list[Metric]:
        """The metrics of the panel with this title."""
        return [metric for metric in of_components(component_columns(self.metrics)) if metric.panel == title]

    def color(self, metric: Metric) -> str:
        """The colour of a metric's curve; a component that COLORS does not have gets one of OTHER_COMPONENTS."""
        others = [name for name in component_columns(self.metrics) if name not in COLORS]
        name = metric.label if metric.name.startswith("rewards/") else metric.name
        return COLORS.get(name) or OTHER_COMPONENTS[others.index(name) % len(OTHER_COMPONENTS)]

    @property
    def step_range(self) -> tuple[float, float]:
        """The limits of the step axis: the same in every panel, so that panels can be compared."""
        steps = [*self.steps, *self.evaluations["step"].dropna()]
        margin = max(0.5, 0.03 * (max(steps) - min(steps)))
        return min(steps) - margin, max(steps) + margin

    @property
    def iteration_starts(self) -> list[int]:
        """The first step of each outer iteration except the first; empty if the lines would hide the curves."""
        starts = self.metrics.groupby("iteration")["step"].min().sort_values().tolist()[1:]
        return starts if len(starts) <= 20 else []

    @property
    def note(self) -> str:
        """A note for the reader that explains faint, strong and dotted lines."""
        notes = [f"faint: each step, strong: mean of {self.window} steps"] if self.window > 1 else []
        notes += ["dotted: a new iteration"] if self.iteration_starts else []
        return "; ".join(notes)


def write_charts(run_dir: str | Path, output_dir: str | Path | None = None) -> list[Path]:
    """Draw `loss.png`, `reward.png`, `output_length.png`, `loss_vs_reward.png` and `training_progress.png` of a run.

    The charts are written to `run_dir/plots/` and `summary.json` to `run_dir`. With `output_dir`, which is created if
    needed, all files are written there. Returns the paths of the files, that of the summary last.

    Raises FileNotFoundError if `run_dir` is not a run folder, ValueError if it has no completed step or is damaged.
    """
    run = read_run(Path(run_dir))
    plots_dir = Path(output_dir) if output_dir else Path(run_dir, "plots")
    plots_dir.mkdir(parents=True, exist_ok=True)
    everything = drawn_panels(run)
    width, height = OF_SHEET
    figures = {
        "loss.png": draw(run, [LOSS], *SMALL),
        "reward.png": draw(run, [REWARD], *SMALL),
        "output_length.png": draw(run, [LENGTH, TRUNCATED], *TALL),
        "loss_vs_reward.png": draw(run, [LOSS_VS_REWARD], *SMALL),
        SHEET: draw(run, everything, 2 * width, height * math.ceil(len(everything) / 2), columns=2),
    }
    for name, figure in figures.items():
        write_atomic(plots_dir / name, png(figure))
    return [*(plots_dir / name for name in figures), write_summary(run_dir, output_dir)]


def drawn_panels(run: RunData) -> "list[Panel]":
    """The panels that have data, and those that are always drawn."""
    return [panel for panel in PANELS if panel.is_always_drawn or panel.has_data(run)]


def read_run(run_dir: Path) -> RunData:
    """Read the data for the panels from a run folder.

    Raises FileNotFoundError if `run_dir` is not a run folder, ValueError if it has no completed step or is damaged.
    """
    metrics = load_metrics(run_dir)
    if metrics.empty:
        raise ValueError(f"{run_dir} has no completed step, so there is nothing to plot yet")
    config = read_config(run_dir)
    folder = run_dir.resolve().name
    name = config.get("name")
    ranges = component_ranges(config)
    return RunData(
        title=f"{name} · {folder}" if name and name != folder else folder,
        metrics=metrics,
        evaluations=load_evaluations(run_dir, of_training=True),
        length_limit=(config.get("grpo") or {}).get("max_completion_length"),
        maxima={component: high for component, (_, high) in ranges.items()},
        window=1 if len(metrics) < 10 else max(5, len(metrics) // 20) // 2 * 2 + 1,
    )


def png(figure: Figure) -> bytes:
    """The content of a PNG file of a figure."""
    picture = BytesIO()
    figure.savefig(picture, format="png", dpi=DPI)
    return picture.getvalue()


def draw(run: RunData, panels: "list[Panel]", width: float, height: float, columns: int = 1) -> Figure:
    """Draw panels as one figure; width and height in inches."""
    figure = new_figure(run.title, width, height, fitted=False)
    axes = figure.subplots(math.ceil(len(panels) / columns), columns, squeeze=False).flatten()
    labels = [""]
    for ax, panel in zip(axes, panels, strict=False):
        panel.draw(ax, run)
        legend(ax, beside=columns == 1)
        labels += ax.get_legend_handles_labels()[1]
    for ax in axes[len(panels) :]:
        ax.remove()
    if run.note and any(panel.by_step for panel in panels):
        figure.text(1 - 0.15 / width, 0.1 / height, run.note, ha="right", fontsize=8, color=MUTED)
    beside = 0.5 + 0.07 * max(map(len, labels)) if columns == 1 and any(labels) else 0.0  # of the legend
    _set_margins(figure, len(axes) // columns, columns, right=0.25 + min(beside, 0.4 * width))
    return figure


def _set_margins(figure: Figure, rows: int, columns: int, right: float) -> None:
    """Set the space around and between the panels, with the right margin in inches."""
    width, height = figure.get_size_inches()
    left = 0.95
    bottom = 0.75
    top = 0.8
    between_rows = 0.95
    panel_width = (width - left - right - (columns - 1) * left) / columns
    panel_height = (height - bottom - top - (rows - 1) * between_rows) / rows
    figure.subplots_adjust(
        left=left / width,
        right=1 - right / width,
        bottom=bottom / height,
        top=1 - top / height,
        wspace=left / panel_width,
        hspace=between_rows / panel_height,
    )


@dataclass(frozen=True)
class Panel:
    """A chart: curves of the metrics whose `panel` in the metric table is its title, and what `extra` adds."""

    title: str
    is_always_drawn: bool = False
    percent: bool = False
    xlabel: str = "step"
    ylabel: str | None = None  # None: the unit of the metrics
    extra: "Callable[[Axes, RunData], None] | None" = None

    @property
    def by_step(self) -> bool:
        """Whether the x axis is the step."""
        return self.xlabel == "step"

    def has_data(self, run: RunData) -> bool:
        """Whether the run has data for this panel."""
        if self.title == ACCURACY:  # from evaluations, so it is not in the metric table
            return bool(run.evaluations["accuracy"].notna().any())
        return any(run.has(metric.name) for metric in run.curves(self.title))

    def draw(self, ax: Axes, run: RunData) -> None:
        """Draw the panel on empty axes."""
        metrics = run.curves(self.title)
        unit = metrics[0].unit if metrics else ""
        style(ax, self.title, unit if self.ylabel is None else self.ylabel, self.xlabel, self.percent)
        for metric in metrics:
            # Metrics without a colour, such as the shortest completion, are drawn by `extra`.
            if run.has(metric.name) and (metric.name in COLORS or metric.name.startswith("rewards/")):
                self._curve(ax, run, metric)
        if self.extra is not None:
            self.extra(ax, run)
        if self.by_step:
            ax.set_xlim(run.step_range)
            for start in run.iteration_starts:
                ax.axvline(start - 0.5, color=MUTED, linewidth=1, linestyle=":")
        if not ax.has_data():
            ax.text(0.5, 0.5, "nothing recorded", transform=ax.transAxes, ha="center", va="center", color=MUTED)

    def _curve(self, ax: Axes, run: RunData, metric: Metric) -> None:
        """Draw a metric over the steps: the values faint, their running mean strong."""
        color = run.color(metric)
        if run.window > 1:
            ax.plot(run.steps, finite_values(run.metrics, metric.name), color=color, alpha=0.28, linewidth=0.8)
        marker = "o" if run.window == 1 else None  # a line through a single step would be invisible
        label = metric.label or None
        # The combined reward is drawn first and broader, so that it is seen behind a component with the same values.
        width = 4 if metric.name == "reward" else 2
        look: dict[str, Any] = {"linewidth": width, "marker": marker, "markersize": width + 3}
        ax.plot(run.steps, run.smooth(metric.name), color=color, label=label, **look)


def reward(ax: Axes, run: RunData) -> None:
    """Add the highest value that each curve can reach, and the reward on validation and test problems."""
    colors = {metric.label: run.color(metric) for metric in run.curves("Reward")}
    for name, maximum in run.maxima.items():
        if name in colors:
            ax.axhline(maximum, color=colors[name], linewidth=1, linestyle=(0, (4, 3)), alpha=0.7)
            place: dict[str, Any] = {"xy": (0, maximum), "xycoords": ax.get_yaxis_transform(), "xytext": (4, 3)}
            style_of_text: dict[str, Any] = {"textcoords": "offset points", "fontsize": 8, "color": colors[name]}
            ax.annotate(f"max {maximum:g}", **place, **style_of_text)
    for split, evaluated in run.evaluations.dropna(subset=["reward"]).groupby("split"):
        marker: dict[str, Any] = {"marker": MARKERS[split], "markeredgecolor": "white", "linestyle": "none"}
        ax.plot(evaluated["step"], evaluated["reward"], color=TEXT, label=f"reward, {split}", zorder=4, ms=7, **marker)
    low, high = ax.get_ylim()
    ax.set_ylim(min(low, 0), high)


def length(ax: Axes, run: RunData) -> None:
    """Add the band from the shortest to the longest completion, and the length limit."""
    low, high = (finite_values(run.metrics, f"completions/{end}_length") for end in ("min", "max"))
    color = COLORS["completions/mean_length"]
    if (low.notna() & high.notna()).any():
        ax.fill_between(run.steps, low, high, color=color, alpha=0.13, linewidth=0, label="shortest to longest")
        if len(run.steps) == 1:  # a band over one step has no area
            ax.vlines(run.steps, low, high, color=color, alpha=0.3, linewidth=6)
    if run.length_limit:
        dashes: dict[str, Any] = {"color": MUTED, "linewidth": 1, "linestyle": (0, (4, 3))}
        ax.axhline(run.length_limit, **dashes, label=f"limit ({run.length_limit})")
    ax.set_ylim(bottom=0)


def truncated(ax: Axes, run: RunData) -> None:
    """Scale the y axis to the largest share, with room above it, so that small shares can be read."""
    top = min(1.0, max(0.1, 1.2 * finite_values(run.metrics, "completions/clipped_ratio").max()))
    ax.set_ylim(-0.03 * top, 1.03 * top)


def accuracy(ax: Axes, run: RunData) -> None:
    """Draw the accuracy on validation and on test problems with its 95 % intervals."""
    for split, points in run.evaluations.dropna(subset=["accuracy"]).groupby("split"):
        values = points["accuracy"].to_numpy()
        bounds = points[["accuracy_low", "accuracy_high"]].astype(float).to_numpy().T
        bounds = np.where(np.isnan(bounds), values, bounds)
        counts = " or ".join(str(n) for n in sorted({int(n) for n in points["n"].dropna()}))
        marks: dict[str, Any] = {"color": COLORS[split], "marker": MARKERS[split], "markersize": 6, "linewidth": 1.5}
        marks |= {"ecolor": MUTED, "elinewidth": 1, "capsize": 4, "label": f"{split} ({counts} problems)"}
        ax.errorbar(points["step"], values, yerr=np.abs(bounds - values), **marks)
    ax.set_ylabel("95 % intervals")


def loss_vs_reward(ax: Axes, run: RunData) -> None:
    """Draw a point for each step, coloured by the number of the step."""
    points = pd.DataFrame({"step": run.steps} | {name: finite_values(run.metrics, name) for name in ("reward", "loss")})
    points = points.dropna()
    if points.empty:
        return
    size = float(np.clip(4000 / len(points), 6, 45))
    marks: dict[str, Any] = {"s": size, "alpha": 0.8, "linewidths": 0, "zorder": 3, "cmap": "viridis"}
    scatter = ax.scatter(points["reward"], points["loss"], c=points["step"], **marks)
    if len(points) > 1:
        bar = ax.figure.colorbar(scatter, ax=ax, pad=0.02, ticks=MaxNLocator(6, integer=True))
        bar.set_label("step", fontsize=9, color=TEXT)
        bar.outline.set_visible(False)
        bar.ax.tick_params(labelsize=8, colors=MUTED)


LOSS = Panel("Loss", is_always_drawn=True)
REWARD = Panel("Reward", is_always_drawn=True, extra=reward)
LENGTH = Panel("Output length", is_always_drawn=True, extra=length)
TRUNCATED = Panel("Completions truncated at the length limit", percent=True, extra=truncated)
LOSS_VS_REWARD = Panel(
    "Loss and reward of each step", is_always_drawn=True, xlabel="mean reward", ylabel="loss", extra=loss_vs_reward
)
PANELS = (
    REWARD,
    LOSS,
    LENGTH,
    LOSS_VS_REWARD,
    Panel(ACCURACY, percent=True, extra=accuracy),
    TRUNCATED,
    Panel("KL divergence from the reference"),
    Panel("Entropy of the policy"),
    Panel("Gradient norm"),
)
