"""Which axes act together: the evidence for every pair, and the mean scores of the clearest one."""

from __future__ import annotations

from typing import Any

import numpy as np

from klab.reports.comparison import Comparison
from klab.reports.figures.style import COLUMN, INK, RULE, Drawing, canvas, shortened, styled
from klab.reports.frame import records
from klab.reports.statistics import Array
from klab.reports.study import Study
from klab.reports.words import difference_span, p_number, p_words

_DARKEST = 3.0
"""−log₁₀ p with the darkest colour."""


def interaction_maps(study: Study, comparison: Comparison) -> Drawing | None:
    """Size and p of the interaction of every pair of axes, coloured by p; None when the design crosses none."""
    known = {axis.key: axis for axis in study.axes}
    crossed = [
        row
        for row in records(comparison.analysis.interactions)
        if np.isfinite(row["difference"]) and row["axis"] in known and row["other"] in known
    ]
    if not crossed:
        return None
    keys = [axis.key for axis in study.axes if any(axis.key in (row["axis"], row["other"]) for row in crossed)]
    evidence = np.full((len(keys), len(keys)), np.nan)
    words = np.full(evidence.shape, "", dtype=object)
    for row in crossed:
        i, j = sorted((keys.index(row["axis"]), keys.index(row["other"])))
        evidence[j, i] = -np.log10(np.clip(np.nan_to_num(row["p"], nan=1.0), 10**-_DARKEST, 1.0))
        words[j, i] = f"{abs(row['difference']):.2f}\np {p_number(row['p'])}"
    top = min(crossed, key=lambda row: (np.nan_to_num(row["p"], nan=2.0), -abs(row["difference"])))
    first, second = known[top["axis"]], known[top["other"]]
    means, runs = _means(study, comparison, first, second)
    span = difference_span(top["difference"], top["low"], top["high"])
    heights = (0.28 * (len(keys) - 1) + 0.75, 0.2 * len(second.values) + 0.75)
    with styled():
        figure, (upper, lower) = canvas(COLUMN, sum(heights), 2, 1, height_ratios=heights)
        drawing = Drawing(
            "interactions",
            "Which axes act together",
            "Above: by how much the difference that a value of one axis makes changes with a value of the other, for "
            "the clearest pair of values, with its p; the darker, the stronger the evidence (white: p = 1, darkest: "
            "p ≤ 0.001). Below: mean score for the clearest pair of axes, "
            f"{first.title} × {second.title} ({span}, {p_words(top['p'])}, {top['verdict']}), n = {runs} runs.",
            f"The clearest interaction is {first.key} with {second.key}: {span}.",
            figure,
        )
        names = [known[key].short for key in keys]
        _map(upper, evidence[1:, :-1], words[1:, :-1], names[:-1], names[1:], (0.0, _DARKEST))
        low, high = float(np.nanmin(means)), float(np.nanmax(means))
        half = max((high - low) / 2, 2 * comparison.analysis.delta)
        _map(
            lower,
            means,
            np.vectorize(lambda value: f"{value:.2f}" if np.isfinite(value) and means.size <= 80 else "")(means),
            [shortened(value, 14) for value in first.values],
            [shortened(value, 18) for value in second.values],
            ((low + high) / 2 - half, (low + high) / 2 + half),
        )
        upper.set_title("size of the interaction, coloured by p")
        lower.set_title(f"mean score: {first.short} × {second.short}")
    return drawing


def _means(study: Study, comparison: Comparison, first: Any, second: Any) -> tuple[Array, int]:
    means, runs = np.full((len(second.values), len(first.values)), np.nan), 0
    for j, value in enumerate(first.values):
        for i, other in enumerate(second.values):
            chosen = [
                k
                for k, group in enumerate(comparison.groups)
                if study.values[group][first.key] == value and study.values[group][second.key] == other
            ]
            present = comparison.scores[chosen][np.isfinite(comparison.scores[chosen])]
            if present.size:
                means[i, j] = present.mean()
            runs += present.size
    return means, runs


def _map(axes: Any, values: Array, words: Any, columns: list[str], rows: list[str], ends: tuple[float, float]) -> None:
    """A table of shades; text is dark on light and light on dark."""
    axes.pcolormesh(
        np.ma.masked_invalid(values), cmap="Blues", vmin=ends[0], vmax=ends[1], edgecolors=RULE, linewidth=1.0
    )
    for (i, j), text in np.ndenumerate(words):
        if np.isfinite(values[i, j]):
            dark = (values[i, j] - ends[0]) / (ends[1] - ends[0]) > 0.6
            color = "#fffffe" if dark else "#000001"
            axes.text(j + 0.5, i + 0.5, text, ha="center", va="center", fontsize=6, color=color, linespacing=0.95)
    axes.set_xticks(np.arange(len(columns)) + 0.5, columns, rotation=20, ha="right", rotation_mode="anchor")
    axes.set_yticks(np.arange(len(rows)) + 0.5, rows)
    axes.invert_yaxis()
    axes.grid(False)
    axes.tick_params(length=0, labelcolor=INK)
    for spine in axes.spines.values():
        spine.set_visible(False)
