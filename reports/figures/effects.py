"""What each axis does: differences from the baseline's value."""

from __future__ import annotations

from typing import Any

import numpy as np

from klab.reports.comparison import Comparison
from klab.reports.figures.style import MUTED, Drawing, look, placed, shortened, styled
from klab.reports.findings import axis_findings
from klab.reports.frame import records
from klab.reports.study import Study
from klab.reports.words import difference_span, p_words


def main_effect_plot(study: Study, comparison: Comparison) -> Drawing | None:
    """One line per axis value: its difference from the baseline's value, with its interval."""
    levels: dict[str, dict[str, dict[str, Any]]] = {}
    for row in records(comparison.analysis.levels):
        if np.isfinite(row["difference"]):
            levels.setdefault(row["axis"], {})[str(row["value"])] = row
    titles = {axis.key: axis for axis in study.axes}
    effects = [effect for effect in axis_findings(study, comparison) if effect.axis in levels and effect.axis in titles]
    if not effects or comparison.baseline is None:
        return None
    base = study.values[comparison.baseline]
    lines = sum(len(levels[effect.axis]) + 1.9 for effect in effects)
    pairs = [row["pairs"] for axis in levels.values() for row in axis.values()]
    with styled():
        figure, axes = placed(0.45 + 0.16 * lines, left=1.15, right=0.08, top=0.08, bottom=0.36)
        drawing = Drawing(
            "effects",
            "What each axis changes",
            "Difference from the baseline's value (hollow) between cells that differ in nothing else, over "
            f"n = {_range(pairs)} pairs of runs; bars are 95% intervals, simultaneous over all values. Right: the "
            "verdict and p of the axis.",
            "Axes: " + ", ".join(f"{effect.axis} {effect.words}" for effect in effects) + ".",
            figure,
        )
        place = 0.0
        ticks: list[float] = []
        names: list[str] = []
        for effect in effects:
            axis = titles[effect.axis]
            note = f"{effect.verdict}, {p_words(effect.p)}" if np.isfinite(effect.p) else "no inference"
            figure_x = axes.get_yaxis_transform()
            axes.text(-0.54, place, axis.title, fontweight="bold", va="center", transform=figure_x)
            axes.text(1.0, place, note, ha="right", va="center", fontsize=6, color=MUTED, transform=figure_x)
            place -= 1
            for value in axis.values:
                reference, level = value == base[axis.key], levels[axis.key].get(value)
                if level is None and not reference:
                    continue
                _level(axes, drawing, effect.axis, value, level, place, look(axis.values.index(value)))
                ticks.append(place)
                names.append(shortened(value, 24))
                place -= 1
            place -= 0.9
        axes.axvline(0, color=MUTED, linewidth=0.8)
        axes.set_yticks(ticks, names)
        axes.set_ylim(place + 0.6, 0.8)
        axes.grid(axis="y", visible=False)
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel(f"change of the {comparison.score.title}")
    return drawing


def _level(
    axes: Any, drawing: Drawing, key: str, value: str, row: dict[str, Any] | None, place: float, style: dict[str, Any]
) -> None:
    """A value with its interval; the baseline's value has no row and is hollow at 0."""
    if row is not None and np.isfinite(row["low"]):
        axes.plot([row["low"], row["high"]], [place, place], color=style["color"], linewidth=1.8, alpha=0.5)
    (point,) = axes.plot(
        0.0 if row is None else row["difference"],
        place,
        linestyle="none",
        markersize=4,
        marker=style["marker"],
        color=style["color"],
        markerfacecolor="none" if row is None else style["color"],
    )
    words = "the baseline's value"
    if row is not None:
        words = f"{difference_span(row['difference'], row['low'], row['high'])}, {p_words(row['p'])}"
    point.set_gid(drawing.tip(f"{key} = {value}: {words}"))


def _range(counts: list[float]) -> str:
    low, high = min(counts), max(counts)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"
