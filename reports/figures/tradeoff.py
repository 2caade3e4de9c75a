"""Reward against KL to the reference, with the Pareto front and lines of equal E[R] − β·KL."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from klab.reports.comparison import Comparison
from klab.reports.figures.labels import label_points
from klab.reports.figures.style import COLUMN, MUTED, RULE, SERIES, Drawing, canvas, styled
from klab.reports.statistics import t_interval
from klab.reports.study import Study

_LABELLED = 8
_WITH_BARS = 40


def pareto_front(kl: Sequence[float], score: Sequence[float]) -> list[int]:
    """Positions of the points that no other point beats on both, in order of rising KL."""
    front: list[int] = []
    for i in sorted(range(len(kl)), key=lambda i: (kl[i], -score[i])):
        if not front or score[i] > score[front[-1]]:
            front.append(i)
    return front


def tradeoff(study: Study, comparison: Comparison) -> Drawing | None:
    """One point per cell; None when no cell has both numbers."""
    ended = study.cells["state"].isin(["finished", "diverged", "stopped"])
    cells = study.cells[(study.cells["task"] == comparison.task) & ended]
    kl = {group: t_interval(part.to_numpy()) for group, part in cells.groupby("group")["reverse_kl_final"]}
    table = comparison.table[[group in kl and np.isfinite(kl[group].estimate) for group in comparison.table["group"]]]
    table = table[np.isfinite(table["mean"])]
    if table.empty:
        return None
    x = [kl[group].estimate for group in table["group"]]
    y = table["mean"].to_list()
    stable = table["stable"].to_list()
    candidates = [i for i in range(len(x)) if stable[i]] or list(range(len(x)))
    front = [candidates[i] for i in pareto_front([x[i] for i in candidates], [y[i] for i in candidates])]
    if not comparison.score.higher:
        front = []
    base = [i for i, group in enumerate(table["group"]) if group == comparison.baseline]
    beta = _coefficient(study, comparison)
    title = comparison.score.title
    with styled():
        figure, (axes,) = canvas(COLUMN, 2.6)
        drawing = Drawing(
            "tradeoff",
            "Reward against distance from the reference",
            f"One point per cell, means over n = {_counts(table['n'])} seeds; bars of the score are simultaneous 95% "
            "intervals, those of the KL t-intervals. "
            + ("" if all(stable) else "Hollow: a seed diverged, was stopped or failed. ")
            + "Diamond: the baseline"
            + (f" ({words})" if (words := comparison.baseline_words) else "")
            + ". The stepped line joins the cells that no other stable cell beats on both"
            + (f"; the thin lines have equal E[R] − β·KL for the baseline's β = {beta:g}." if beta else "."),
            "Pareto front of reward against KL: " + ", ".join(table["label"].iloc[i] for i in front[:6]) + ".",
            figure,
        )
        axes.set_xlabel("KL(policy ‖ reference), nats per trajectory")
        axes.set_ylabel(title)
        bars = []
        for i, row in enumerate(table.itertuples()):
            main = i in front or i in base
            color = SERIES[1] if i in base else SERIES[0] if i in front else MUTED
            interval = kl[str(row.group)]
            if len(x) <= _WITH_BARS and stable[i]:
                own = [(x[i], row.low, x[i], row.high), (interval.low, y[i], interval.high, y[i])]
                for x0, y0, x1, y1 in own:
                    axes.plot([x0, x1], [y0, y1], color=color, linewidth=0.8, alpha=0.6 if main else 0.3)
                bars += [bar for bar in own if np.isfinite(bar).all()]
            (point,) = axes.plot(
                x[i],
                y[i],
                marker="D" if i in base else "o",
                markersize=4 if main else 3,
                linestyle="none",
                color=color,
                markerfacecolor=color if stable[i] else "none",
                alpha=1.0 if main else 0.75,
            )
            point.set_gid(drawing.tip(f"{row.label}: {title} {y[i]:.3f}, KL {x[i]:.3g} nats, n = {row.n}"))
        if len(front) > 1:
            steps = {"where": "post", "color": SERIES[0], "linewidth": 0.9, "alpha": 0.6}
            axes.step([x[i] for i in front], [y[i] for i in front], **steps)
            for a, b in pairwise(front):
                bars += [(x[a], y[a], x[b], y[a]), (x[b], y[a], x[b], y[b])]
        axes.set_xlim(left=max(axes.get_xlim()[0], -0.03 * axes.get_xlim()[1]))
        if beta and comparison.score.higher:
            _iso_lines(axes, beta)
        main_points = list(dict.fromkeys([*base, *front[-_LABELLED:]]))
        only = range(len(x)) if len(x) <= 14 else main_points
        label_points(figure, axes, x, y, table["label"].to_list(), first=main_points, only=only, bars=bars)
    return drawing


def _counts(n: Any) -> str:
    low, high = int(n.min()), int(n.max())
    return str(low) if low == high else f"{low} to {high}"


def _coefficient(study: Study, comparison: Comparison) -> float | None:
    """β of the baseline, where it acts."""
    if comparison.baseline is None:
        return None
    cell = study.configurations[comparison.baseline]
    beta = cell.objective.canonical(cell.training.on_policy).get("placement.beta")
    return float(beta) if beta else None


def _iso_lines(axes: Any, beta: float) -> None:
    low_x, high_x = axes.get_xlim()
    low_y, high_y = axes.get_ylim()
    for start in np.linspace(low_y - beta * (high_x - low_x), high_y, 9)[1:-1]:
        axes.plot([low_x, high_x], [start, start + beta * (high_x - low_x)], color=RULE, linewidth=0.6, zorder=0)
    axes.grid(False)
    axes.set_xlim(low_x, high_x)
    axes.set_ylim(low_y, high_y)
