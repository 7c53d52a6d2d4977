"""Plots of the reports, drawn by matplotlib as SVG that follows the page's colours.

Everything except data is drawn in two marker colours, which are replaced by CSS variables: one plot
then suits light and dark pages and paper.
"""

import io
import re
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

_INK, _FAINT = "#010203", "#040506"
_VARIABLES = {_INK: "var(--ink)", _FAINT: "var(--faint)"}
BLUE, ORANGE = "#3b82c4", "#d97a29"
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: selectable, and in the page's font
    "font.family": "sans-serif",
    "font.size": 9.0,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": _FAINT,
    "ytick.color": _FAINT,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "grid.color": _FAINT,
    "grid.alpha": 0.35,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}
_WIDTH = 7.2

Draw = Callable[[Axes], None]


def picture(draw: Draw, height: float, name: str, *, grid: bool = True) -> str:
    """Return a plot as an SVG element."""
    with mpl.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(_WIDTH, height))
        figure.patch.set_alpha(0)
        axes = figure.add_subplot()
        axes.patch.set_alpha(0)
        if grid:
            axes.grid(visible=True, axis="y")
            axes.set_axisbelow(True)
        draw(axes)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    # Ids have to be unique in the page, not only in the picture.
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    for marker, variable in _VARIABLES.items():
        svg = svg.replace(marker, variable)
    return re.sub(r'width="[^"]+pt" height="[^"]+pt"', 'role="img"', svg, count=1)


def put_labels(axis: Any, labels: Sequence[str], most: int) -> None:
    """Put labels on an axis of cells, at most `most` of them."""
    step = -(-len(labels) // most)
    axis.set_ticks(range(0, len(labels), step), labels[::step])
