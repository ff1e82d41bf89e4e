"""The charts of one run, as PNG files.

They use matplotlib's figure objects alone, never `pyplot`: no state is shared, so a chart can be drawn in any thread
and is freed with its figure.
"""

import io
import math
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator, PercentFormatter

from grpo.analysis.load import component_columns, finite_values, load_evaluations, load_metrics, read_config
from grpo.analysis.summary import wilson_interval, write_summary
from grpo.runs.files import write_whole

DPI = 120
TEXT, MUTED, GRID = "#2b2b2b", "#767676", "#e3e3e3"
COLORS = {  # Okabe and Ito's palette, which readers with any colour vision can tell apart
    "loss": "#d55e00",
    "reward": "#0072b2",
    "correctness": "#009e73",
    "format": "#e69f00",
    "length": "#7a4fa3",
    "clipped": "#d55e00",
    "accuracy": "#0072b2",
    "kl": "#cc79a7",
    "entropy": "#009e73",
    "grad_norm": "#56b4e9",
}
OTHER_COMPONENTS = ("#cc79a7", "#56b4e9", "#7a4fa3", "#8c6d31", "#767676")
LEGEND_COLUMNS = 4
# The highest values of the two components that a run has by default.
DEFAULT_MAXIMA = {"correctness": 2.0, "format": 0.8}


@dataclass(frozen=True)
class _Run:
    """What the panels of one run draw from."""

    title: str
    metrics: pd.DataFrame
    evaluations: pd.DataFrame
    length_limit: int | None  # tokens
    window: int  # steps in the running mean, odd; 1: too few steps to smooth

    @property
    def steps(self) -> pd.Series:
        return self.metrics["step"]

    def has(self, column: str) -> bool:
        return bool(finite_values(self.metrics, column).notna().any())

    def smooth(self, column: str) -> pd.Series:
        return finite_values(self.metrics, column).rolling(self.window, center=True, min_periods=1).mean()

    @property
    def step_range(self) -> tuple[float, float]:
        """The same limits for the step axis of every panel, so that they can be read one below the other."""
        steps = [*self.steps, *self.evaluations["step"].dropna()]
        margin = max(0.5, 0.03 * (max(steps) - min(steps)))
        return min(steps) - margin, max(steps) + margin

    @property
    def iteration_starts(self) -> list[int]:
        """The first step of each outer iteration but the first; none where the lines would hide the curves."""
        starts = self.metrics.groupby("iteration")["step"].min().sort_values().tolist()[1:]
        return starts if len(starts) <= 20 else []

    @property
    def legend_note(self) -> str:
        """What faint, strong and dotted mean."""
        notes = [f"faint: each step, strong: mean of {self.window} steps"] if self.window > 1 else []
        notes += ["dotted: a new iteration"] if self.iteration_starts else []
        return "; ".join(notes)


def write_charts(run_dir: str | Path, output_dir: str | Path | None = None) -> list[Path]:
    """Draws `loss.png`, `reward.png`, `output_length.png`, `loss_vs_reward.png` and `training_progress.png` of a run.

    They go to `run_dir/plots/`, and `summary.json` to `run_dir`; with `output_dir`, created if needed, all of them go
    there. Returns the paths written, the summary's last.

    Raises FileNotFoundError if `run_dir` is no run folder, ValueError if it has no completed step or is broken.
    """
    run = _read_run(Path(run_dir))
    plots_dir = Path(output_dir) if output_dir else Path(run_dir, "plots")
    plots_dir.mkdir(parents=True, exist_ok=True)
    figures: dict[str, Callable[[_Run], Figure]] = {
        "loss.png": lambda run: _single(run, _loss),
        "reward.png": lambda run: _single(run, _reward),
        "output_length.png": _output_length,
        "loss_vs_reward.png": lambda run: _single(run, _loss_vs_reward),
        "training_progress.png": _training_progress,
    }
    for name, draw in figures.items():
        _save(draw(run), plots_dir / name)
    return [*(plots_dir / name for name in figures), write_summary(run_dir, output_dir)]


