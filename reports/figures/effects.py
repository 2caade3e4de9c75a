"""What each axis does: differences from the baseline's value, and heat maps of two-axis interactions."""

from __future__ import annotations

from typing import Any

import numpy as np

from klab.reports.comparison import Comparison
from klab.reports.figures.style import INK, MUTED, RULE, WIDE, Drawing, canvas, look, shortened, styled
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
    rows = sum(len(levels[effect.axis]) + 1.9 for effect in effects)
    with styled():
        figure, (axes,) = canvas(WIDE, 0.45 + 0.185 * rows)
        drawing = Drawing(
            "effects",
            "What each axis changes",
            "Difference from the baseline's value between cells that differ in nothing else; bars are 95% intervals, "
            "simultaneous over all values. Right: the verdict and p of the axis.",
            "Axes: " + ", ".join(f"{effect.axis} {effect.words}" for effect in effects) + ".",
            figure,
        )
        place = 0.0
        ticks: list[float] = []
        names: list[str] = []
        headings: list[tuple[float, str, str]] = []
        for effect in effects:
            axis = titles[effect.axis]
            note = f"{effect.verdict}, {p_words(effect.p)}" if np.isfinite(effect.p) else "no inference"
            headings.append((place, axis.title, note))
            place -= 1
            for value in axis.values:
                reference, level = value == base[axis.key], levels[axis.key].get(value)
                if level is None and not reference:
                    continue
                style = look(axis.values.index(value))
                if level is not None and np.isfinite(level["low"]):
                    axes.plot(
                        [level["low"], level["high"]], [place, place], color=style["color"], linewidth=2.2, alpha=0.5
                    )
                (point,) = axes.plot(
                    0.0 if level is None else level["difference"],
                    place,
                    linestyle="none",
                    markersize=5,
                    marker=style["marker"],
                    color=style["color"],
                    markerfacecolor="none" if reference else style["color"],
                )
                words = "the baseline's value"
                if level is not None:
                    words = (
                        f"{difference_span(level['difference'], level['low'], level['high'])}, {p_words(level['p'])}"
                    )
                point.set_gid(drawing.tip(f"{effect.axis} = {value}: {words}"))
                ticks.append(place)
                names.append(shortened(value, 30))
                place -= 1
            place -= 0.9
        axes.axvline(0, color=MUTED, linewidth=0.8)
        axes.set_yticks(ticks, names)
        axes.set_ylim(place + 0.6, 0.8)
        axes.grid(axis="y", visible=False)
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel(f"change of the {comparison.score.title}")
        for at, title, note in headings:
            axes.text(0.0, at, title, fontweight="bold", va="center", transform=axes.get_yaxis_transform())
            axes.text(
                1.0, at, note, ha="right", va="center", fontsize=7, color=MUTED, transform=axes.get_yaxis_transform()
            )
    return drawing


def interaction_maps(study: Study, comparison: Comparison) -> Drawing | None:
    """Largest interaction of every pair of axes, and mean scores of the clearest pair; None when the design crosses no
    axes.
    """
    import seaborn

    axes_of = {axis.key: axis for axis in study.axes}
    crossed = [
        row
        for row in records(comparison.analysis.interactions)
        if np.isfinite(row["difference"]) and row["axis"] in axes_of and row["other"] in axes_of
    ]
    if not crossed:
        return None
    keys = [axis.key for axis in study.axes if any(axis.key in (row["axis"], row["other"]) for row in crossed)]
    sizes = np.full((len(keys), len(keys)), np.nan)
    for row in crossed:
        i, j = sorted((keys.index(row["axis"]), keys.index(row["other"])))
        sizes[j, i] = abs(row["difference"])
    top = min(crossed, key=lambda row: (np.nan_to_num(row["p"], nan=2.0), -abs(row["difference"])))
    first, second = axes_of[top["axis"]], axes_of[top["other"]]
    means = np.full((len(second.values), len(first.values)), np.nan)
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
    with styled():
        figure, (left, right) = canvas(WIDE, 1.2 + 0.3 * max(len(keys), len(second.values)), 1, 2)
        span = difference_span(top["difference"], top["low"], top["high"])
        drawing = Drawing(
            "interactions",
            "Which axes act together",
            "Left: by how much the difference that a value of one axis makes changes with a value of the other, the "
            "clearest pair of values. Right: mean score for the clearest pair of axes, "
            f"{first.title} × {second.title} ({span}, {p_words(top['p'])}, {top['verdict']}).",
            f"The clearest interaction is {first.key} with {second.key}: {span}.",
            figure,
        )
        names = [axes_of[key].short for key in keys]
        text = {"fontsize": 7}
        seaborn.heatmap(
            sizes[1:, :-1],
            mask=np.isnan(sizes[1:, :-1]),
            ax=left,
            cmap="crest",
            annot=True,
            fmt=".2f",
            cbar=False,
            vmin=0,
            linewidths=1.5,
            linecolor=RULE,
            xticklabels=names[:-1],
            yticklabels=names[1:],
            annot_kws=text,
        )
        seaborn.heatmap(
            means,
            mask=np.isnan(means),
            ax=right,
            cmap="crest_r" if not comparison.score.higher else "crest",
            annot=means.size <= 80,
            fmt=".2f",
            cbar=False,
            linewidths=1.5,
            linecolor=RULE,
            xticklabels=[shortened(v, 18) for v in first.values],
            yticklabels=[shortened(v, 18) for v in second.values],
            annot_kws=text,
        )
        left.set_title("size of the interaction")
        right.set_title(f"mean score: {first.short} × {second.short}")
        for axes in (left, right):
            axes.grid(False)
            axes.tick_params(length=0, labelcolor=INK)
            axes.tick_params(axis="y", rotation=0)
            for label in axes.get_xticklabels():
                label.set(rotation=30, ha="right", rotation_mode="anchor")
    return drawing
