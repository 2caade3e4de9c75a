"""Performance profiles: the share of runs above each score (Agarwal et al. 2021), with bands, for the values of an axis
or for configurations that ran on several tasks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from klab.reports.axes import VariedAxis
from klab.reports.comparison import Comparison
from klab.reports.figures.series import representatives
from klab.reports.figures.style import COLUMN, Drawing, canvas, legend_below, look, shortened, styled
from klab.reports.frame import records
from klab.reports.statistics import Array, interquartile_mean, optimality_gap
from klab.reports.study import Study

_MOST = 8
_POINTS = 101
_LEAST = 10
_Z = 1.959963984540054
"""The 97.5% quantile of the normal distribution."""


class Profile(NamedTuple):
    """The share of runs above each of some thresholds with its pointwise 95% interval, and how many runs there are."""

    share: Array
    low: Array
    high: Array
    runs: int


def profile(runs_by_task: Sequence[Array], thresholds: Array) -> Profile:
    """Every task counts alike, however many runs it has.

    The interval is Wilson's (1927) with the number of runs that a simple sample of the same variance would have. It is
    never empty, with few runs too.

    Args:
        runs_by_task: the scores of each task's runs; every task has one.
    """
    share = np.mean([(scores[:, None] > thresholds).mean(axis=0) for scores in runs_by_task], axis=0)
    n = len(runs_by_task) ** 2 / sum(1 / len(scores) for scores in runs_by_task)
    middle = (share + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z * np.sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2)) / (1 + _Z**2 / n)
    return Profile(share, middle - half, middle + half, sum(map(len, runs_by_task)))


def axis_profile(study: Study, comparison: Comparison) -> Drawing | None:
    """The values of the clearest axis that has at least `_LEAST` runs of two values; None without one."""
    clear = [row["axis"] for row in records(comparison.analysis.effects.sort_values("p", kind="stable"))]
    for key in clear:
        axis = next((axis for axis in study.axes if axis.key == key), None)
        if axis is not None and (lines := _axis_lines(study, comparison, axis)):
            words = "Share of the runs with a value that are above each score"
            title = f"Performance profiles by {axis.title}"
            return _draw("profile", title, words, lines, comparison)
    return None


def _axis_lines(study: Study, comparison: Comparison, axis: VariedAxis) -> list[tuple[str, int, list[Array]]]:
    lines = []
    for value, groups in representatives(study, comparison, axis):
        scores = comparison.scores[groups]
        if np.isfinite(scores).any():
            lines.append((value, axis.values.index(value), [scores[np.isfinite(scores)]]))
    lines = [line for line in lines if line[2][0].size >= _LEAST]
    return lines[:_MOST] if len(lines) > 1 else []


def across_tasks(comparisons: list[Comparison]) -> tuple[pd.DataFrame, dict[str, list[Array]]]:
    """Configurations that have scores on every task: their aggregates, and by label the scores of each task's runs.

    Tasks may have different numbers of runs, and count alike; seeds of different tasks are not matched.
    """
    common: dict[str, list[Array]] = {}
    if len(comparisons) >= 2:
        scores = [_by_label(comparison) for comparison in comparisons]
        for label in scores[0]:
            runs = [each[label] for each in scores if label in each]
            if len(runs) == len(comparisons) and all(map(len, runs)):
                common[label] = runs
    rows = []
    for label, runs in common.items():
        size = math.lcm(*map(len, runs))
        matrix = np.column_stack([np.repeat(each, size // len(each)) for each in runs])
        rows.append(
            {
                "label": label,
                "runs": sum(map(len, runs)),
                "tasks": len(runs),
                "iqm": interquartile_mean(matrix),
                "mean": float(np.mean([each.mean() for each in runs])),
                "optimality_gap": optimality_gap(matrix),
            }
        )
    columns = ["label", "runs", "tasks", "iqm", "mean", "optimality_gap"]
    return pd.DataFrame(rows, columns=columns).sort_values("iqm", ascending=False, ignore_index=True), common


def _by_label(comparison: Comparison) -> dict[str, Array]:
    """The scores that count of every configuration, by its label."""
    places = {group: i for i, group in enumerate(comparison.groups)}
    pairs = zip(comparison.table["label"], comparison.table["group"], strict=True)
    rows = {label: comparison.scores[places[group]] for label, group in pairs}
    return {label: scores[np.isfinite(scores)] for label, scores in rows.items()}


def task_profiles(comparisons: list[Comparison]) -> Drawing | None:
    """The best configurations over all tasks; None with fewer than two tasks."""
    table, common = across_tasks(comparisons)
    if table.empty:
        return None
    lines = [(label, k, common[label]) for k, label in enumerate(table["label"].head(_MOST))]
    words = (
        f"Share of runs above each score over {len(comparisons)} tasks, which count alike; the {len(lines)} best "
        "configurations by interquartile mean"
    )
    return _draw("profiles", "Performance profiles over tasks", words, lines, comparisons[0])


def _draw(
    name: str, title: str, words: str, lines: list[tuple[str, int, list[Array]]], comparison: Comparison
) -> Drawing:
    scores = np.concatenate([each for _, _, runs in lines for each in runs])
    margin = 0.02 * (float(np.ptp(scores)) or 1.0)
    thresholds = np.linspace(scores.min() - margin, scores.max() + margin, _POINTS)
    with styled():
        figure, (axes,) = canvas(COLUMN, 2.1 + 0.13 * ((len(lines) + 1) // 2))
        drawing = Drawing(
            name,
            title,
            f"{words}. Bands: pointwise 95% intervals (Wilson), as if runs were independent; n counts runs.",
            f"{title}: " + ", ".join(label for label, _, _ in lines) + ".",
            figure,
        )
        handles = []
        for label, position, runs in lines:
            found, style = profile(runs, thresholds), look(position)
            (line,) = axes.plot(thresholds, found.share, color=style["color"], linestyle=style["linestyle"])
            axes.fill_between(thresholds, found.low, found.high, color=style["color"], alpha=0.1, linewidth=0)
            handles.append((line, f"{shortened(label, 22)} (n = {found.runs})"))
        axes.set_xlabel(f"{comparison.score.title} above")
        axes.set_ylabel("share of runs")
        axes.set_ylim(0.0, 1.0)
        legend_below(figure, *zip(*handles, strict=True))
    return drawing