def _read_run(run_dir: Path) -> _Run:
    metrics = load_metrics(run_dir)
    if metrics.empty:
        raise ValueError(f"{run_dir} has no completed step, so there is nothing to plot yet")
    config = read_config(run_dir)
    folder = run_dir.resolve().name
    name = config.get("name")
    return _Run(
        title=f"{name} · {folder}" if name and name != folder else folder,
        metrics=metrics,
        evaluations=load_evaluations(run_dir, of_training=True),
        length_limit=(config.get("grpo") or {}).get("max_completion_length"),
        window=1 if len(metrics) < 10 else max(5, len(metrics) // 20) // 2 * 2 + 1,
    )


# Whole figures


def _save(figure: Figure, file: Path) -> None:
    # What savefig would do, which lays a figure out twice; that is most of its time.
    canvas = FigureCanvasAgg(figure)
    if (layout := figure.get_layout_engine()) is not None:
        layout.execute(figure)
    figure.set_layout_engine("none")
    picture = io.BytesIO()
    canvas.print_png(picture)
    write_whole(file, picture.getvalue())


def _figure(run: _Run, width: float, height: float, note: bool = True) -> Figure:
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1)  # inches
    figure = Figure(figsize=(width, height), dpi=DPI, layout=layout)
    # Dollar signs in a run's name are not mathematics, and a sweep's name can be long.
    title = textwrap.fill(run.title, width=int(width * 8))
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold", color=TEXT, parse_math=False)
    if note and run.legend_note:
        figure.supxlabel(run.legend_note, x=0.99, ha="right", fontsize=8, color=MUTED)
    return figure


def _single(run: _Run, panel: Callable[[Axes, _Run], None]) -> Figure:
    figure = _figure(run, 9, 5.4, note=panel is not _loss_vs_reward)
    panel(figure.subplots(), run)
    return figure


def _output_length(run: _Run) -> Figure:
    figure = _figure(run, 9, 7)
    length, clipped = figure.subplots(2, 1, height_ratios=[2, 1])
    _length(length, run)
    _clipped(clipped, run)
    return figure


def _training_progress(run: _Run) -> Figure:
    panels = [_loss, _reward, _length, _loss_vs_reward]
    optional = {"completions/clipped_ratio": _clipped, "kl": _kl, "entropy": _entropy, "grad_norm": _grad_norm}
    if run.evaluations["accuracy"].notna().any():
        panels.append(_accuracy)
    panels += [panel for column, panel in optional.items() if run.has(column)]
    columns = 2 if len(panels) == 4 else 3
    rows = math.ceil(len(panels) / columns)
    figure = _figure(run, 6 * columns, 4.1 * rows)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for ax, panel in zip(axes, panels, strict=False):
        panel(ax, run)
    for ax in axes[len(panels) :]:
        ax.remove()
    for i in range(0, len(panels), columns):  # titles of one row at one height
        row = axes[i : min(i + columns, len(panels))]
        for ax in row:
            _title(ax, ax.get_title(loc="left"), max(map(_legend_rows, row)))
    return figure


# Panels


def _loss(ax: Axes, run: _Run) -> None:
    _curves(ax, run, "Loss", "loss", {"loss": ("loss", COLORS["loss"])})


def _kl(ax: Axes, run: _Run) -> None:
    _curves(ax, run, "KL divergence to the reference", "KL (nats per token)", {"kl": ("KL", COLORS["kl"])})


def _entropy(ax: Axes, run: _Run) -> None:
    curve = {"entropy": ("entropy", COLORS["entropy"])}
    _curves(ax, run, "Entropy of the policy", "entropy (nats per token)", curve)


def _grad_norm(ax: Axes, run: _Run) -> None:
    _curves(ax, run, "Gradient norm", "L2 norm", {"grad_norm": ("gradient norm", COLORS["grad_norm"])})


def _clipped(ax: Axes, run: _Run) -> None:
    curve = {"completions/clipped_ratio": ("clipped", COLORS["clipped"])}
    _curves(ax, run, "Completions cut at the length limit", "share of completions", curve)
    top = min(1.0, max(0.1, 1.2 * finite_values(run.metrics, "completions/clipped_ratio").max()))
    ax.set_ylim(-0.03 * top, 1.03 * top)
    ax.yaxis.set_major_formatter(PercentFormatter(1.0))


