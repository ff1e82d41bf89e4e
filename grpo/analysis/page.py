"""Pages as one HTML file: a template, with its pictures inside."""

import base64
import io
import math
from decimal import Decimal

from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure

ENVIRONMENT = Environment(
    loader=PackageLoader("grpo.analysis"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
)


def readable(value: float | None) -> str:
    """A number with three significant digits, without an exponent; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return "-"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return format(Decimal(f"{value:.3g}"), "f")


ENVIRONMENT.filters["readable"] = readable


def render(template: str, **content: object) -> str:
    """A page of `templates/` with this content; text in it is escaped."""
    return ENVIRONMENT.get_template(template).render(content)


def embedded(figure: Figure) -> str:
    """A figure as the address of an image that is in the page itself."""
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(file.getvalue()).decode()}"
