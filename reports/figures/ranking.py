"""Cells ranked with intervals, and every seed of the main cells."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator

from klab.reports.comparison import Comparison
from klab.reports.figures.style import INK, MUTED, SERIES, Drawing, look, placed, shortened, spread_labels, styled
from klab.reports.frame import records
from klab.reports.words import mean_span

MOST = 30


def ranking(comparison: Comparison) -> Drawing | None:
    """The best cells, the baseline and the last one, best on top, those in colour that beat the baseline."""
    table = records(comparison.table)
    rows = [i for i, record in enumerate(table) if np.isfinite(record["mean"])]
    if not rows:
        return None
    chosen = rows if len(rows) <= MOST else rows[: MOST - 2]
    if len(rows) > MOST:
        base = [i for i in rows if table[i]["group"] == comparison.baseline]
        chosen = sorted({*chosen, *base, rows[-1]})
    lossy = any(not table[row]["stable"] for row in chosen)
    left_out = len(rows) - len(chosen)
    with styled():
        figure, axes = placed(0.45 + 0.17 * len(chosen), left=1.3, right=0.08, top=0.05, bottom=0.36)
        drawing = Drawing(
            "ranking",
            "Cells ranked",
            f"Dots are means over {_seeds(table, chosen)}, bars 95% intervals that hold for all cells together, small "
            "marks single seeds. "
            + (
                f"Hollow: a seed diverged (counts as {comparison.worst:.3g}), was stopped (censored) or failed. "
                if lossy
                else ""
            )
            + "Blue: differs from the baseline for the better; diamond: the baseline"
            + (f" ({words})." if (words := comparison.baseline_words) else ".")
            + (f" {left_out} cells between are left out; the table has them." if left_out else ""),
            "Best first: " + ", ".join(table[row]["label"] for row in chosen[:5]) + ".",
            figure,
        )
        for place, row in enumerate(chosen):
            _row(axes, drawing, comparison, table[row], -place)
        names = [_name(table[row]) for row in chosen]
        axes.set_yticks([-place for place in range(len(chosen))], names, fontsize=6)
        for label, row in zip(axes.get_yticklabels(), chosen, strict=True):
            label.set_color(INK if table[row]["better"] or table[row]["group"] == comparison.baseline else MUTED)
        if _limited(axes, [table[row] for row in chosen]):
            drawing.caption += " An arrow: the interval goes on; the table has its end."
        axes.set_xlabel(comparison.score.title)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
        axes.grid(axis="y", visible=False)
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(-len(chosen) + 0.4, 0.6)
    return drawing


def _row(axes: Any, drawing: Drawing, comparison: Comparison, record: dict[str, Any], y: int) -> None:
    base = record["group"] == comparison.baseline
    color = SERIES[1] if base else SERIES[0] if record["better"] else MUTED
    seeds = comparison.scores[comparison.groups.index(record["group"])]
    axes.plot(
        seeds, np.full(seeds.shape, y + 0.27), linestyle="none", marker="|", markersize=2.5, color=color, alpha=0.6
    )
    axes.plot([record["low"], record["high"]], [y, y], color=color, linewidth=1.8, alpha=0.5)
    (point,) = axes.plot(
        record["mean"],
        y,
        linestyle="none",
        marker="D" if base else "o",
        markersize=3.6,
        color=color,
        markerfacecolor=color if record["stable"] else "none",
    )
    lost = record["diverged"] + record["stopped"] + record["failed"]
    words = f", {lost} of {record['seeds']} seeds lost" if lost else ""
    span = mean_span(record["mean"], record["low"], record["high"])
    point.set_gid(drawing.tip(f"{record['label']}: {span}, n = {record['n']}{words}"))


def _limited(axes: Any, shown: list[dict[str, Any]]) -> bool:
    """Ends the axis where the intervals of stable cells do, and marks those that go on: a cell with a diverged run may
    have one many times as wide as all others together. Whether there are any.
    """
    kept = [row for row in shown if row["stable"]] or shown
    ends = np.asarray([[row["low"], row["high"], row["mean"]] for row in kept] + [[row["mean"]] * 3 for row in shown])
    low, high = float(np.nanmin(ends)), float(np.nanmax(ends))
    margin = 0.05 * (high - low) or 0.05
    low, high = low - margin, high + margin
    axes.set_xlim(low, high)
    beyond = False
    for place, row in enumerate(shown):
        for outside, x, marker in ((row["low"] < low, low, 8), (row["high"] > high, high, 9)):
            if outside:
                axes.plot(x, -place, marker=marker, color=MUTED, markersize=4, linestyle="none", clip_on=False)
            beyond |= bool(outside)
    return beyond


def _seeds(table: list[dict[str, Any]], chosen: list[int]) -> str:
    counts = sorted({table[row]["n"] for row in chosen})
    return f"n = {counts[0]} seeds" if len(counts) == 1 else f"n = {counts[0]} to {counts[-1]} seeds"


def _name(record: dict[str, Any]) -> str:
    lost = record["diverged"] + record["stopped"] + record["failed"]
    label = str(record["label"])
    return f"{shortened(label, 18)} ({record['finished']}/{record['seeds']})" if lost else shortened(label, 24)


def seed_lines(comparison: Comparison) -> Drawing | None:
    """The scores of the main cells by seed: parallel lines mean that a seed shifts all cells alike, which differences
    between cells on the same seeds remove.
    """
    if len(comparison.seeds) < 2 or not comparison.comparable:
        return None
    groups = list(comparison.table["group"])
    chosen = list(dict.fromkeys([*groups[:4], *([comparison.baseline] if comparison.baseline else []), *groups[-1:]]))
    labels = dict(zip(comparison.table["group"], comparison.table["label"], strict=True))
    chosen = [group for group in chosen if group in labels]
    seeds = comparison.seeds[:40]
    with styled():
        figure, axes = placed(2.0, left=0.56, right=1.08, top=0.08, bottom=0.36)
        drawing = Drawing(
            "seeds",
            "Seed by seed",
            f"The score of the best cells, the baseline and the last one, by training seed (n = {len(comparison.seeds)}"
            ")."
            " Hollow marks are diverged seeds, at the worst score, and stopped ones. Where lines run in parallel a "
            "seed shifts all cells alike, and differences are known better than the means of cells.",
            "Scores by seed for " + ", ".join(labels[group] for group in chosen) + ".",
            figure,
        )
        ends = []
        for k, group in enumerate(chosen):
            row = comparison.groups.index(group)
            values = comparison.scores[row][: len(seeds)]
            style = look(k)
            line = {"color": style["color"], "linestyle": style["linestyle"]}
            axes.plot(range(len(seeds)), values, linewidth=0.8, alpha=0.7, **line)
            for s in np.flatnonzero(np.isfinite(values)).tolist():
                state = comparison.states[row][s]
                (point,) = axes.plot(
                    s,
                    values[s],
                    marker=style["marker"],
                    color=style["color"],
                    markersize=3.6,
                    linestyle="none",
                    markerfacecolor=style["color"] if state == "finished" else "none",
                )
                point.set_gid(drawing.tip(f"{labels[group]}, seed {seeds[s]}: {values[s]:.3f} ({state})"))
            present = np.flatnonzero(np.isfinite(values))
            if present.size:
                ends.append((labels[group], float(values[present[-1]]), style["color"]))
        axes.set_xticks(range(len(seeds)), [str(seed) for seed in seeds])
        axes.set_xlabel("training seed")
        axes.set_ylabel(comparison.score.title)
        low, high = axes.get_ylim()
        places = spread_labels([value for _, value, _ in ends], (high - low) * 0.07)
        for (label, _, color), y in zip(ends, places, strict=True):
            axes.annotate(
                shortened(label, 21),
                (len(seeds) - 1, y),
                xytext=(6, 0),
                textcoords="offset points",
                va="center",
                fontsize=6,
                color=color,
                annotation_clip=False,
            )
        axes.set_ylim(low, high)
    return drawing