def _reward(ax: Axes, run: _Run) -> None:
    components = component_columns(run.metrics)
    others = [name for name in components if name not in DEFAULT_MAXIMA]
    colors = COLORS | {name: OTHER_COMPONENTS[i % len(OTHER_COMPONENTS)] for i, name in enumerate(others)}
    curves = {"reward": ("combined", COLORS["reward"])}
    curves |= {column: (name, colors[name]) for name, column in components.items()}
    _curves(ax, run, "Reward", "mean reward", curves)
    for name, maximum in _maxima(run).items():
        color = colors[name]
        ax.axhline(maximum, color=color, linewidth=1, linestyle=(0, (4, 3)), alpha=0.7)
        place: dict[str, Any] = {"xy": (1, maximum), "xycoords": ax.get_yaxis_transform(), "xytext": (4, 0)}
        ax.annotate(f"max {maximum:.1f}", **place, textcoords="offset points", va="center", fontsize=8, color=color)
    held_out = run.evaluations.dropna(subset=["reward"])
    if len(held_out):
        style: dict[str, Any] = {"marker": "D", "markersize": 7, "markeredgecolor": "white", "linestyle": "none"}
        ax.plot(held_out["step"], held_out["reward"], color=TEXT, label="combined, held-out", zorder=4, **style)
    low, high = ax.get_ylim()
    ax.set_ylim(min(low, 0), high)
    _legend(ax)


def _maxima(run: _Run) -> dict[str, float]:
    """The highest value that each reward curve can reach, where the run has the two default components."""
    columns = component_columns(run.metrics)
    if set(columns) != set(DEFAULT_MAXIMA) or not run.has("reward"):
        return {}
    means = {name: finite_values(run.metrics, column) for name, column in columns.items()}
    if any(means[name].max() > maximum + 1e-6 for name, maximum in DEFAULT_MAXIMA.items()):
        return {}
    # Weights other than 1 give the sum another maximum.
    gap = (finite_values(run.metrics, "reward") - sum(means.values())).abs().max()
    return DEFAULT_MAXIMA | ({"reward": sum(DEFAULT_MAXIMA.values())} if gap < 1e-3 else {})


def _length(ax: Axes, run: _Run) -> None:
    low, high = (finite_values(run.metrics, f"completions/{end}_length") for end in ("min", "max"))
    color = COLORS["length"]
    if (low.notna() & high.notna()).any():
        ax.fill_between(run.steps, low, high, color=color, alpha=0.13, linewidth=0, label="shortest to longest")
        if len(run.steps) == 1:  # a band over one step has no area
            ax.vlines(run.steps, low, high, color=color, alpha=0.3, linewidth=6)
    _curves(ax, run, "Output length", "tokens", {"completions/mean_length": ("mean", color)})
    if run.length_limit:
        label = f"limit ({run.length_limit})"
        ax.axhline(run.length_limit, color=MUTED, linewidth=1, linestyle=(0, (4, 3)), label=label)
    ax.set_ylim(bottom=0)
    _legend(ax)


def _accuracy(ax: Axes, run: _Run) -> None:
    points = run.evaluations.dropna(subset=["accuracy"])
    accuracy = points["accuracy"].to_numpy()
    intervals = [wilson_interval(a, int(n)) for a, n in zip(accuracy, points["n"].fillna(0), strict=True)]
    bounds = np.array([interval or (a, a) for a, interval in zip(accuracy, intervals, strict=True)]).T
    style: dict[str, Any] = {"color": COLORS["accuracy"], "marker": "D", "markersize": 6, "linewidth": 1.5}
    style |= {"ecolor": MUTED, "elinewidth": 1, "capsize": 4, "label": "accuracy with its 95 % interval"}
    ax.errorbar(points["step"], accuracy, yerr=np.abs(bounds - accuracy), **style)
    counts = sorted({int(n) for n in points["n"].dropna()})
    problems = f" on {' or '.join(map(str, counts))} problems" if counts else ""
    _finish(ax, run, f"Held-out accuracy{problems}", "accuracy")
    ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    _legend(ax)


