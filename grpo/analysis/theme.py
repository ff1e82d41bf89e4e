"""The common style of all charts: colours, figures, axes and legends.

Figures are created without `pyplot`, which has global state. So a chart can be drawn in any thread, and its memory is
freed with its figure.
"""

from decimal import Decimal
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

TEXT, MUTED, GRID, OTHERS = "#2b2b2b", "#767676", "#e3e3e3", "#c9c9c9"
# Colours of Okabe and Ito's palette, which readers with colour blindness can distinguish too, and two more.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a4fa3", "#767676")
BLUE, RED, GREEN, PINK, ORANGE, SKY, VIOLET, GREY = PALETTE


def new_figure(title: str = "", width: float = 8, height: float = 4, fitted: bool = True) -> Figure:
    """An empty figure; width and height in inches.

    fitted: whether the margins are fitted to the labels, for which the figure is drawn twice.
    """
    figure = Figure(figsize=(width, height), layout="constrained" if fitted else None)
    if title:  # a dollar sign in a run's name does not start a formula
        figure.suptitle(
            title, x=0.01, ha="left", fontsize=13, fontweight="bold", color=TEXT, parse_math=False, wrap=True
        )
    return figure


def style(ax: Axes, title: str, ylabel: str = "", xlabel: str = "step", percent: bool = False) -> None:
    """Set title, labels, ticks and grid of a panel; percent: values are shares from 0 to 1."""
    ax.set_title(title, loc="left", fontsize=11, color=TEXT)
    ax.set_xlabel(xlabel, fontsize=9, color=TEXT)
    ax.set_ylabel(ylabel, fontsize=9, color=TEXT)
    ax.grid(color=GRID, linewidth=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(GRID)
    ax.tick_params(labelsize=8, colors=MUTED)
    if xlabel == "step":
        ax.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 2.5, 5, 10], min_n_ticks=1))
    # Plain numbers: by default matplotlib would write a common factor such as 1e-5 next to the axis.
    ax.yaxis.set_major_formatter(
        PercentFormatter(1.0) if percent else lambda value, _: format(Decimal(f"{value:.6g}"), "f")
    )


def legend(ax: Axes, title: str | None = None, beside: bool = True) -> None:
    """Add a legend next to the panel, where it covers no curve, or inside it; none if no curve has a label."""
    if handles := ax.get_legend_handles_labels()[0]:
        outside: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0), "borderaxespad": 0.0}
        inside: dict[str, Any] = {"loc": "best", "ncols": 1 if len(handles) <= 3 else 2}  # flat: it fits between curves
        place = outside if beside else inside
        ax.legend(**place, fontsize=8, frameon=False, labelcolor=TEXT, title=title, title_fontsize=8, alignment="left")
