"""HTML pages rendered from templates, each a single file with its images embedded."""

import base64
import io
import math
from decimal import Decimal
from statistics import fmean

from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure

ENVIRONMENT = Environment(
    loader=PackageLoader("grpo.analysis"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
)


def readable(value: float | None) -> str:
    """A number with three significant digits, without an exponent; "-" if it is None or not finite."""
    if value is None or not math.isfinite(value):
        return "-"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if abs(value) < 1e-8:  # such as a loss of 0 with a rounding error
        return "0"
    return format(Decimal(f"{value:.3g}"), "f")


def percent(share: float | None) -> str:
    """A share as a whole percentage; "-" if it is None."""
    return "-" if share is None else f"{share:.0%}"


def mean_advantage(advantage: float | list[float] | None) -> str:
    """The advantage of a completion with its sign, or the mean of those of its tokens; "-" if it has none."""
    if isinstance(advantage, list):
        advantage = fmean(advantage) if advantage else None
    return "-" if advantage is None else f"{advantage:+.2f}"


ENVIRONMENT.filters |= {"readable": readable, "percent": percent, "mean_advantage": mean_advantage}


def render(template: str, **content: object) -> str:
    """Render a template of `templates/` with this content; text is HTML-escaped."""
    return ENVIRONMENT.get_template(template).render(content)


def embedded(figure: Figure) -> str:
    """A figure as the data URL of an SVG image."""
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(file.getvalue()).decode()}"
