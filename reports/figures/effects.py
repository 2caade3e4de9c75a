"""What each axis does: main effects against the baseline's value, and heat maps of two-axis interactions."""

from __future__ import annotations

import numpy as np

from klab.reports.comparison import Comparison
from klab.reports.figures.style import INK, MUTED, RULE, WIDE, Drawing, canvas, look, shortened, styled
from klab.reports.schema import TITLES
from klab.reports.study import Study


def main_effect_plot(study: Study, comparison: Comparison) -> Drawing | None:
    """One line per axis value: its effect on the score with a 95% interval."""
    effects = [
        effect for effect in comparison.effects if any(np.isfinite(level.estimate) for level in effect.levels[1:])
    ]
    if not effects:
        return None
    order = {axis.key: axis for axis in study.axes}
    rows = sum(len(effect.levels) + 0.9 for effect in effects)
    with styled():
        figure, (axes,) = canvas(WIDE, 0.45 + 0.185 * rows)
        drawing = Drawing(
            "effects",
            "What each axis changes",
            "Change of the score when one axis leaves the baseline's value, the others held; bars are 95% intervals "
            "over seeds. Axes in order of "
            "the largest change. Right: p of the axis, adjusted by Holm.",
            "Axes by size of their effect: "
            + ", ".join(f"{effect.axis} {effect.spread:.3f}" for effect in effects)
            + ".",
            figure,
        )
        place = 0.0
        ticks: list[float] = []
        names: list[str] = []
        headings: list[tuple[float, str, str]] = []
        for effect in effects:
            axis = order[effect.axis]
            headings.append((place, axis.title, _p_text(effect.p_holm, effect.confounded)))
            place -= 1
            levels = {level.value: level for level in effect.levels}
            for value in [value for value in axis.values if value in levels]:
                level = levels[value]
                style = look(axis.values.index(value))
                reference = value == effect.reference
                if np.isfinite(level.low) and not reference:
                    axes.plot([level.low, level.high], [place, place], color=style["color"], linewidth=2.2, alpha=0.5)
                (point,) = axes.plot(
                    0.0 if np.isnan(level.estimate) else level.estimate,
                    place,
                    linestyle="none",
                    markersize=5,
                    marker="x" if np.isnan(level.estimate) else style["marker"],
                    color=MUTED if np.isnan(level.estimate) else style["color"],
                    markerfacecolor="none" if reference else style["color"],
                )
                words = "the reference" if reference else f"{level.estimate:+.3f} [{level.low:+.3f}, {level.high:+.3f}]"
                if np.isnan(level.estimate):
                    words = "cannot be separated from " + ", ".join(effect.confounded)
                point.set_gid(drawing.tip(f"{effect.axis} = {value}: {words}; {level.cells} cells"))
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
        axes.set_xlabel(f"change of {TITLES[comparison.metric]}")
        for at, title, note in headings:
            axes.text(0.0, at, title, fontweight="bold", va="center", transform=axes.get_yaxis_transform())
            axes.text(
                1.0, at, note, ha="right", va="center", fontsize=7, color=MUTED, transform=axes.get_yaxis_transform()
            )
    return drawing


def _p_text(p: float, confounded: tuple[str, ...]) -> str:
    if confounded:
        return "confounded with " + ", ".join(confounded)
    if np.isnan(p):
        return "no test: one seed"
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def interaction_maps(study: Study, comparison: Comparison) -> Drawing | None:
    """Share of variance of every pair of axes, and mean scores of the strongest pair; None when the design crosses no
    axes.
    """
    import seaborn

    crossed = [pair for pair in comparison.interactions if pair.freedom > 0 and np.isfinite(pair.share)]
    if not crossed:
        return None
    axes_of = {axis.key: axis for axis in study.axes}
    keys = [axis.key for axis in study.axes if any(axis.key in (pair.first, pair.second) for pair in crossed)]
    shares = np.full((len(keys), len(keys)), np.nan)
    for pair in crossed:
        i, j = sorted((keys.index(pair.first), keys.index(pair.second)))
        shares[j, i] = pair.share
    top = crossed[0]
    first, second = axes_of[top.first], axes_of[top.second]
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
        p = (
            "p < 0.001"
            if top.p_holm < 0.001
            else f"p = {top.p_holm:.3f}"
            if np.isfinite(top.p_holm)
            else "not testable"
        )
        drawing = Drawing(
            "interactions",
            "Which axes act together",
            "Left: share of the variance between observations (seeds removed) that a pair of axes explains beyond "
            "their main effects. Right: mean "
            f"score for the strongest pair, {first.title} × {second.title} ({p}, Holm over all pairs).",
            f"The strongest interaction is {first.key} with {second.key}: {top.share:.1%} of the variance.",
            figure,
        )
        names = [axes_of[key].short for key in keys]
        text = {"fontsize": 7}
        seaborn.heatmap(
            shares[1:, :-1] * 100,
            mask=np.isnan(shares[1:, :-1]),
            ax=left,
            cmap="crest",
            annot=True,
            fmt=".1f",
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
            cmap="crest_r" if not comparison.higher else "crest",
            annot=means.size <= 80,
            fmt=".2f",
            cbar=False,
            linewidths=1.5,
            linecolor=RULE,
            xticklabels=[shortened(v, 18) for v in first.values],
            yticklabels=[shortened(v, 18) for v in second.values],
            annot_kws=text,
        )
        left.set_title("% of variance")
        right.set_title(f"mean score: {first.short} × {second.short}")
        for axes in (left, right):
            axes.grid(False)
            axes.tick_params(length=0, labelcolor=INK)
            axes.tick_params(axis="y", rotation=0)
            for label in axes.get_xticklabels():
                label.set(rotation=30, ha="right", rotation_mode="anchor")
    return drawing
