"""Reward against KL to the reference, with the Pareto front and lines of equal E[R] − β·KL."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from klab.reports.comparison import Comparison
from klab.reports.figures.style import INK, MUTED, NARROW, RULE, SERIES, WIDE, Drawing, canvas, shortened, styled
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
    cells = study.cells[(study.cells["task"] == comparison.task) & study.cells["state"].isin(["finished", "diverged"])]
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
    beta = _coefficient(study, comparison)
    with styled():
        figure, (axes,) = canvas(WIDE, NARROW)
        drawing = Drawing(
            "tradeoff",
            "Reward against distance from the reference",
            "One point per cell, means over seeds; bars of the score are simultaneous 95% intervals, those of the KL "
            "t-intervals. "
            + ("" if all(stable) else "Hollow: a seed diverged or failed. ")
            + "The stepped line joins the cells that no other stable cell beats on both"
            + (f"; the thin lines have equal E[R] − β·KL for the baseline's β = {beta:g}." if beta else "."),
            "Pareto front of reward against KL: " + ", ".join(table["label"].iloc[i] for i in front[:6]) + ".",
            figure,
        )
        label = comparison.score.title
        axes.set_xlabel("KL(policy ‖ reference), nats per trajectory")
        axes.set_ylabel(label)
        for i, row in enumerate(table.itertuples()):
            base = row.group == comparison.baseline
            color = SERIES[1] if base else SERIES[0] if i in front else MUTED
            interval = kl[str(row.group)]
            if len(x) <= _WITH_BARS and stable[i]:
                axes.plot(
                    [x[i], x[i]],
                    [row.low, row.high],
                    color=color,
                    linewidth=0.9,
                    alpha=0.6 if i in front or base else 0.3,
                )
                axes.plot(
                    [interval.low, interval.high],
                    [y[i], y[i]],
                    color=color,
                    linewidth=0.9,
                    alpha=0.6 if i in front or base else 0.3,
                )
            (point,) = axes.plot(
                x[i],
                y[i],
                marker="D" if base else "o",
                markersize=5 if i in front or base else 4,
                linestyle="none",
                color=color,
                markerfacecolor=color if stable[i] else "none",
                alpha=1.0 if i in front or base else 0.75,
            )
            point.set_gid(drawing.tip(f"{row.label}: {label} {y[i]:.3f}, KL {x[i]:.3g} nats, n = {row.n}"))
        if len(front) > 1:
            axes.step(
                [x[i] for i in front], [y[i] for i in front], where="post", color=SERIES[0], linewidth=1.0, alpha=0.6
            )
        axes.set_xlim(left=max(axes.get_xlim()[0], -0.03 * axes.get_xlim()[1]))
        if beta and comparison.score.higher:
            _iso_lines(axes, beta)
        base_at = [i for i, group in enumerate(table["group"]) if group == comparison.baseline]
        _place_labels(
            axes, x, y, list(dict.fromkeys([*front[-_LABELLED:], *base_at])), table["label"].to_list(), len(x) <= 14
        )
    return drawing


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
        axes.plot([low_x, high_x], [start, start + beta * (high_x - low_x)], color=RULE, linewidth=0.8, zorder=0)
    axes.grid(False)
    axes.set_xlim(low_x, high_x)
    axes.set_ylim(low_y, high_y)


def _place_labels(axes: Any, x: list[float], y: list[float], first: list[int], names: list[str], every: bool) -> None:
    """Labels right of (or left of, above, below) their points, important ones first; one that would cover another is
    left out.
    """
    low_x, high_x = axes.get_xlim()
    low_y, high_y = axes.get_ylim()
    width, height = (high_x - low_x) / 92, (high_y - low_y) / 24
    taken: list[tuple[float, float, float, float]] = [
        (x[i] - width / 2, y[i] - height / 4, x[i] + width / 2, y[i] + height / 4) for i in first
    ]
    order = list(dict.fromkeys([*first, *(range(len(x)) if every else ())]))
    for i in order:
        text = shortened(names[i], 30)
        span = width * len(text)
        for dx, dy, align in (
            (1.2, 0, "left"),
            (-1.2, 0, "right"),
            (0.6, 0.9, "left"),
            (0.6, -0.9, "left"),
            (-0.6, 0.9, "right"),
            (-0.6, -0.9, "right"),
        ):
            left = x[i] + dx * width if align == "left" else x[i] + dx * width - span
            box = (left, y[i] + (dy - 0.45) * height, left + span, y[i] + (dy + 0.45) * height)
            clear = all(box[2] < t[0] or t[2] < box[0] or box[3] < t[1] or t[3] < box[1] for t in taken)
            if clear and box[0] > low_x and box[2] < high_x:
                axes.text(
                    x[i] + dx * width,
                    y[i] + dy * height,
                    text,
                    ha=align,
                    va="center",
                    fontsize=7,
                    color=INK if i in first else MUTED,
                )
                taken.append(box)
                break
