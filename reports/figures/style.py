"""One look for all figures: sizes, colours that colour-blind readers can tell apart, and markers that repeat what
colour says.

Colours of ink, rules and series are fixed here and nowhere else; on the page they become variables, so that figures
follow light and dark mode (see `svg`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import matplotlib as mpl
from matplotlib.figure import Figure

INK, MUTED, RULE, PAPER = "#1b1d21", "#6a6f78", "#dfe2e6", "#fffffd"
SERIES = ("#0065a8", "#d1480a", "#00866a", "#8a3fa0", "#a87400", "#3a97d4", "#c6527f", "#6b6b6d")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "h")
DASHES: tuple[str | tuple[int, tuple[float, ...]], ...] = ("-", (0, (4, 1.5)), (0, (1.2, 1.2)))
COLUMN = 3.33
"""Width in inches of one column of a paper: every figure fits it with labels of at least 6 points."""

_SETTINGS: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 7,
    "axes.titlesize": 7,
    "axes.titlepad": 3.0,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 7,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": RULE,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": 6.5,
    "ytick.labelsize": 6.5,
    "text.color": INK,
    "axes.facecolor": "none",
    "figure.facecolor": PAPER,
    "savefig.facecolor": PAPER,
    "svg.fonttype": "none",
    "svg.hashsalt": "klab",
    "pdf.fonttype": 42,
    "legend.frameon": False,
    "legend.fontsize": 6.5,
    "lines.linewidth": 1.2,
    "lines.solid_capstyle": "round",
    "text.parse_math": False,
}


@dataclass
class Drawing:
    """A figure with the words that belong to it.

    Attributes:
        name: file name without suffix.
        title: a short heading.
        caption: what is drawn, what the bars mean, how many seeds.
        alt: the message, for readers who do not see it.
        tips: by id of a drawn group, what to say when a reader points at it.
        view: where a figure is there once per unit of effort (see `effort.UNITS`), which unit this one has.
    """

    name: str
    title: str
    caption: str
    alt: str
    figure: Figure
    tips: dict[str, str] = field(default_factory=dict)
    view: str = ""

    def tip(self, text: str) -> str:
        """Registers `text` and returns the id to give the artist."""
        key = f"tip{len(self.tips)}"
        self.tips[key] = text
        return key


@contextmanager
def styled() -> Iterator[None]:
    """Drawing and saving happen inside."""
    with mpl.rc_context(cast(Any, _SETTINGS)):
        yield


def canvas(
    width: float, height: float, rows: int = 1, columns: int = 1, **layout: Sequence[float]
) -> tuple[Figure, list[Any]]:
    """An empty figure (not registered with pyplot) and its axes in reading order; `layout` has ratios of the grid."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, gridspec_kw=layout)
    return figure, list(axes.ravel())


def placed(height: float, *, left: float, right: float, top: float, bottom: float) -> tuple[Figure, Any]:
    """A figure of one column's width with one panel between the given margins, all in inches."""
    figure = Figure(figsize=(COLUMN, height))
    sides = {"left": left / COLUMN, "right": 1 - right / COLUMN, "bottom": bottom / height, "top": 1 - top / height}
    return figure, figure.subplots(gridspec_kw=sides)


def panel_grid(panels: int, panel_height: float, below: float) -> tuple[Figure, list[Any]]:
    """An empty figure of one column's width with panels in two columns, placed by hand: solving for a layout would take
    most of the time of a large page.

    Args:
        panel_height: of each panel with its title, inches.
        below: inches left at the bottom, for labels and a legend.
    """
    rows = (panels + 1) // 2
    height = rows * panel_height + below
    figure = Figure(figsize=(COLUMN, height))
    axes = figure.subplots(rows, 2, squeeze=False)
    title, left, between = 0.2, 0.4, 0.45
    panel = (COLUMN - left - between - 0.08) / 2
    figure.subplots_adjust(
        left=left / COLUMN,
        right=1 - 0.08 / COLUMN,
        top=1 - title / height,
        bottom=below / height,
        wspace=between / panel,
        hspace=title / (panel_height - title),
    )
    for each in axes.ravel()[panels:]:
        each.set_visible(False)
    return figure, list(axes.ravel()[:panels])


def look(position: int) -> dict[str, Any]:
    """Colour, marker and dash of the value at `position` on its axis."""
    return {
        "color": SERIES[position % len(SERIES)],
        "marker": MARKERS[position % len(MARKERS)],
        "linestyle": DASHES[position // len(SERIES) % len(DASHES)],
    }


def legend_below(figure: Figure, handles: Sequence[Any], labels: Sequence[str], *, solved: bool = True) -> None:
    """A legend under the panels, in `legend_columns`; `solved`: the layout makes room for it."""
    figure.legend(
        handles,
        labels,
        loc="outside lower center" if solved else "lower center",
        ncols=legend_columns(labels),
        borderaxespad=0.1,
        labelspacing=0.3,
    )


def legend_columns(labels: Sequence[str]) -> int:
    """Two columns where the labels fit a column's width side by side."""
    return 2 if max(map(len, labels), default=0) <= 24 else 1


def spread_labels(positions: Sequence[float], gap: float) -> list[float]:
    """Label positions near `positions` that are at least `gap` apart, order kept."""
    order = sorted(range(len(positions)), key=lambda i: positions[i])
    placed = [positions[i] for i in order]
    for _ in range(50):
        moved = False
        for i in range(len(placed) - 1):
            overlap = gap - (placed[i + 1] - placed[i])
            if overlap > 1e-9 * gap:
                placed[i] -= overlap / 2
                placed[i + 1] += overlap / 2
                moved = True
        if not moved:
            break
    result = [0.0] * len(positions)
    for rank, i in enumerate(order):
        result[i] = placed[rank]
    return result


def shortened(text: str, length: int = 34) -> str:
    """`text` cut to `length` characters, for labels inside figures."""
    return text if len(text) <= length else text[: length - 1] + "…"
