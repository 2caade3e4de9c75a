"""Learning curves: for one axis, reward and KL to the reference over updates, one line per value."""

from __future__ import annotations

from typing import Any

import numpy as np

from klab.reports.axes import VariedAxis
from klab.reports.comparison import Comparison
from klab.reports.figures.series import Cube, average, cube, over_seeds, representatives, smoothed
from klab.reports.figures.style import MUTED, WIDE, Drawing, canvas, look, shortened, spread_labels, styled
from klab.reports.study import Study

MOST_VALUES = 12


def axis_curves(
    study: Study, comparison: Comparison, axis: VariedAxis, position: int, cubes: tuple[Cube, Cube]
) -> Drawing | None:
    """The panel pair of `axis`; None when fewer than two of its values can be shown."""
    shown = representatives(study, comparison, axis)[:MOST_VALUES]
    if len(shown) < 2 or not cubes[0].updates.size:
        return None
    labels = [(value, axis.values.index(value), groups) for value, groups in shown]
    averaged = any(len(groups) > 1 for _, _, groups in labels)
    words = (
        "Each line averages all cells with the value"
        if averaged
        else "Each line is the baseline with only this axis changed"
    )
    return _draw(comparison, f"curves-{position}", f"Learning curves by {axis.title}", words, labels, cubes)


def cell_curves(study: Study, comparison: Comparison, cubes: tuple[Cube, Cube]) -> Drawing | None:
    """The best cells, the baseline and the worst, for studies without a varied axis or as an overview."""
    order = [comparison.groups.index(group) for group in comparison.table["group"] if group in comparison.groups]
    chosen = list(dict.fromkeys(order if len(order) <= 6 else [*order[:4], order[-1]]))
    if comparison.baseline and (base := comparison.groups.index(comparison.baseline)) not in chosen:
        chosen.append(base)
    if not chosen or not cubes[0].updates.size:
        return None
    names = study.labels
    labels = [(names[comparison.groups[i]], k, [i]) for k, i in enumerate(chosen)]
    words = "The best cells, the worst, and the baseline" if len(order) > 6 else "All cells"
    return _draw(comparison, "curves-cells", "Learning curves of cells", words, labels, cubes)


def curve_cubes(study: Study, comparison: Comparison) -> tuple[Cube, Cube]:
    """Smoothed training reward, and KL to the reference at evaluations."""
    reward = cube(study, comparison, study.metrics, "reward_mean")
    window = max(reward.updates.size // 20, 1) | 1
    return Cube(reward.updates, smoothed(reward.values, window)), cube(
        study, comparison, study.evaluations, "reverse_kl"
    )


def _draw(
    comparison: Comparison,
    name: str,
    title: str,
    words: str,
    labels: list[tuple[str, int, list[int]]],
    cubes: tuple[Cube, Cube],
) -> Drawing:
    window = max(cubes[0].updates.size // 20, 1) | 1
    with styled():
        figure, panels = canvas(WIDE, 2.5, 1, 2)
        drawing = Drawing(
            name,
            title,
            f"{words}. Lines are means over {len(comparison.seeds)} seeds, bands 95% t-intervals. At a cross a seed "
            "ends early; "
            f"the dotted rest is the mean of the others. The reward is a moving average over {window} "
            f"update{'s' if window > 1 else ''}.",
            f"{title}: " + ", ".join(label for label, _, _ in labels) + ".",
            figure,
        )
        for axes, data, heading, unit in zip(
            panels,
            cubes,
            ("Training reward", "KL to the reference"),
            ("mean reward", "nats per trajectory"),
            strict=True,
        ):
            axes.set_title(heading)
            axes.set_xlabel("optimizer updates")
            axes.set_ylabel(unit)
            ends: list[tuple[str, float, Any]] = []
            for label, position, groups in labels:
                curve = over_seeds(data.updates, average(data.values[groups], 0))
                if not curve.updates.size:
                    continue
                style = look(position)
                marks = {"marker": style["marker"], "markersize": 3, "markevery": max(curve.updates.size // 6, 1)}
                whole = curve.n == curve.n[0]
                (line,) = axes.plot(
                    curve.updates[whole], curve.mean[whole], color=style["color"], linestyle=style["linestyle"], **marks
                )
                band = whole & np.isfinite(curve.low) & np.isfinite(curve.high)
                if band.any():
                    axes.fill_between(
                        curve.updates[band],
                        curve.low[band],
                        curve.high[band],
                        color=style["color"],
                        alpha=0.13,
                        linewidth=0,
                    )
                if not whole.all():
                    end = int(np.flatnonzero(whole)[-1])
                    axes.plot(curve.updates[end], curve.mean[end], marker="x", color=style["color"], markersize=6)
                    axes.plot(
                        curve.updates[end:],
                        curve.mean[end:],
                        color=style["color"],
                        linewidth=0.9,
                        linestyle=":",
                        alpha=0.8,
                    )
                line.set_gid(
                    drawing.tip(f"{label}: {heading.lower()} {curve.mean[-1]:.3g} at update {curve.updates[-1]}")
                )
                ends.append((label, float(curve.mean[-1]), style["color"]))
            _label_ends(axes, ends, int(data.updates[-1]) if data.updates.size else 1)
    return drawing


def _label_ends(axes: Any, ends: list[tuple[str, float, Any]], last: int) -> None:
    if not ends:
        return
    low, high = axes.get_ylim()
    places = spread_labels([value for _, value, _ in ends], (high - low) * 0.075)
    for (label, _, color), place in zip(ends, places, strict=True):
        axes.annotate(
            shortened(label, 24),
            (last, place),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            color=color,
            fontsize=7,
            annotation_clip=False,
        )
    axes.set_ylim(low, high)
    axes.tick_params(color=MUTED)
