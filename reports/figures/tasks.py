"""Across tasks: performance profiles and interquartile means of configurations that ran on several tasks."""

from __future__ import annotations

import numpy as np
import pandas as pd

from klab.reports.comparison import Comparison
from klab.reports.figures.style import WIDE, Drawing, canvas, look, shortened, styled
from klab.reports.statistics import Array, interquartile_mean, optimality_gap, performance_profile

_MOST = 8


def across_tasks(comparisons: list[Comparison]) -> tuple[pd.DataFrame, dict[str, Array]]:
    """Configurations that ran on every task with equally many ended seeds: their aggregate scores, and `[seeds,
    tasks]` by label.
    """
    common: dict[str, Array] = {}
    if len(comparisons) >= 2:
        scores = [
            dict(
                zip(
                    comparison.table["label"],
                    (comparison.scores[comparison.groups.index(g)] for g in comparison.table["group"]),
                    strict=True,
                )
            )
            for comparison in comparisons
        ]
        for label in scores[0]:
            runs = [s[label][np.isfinite(s[label])] for s in scores if label in s]
            size = min((len(r) for r in runs), default=0)
            if len(runs) == len(comparisons) and size > 0:
                common[label] = np.column_stack([r[:size] for r in runs])
    rows = []
    for label, matrix in common.items():
        rows.append(
            {
                "label": label,
                "seeds": matrix.shape[0],
                "tasks": matrix.shape[1],
                "iqm": interquartile_mean(matrix),
                "mean": float(matrix.mean()),
                "optimality_gap": optimality_gap(matrix),
            }
        )
    columns = ["label", "seeds", "tasks", "iqm", "mean", "optimality_gap"]
    return pd.DataFrame(rows, columns=columns).sort_values("iqm", ascending=False, ignore_index=True), common


def profiles(comparisons: list[Comparison]) -> Drawing | None:
    """Share of runs above each score; None with fewer than two tasks."""
    table, common = across_tasks(comparisons)
    if table.empty:
        return None
    low = min(float(matrix.min()) for matrix in common.values())
    high = max(float(matrix.max()) for matrix in common.values())
    thresholds = np.linspace(low, high, 101)
    with styled():
        figure, (axes,) = canvas(WIDE, 2.6)
        drawing = Drawing(
            "profiles",
            "Performance profiles over tasks",
            f"Share of (seed, task) runs above each score, the {min(len(table), _MOST)} best configurations by "
            "interquartile mean.",
            "Performance profiles of " + ", ".join(table["label"].head(_MOST)) + ".",
            figure,
        )
        for k, label in enumerate(table["label"].head(_MOST)):
            style = look(k)
            axes.plot(
                thresholds,
                performance_profile(common[label], thresholds),
                color=style["color"],
                linestyle=style["linestyle"],
                label=shortened(label),
            )
        axes.set_xlabel(f"{comparisons[0].score.title} above")
        axes.set_ylabel("share of runs")
        axes.legend(loc="lower left")
    return drawing