def _loss_vs_reward(ax: Axes, run: _Run) -> None:
    points = pd.DataFrame({"step": run.steps} | {name: finite_values(run.metrics, name) for name in ("reward", "loss")})
    points = points.dropna()
    _finish(ax, run, "Loss and reward of each step", "loss", by_step=False)
    ax.set_xlabel("mean reward", fontsize=9, color=TEXT)
    if points.empty:
        _no_data(ax)
        return
    first, last = points["step"].min(), points["step"].max()
    size = float(np.clip(4000 / len(points), 6, 45))
    colors = {"c": points["step"], "cmap": "viridis", "norm": Normalize(first, last)}
    scatter = ax.scatter(points["reward"], points["loss"], s=size, alpha=0.8, linewidths=0, zorder=3, **colors)
    if first == last:
        return
    bar = ax.figure.colorbar(scatter, ax=ax, pad=0.02, ticks=MaxNLocator(6, integer=True))
    bar.set_label("step", fontsize=9, color=TEXT)
    bar.outline.set_visible(False)
    if bar.solids is not None:
        bar.solids.set_alpha(1)
    bar.ax.tick_params(labelsize=8, colors=MUTED)


# Parts of a panel


def _curves(ax: Axes, run: _Run, title: str, ylabel: str, curves: dict[str, tuple[str, str]]) -> None:
    """Metrics over the steps, `curves` being column -> (label, colour): each step faint, the running mean strong."""
    drawn = {column: style for column, style in curves.items() if run.has(column)}
    for column, (label, color) in drawn.items():
        if run.window > 1:
            ax.plot(run.steps, finite_values(run.metrics, column), color=color, alpha=0.28, linewidth=0.8)
        marker = "o" if run.window == 1 else None  # one step is no line
        ax.plot(run.steps, run.smooth(column), color=color, linewidth=2, marker=marker, markersize=5, label=label)
    _finish(ax, run, title, ylabel)
    if not drawn:
        _no_data(ax)


def _finish(ax: Axes, run: _Run, title: str, ylabel: str, by_step: bool = True) -> None:
    _title(ax, title)
    ax.set_ylabel(ylabel, fontsize=9, color=TEXT)
    ax.grid(color=GRID, linewidth=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(GRID)
    ax.tick_params(labelsize=8, colors=MUTED)
    # Plain numbers: matplotlib would put a common factor such as 1e-5 where the legend stands.
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:.6g}")
    if by_step:
        ax.set_xlabel("step", fontsize=9, color=TEXT)
        ax.set_xlim(run.step_range)
        ax.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 2.5, 5, 10], min_n_ticks=1))
        for start in run.iteration_starts:
            ax.axvline(start - 0.5, color=MUTED, linewidth=1, linestyle=":")


def _legend(ax: Axes) -> None:
    """A legend between the title and the axes, where it can cover no curve."""
    if not ax.get_legend_handles_labels()[0]:
        return
    style: dict[str, Any] = {"fontsize": 8, "frameon": False, "labelcolor": TEXT}
    style |= {"handlelength": 1.6, "columnspacing": 1.4}
    place: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderpad": 0, "borderaxespad": 0.4}
    ax.legend(ncols=LEGEND_COLUMNS, **place, **style)
    _title(ax, ax.get_title(loc="left"), _legend_rows(ax))


def _legend_rows(ax: Axes) -> int:
    legend = ax.get_legend()
    return math.ceil(len(legend.get_texts()) / LEGEND_COLUMNS) if legend else 0


def _title(ax: Axes, title: str, legend_rows: int = 0) -> None:
    """Sets a panel's title, high enough to leave room for a legend below it."""
    ax.set_title(title, loc="left", fontsize=11, color=TEXT, pad=7 + 14 * legend_rows)


def _no_data(ax: Axes) -> None:
    ax.text(0.5, 0.5, "nothing recorded", transform=ax.transAxes, ha="center", va="center", color=MUTED)
    ax.set_xticks([])
    ax.set_yticks([])
