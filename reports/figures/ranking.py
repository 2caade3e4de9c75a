"""Cells ranked with intervals, and every seed of the main cells."""

from __future__ import annotations

from typing import Any

import numpy as np

from klab.reports.comparison import Comparison
from klab.reports.figures.style import (
    INK,
    MUTED,
    NARROW,
    SERIES,
    WIDE,
    Drawing,
    canvas,
    look,
    shortened,
    spread_labels,
    styled,
)
from klab.reports.frame import records

MOST = 30


def ranking(comparison: Comparison) -> Drawing | None:
    """The best cells, the baseline and the last one, best on top."""
    table = records(comparison.table)
    rows = [i for i, record in enumerate(table) if np.isfinite(record["mean"])]
    if not rows:
        return None
    chosen = rows if len(rows) <= MOST else rows[: MOST - 2]
    if len(rows) > MOST:
        base = [i for i in rows if table[i]["group"] == comparison.baseline]
        chosen = sorted({*chosen, *base, rows[-1]})
    place = {row: -rank for rank, row in enumerate(chosen)}
    column = {group: i for i, group in enumerate(comparison.groups)}
    lossy = any(not table[row]["stable"] for row in chosen)
    with styled():
        figure, (axes,) = canvas(WIDE, 0.55 + 0.19 * len(chosen))
        left_out = len(rows) - len(chosen)
        drawing = Drawing(
            "ranking",
            "Cells ranked",
            "Dots are means, bars 95% intervals that hold for all cells together, small marks single seeds. "
            + (f"Hollow: a seed diverged (counts as {comparison.worst:.3g}) or failed (missing). " if lossy else "")
            + "Coloured: differs from the baseline for the better; diamond: the baseline."
            + (f" {left_out} cells between are left out; the table has them." if left_out else ""),
            "Best first: " + ", ".join(table[row]["label"] for row in chosen[:5]) + ".",
            figure,
        )
        for row in chosen:
            record = table[row]
            base = record["group"] == comparison.baseline
            color = SERIES[1] if base else SERIES[0] if record["better"] else MUTED
            y = place[row]
            seeds = comparison.scores[column[record["group"]]]
            axes.plot(
                seeds,
                np.full(seeds.shape, y + 0.24),
                linestyle="none",
                marker="|",
                markersize=3.5,
                color=color,
                alpha=0.6,
            )
            axes.plot([record["low"], record["high"]], [y, y], color=color, linewidth=2.2, alpha=0.5)
            (point,) = axes.plot(
                record["mean"],
                y,
                linestyle="none",
                marker="D" if base else "o",
                markersize=5,
                color=color,
                markerfacecolor=color if record["stable"] else "none",
            )
            lost = record["diverged"] + record["failed"]
            words = f", {lost} of {record['seeds']} seeds lost" if lost else ""
            point.set_gid(
                drawing.tip(
                    f"{record['label']}: {record['mean']:.3f} [{record['low']:.3f}, {record['high']:.3f}], n = "
                    f"{record['n']}{words}"
                )
            )
        axes.set_yticks([place[row] for row in chosen], [shortened(_name(table[row]), 44) for row in chosen])
        for label, row in zip(axes.get_yticklabels(), chosen, strict=True):
            label.set_color(INK if table[row]["better"] or table[row]["group"] == comparison.baseline else MUTED)
        axes.set_xlabel(comparison.score.title)
        axes.grid(axis="y", visible=False)
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(-len(chosen) + 0.4, 0.6)
    return drawing


def _name(record: dict[str, Any]) -> str:
    lost = record["diverged"] + record["failed"]
    return f"{record['label']}  ({record['finished']}/{record['seeds']} finished)" if lost else str(record["label"])


def seed_lines(comparison: Comparison) -> Drawing | None:
    """The scores of the main cells by seed: parallel lines mean that a seed shifts all cells alike, which pairing
    removes.
    """
    if len(comparison.seeds) < 2 or not comparison.comparable:
        return None
    groups = list(comparison.table["group"])
    chosen = list(dict.fromkeys([*groups[:4], *([comparison.baseline] if comparison.baseline else []), *groups[-1:]]))
    labels = dict(zip(comparison.table["group"], comparison.table["label"], strict=True))
    seeds = comparison.seeds[:40]
    with styled():
        figure, (axes,) = canvas(WIDE, NARROW * 0.8)
        drawing = Drawing(
            "seeds",
            "Seed by seed",
            "Final score of the best cells, the baseline and the last one, by training seed. Hollow marks are "
            "diverged seeds, at the worst score of a finished one. "
            "Where lines run in parallel a seed shifts all cells alike, and the paired differences of the table are "
            "sharper than the intervals suggest.",
            "Scores by seed for " + ", ".join(labels[group] for group in chosen if group in labels) + ".",
            figure,
        )
        ends = []
        for k, group in enumerate(group for group in chosen if group in labels):
            row = comparison.groups.index(group)
            values = comparison.scores[row][: len(seeds)]
            style = look(k)
            axes.plot(
                range(len(seeds)), values, color=style["color"], linewidth=1.0, alpha=0.7, linestyle=style["linestyle"]
            )
            for s, value in enumerate(values):
                if np.isfinite(value):
                    done = comparison.states[row][s] == "finished"
                    (point,) = axes.plot(
                        s,
                        value,
                        marker=style["marker"],
                        color=style["color"],
                        markersize=4.5,
                        linestyle="none",
                        markerfacecolor=style["color"] if done else "none",
                    )
                    point.set_gid(
                        drawing.tip(f"{labels[group]}, seed {seeds[s]}: {value:.3f} ({comparison.states[row][s]})")
                    )
            present = np.flatnonzero(np.isfinite(values))
            if present.size:
                ends.append((labels[group], float(values[present[-1]]), style["color"]))
        axes.set_xticks(range(len(seeds)), [str(seed) for seed in seeds])
        axes.set_xlabel("training seed")
        axes.set_ylabel(comparison.score.title)
        low, high = axes.get_ylim()
        for (label, _, color), y in zip(
            ends, spread_labels([value for _, value, _ in ends], (high - low) * 0.07), strict=True
        ):
            axes.annotate(
                shortened(label, 26),
                (len(seeds) - 1, y),
                xytext=(8, 0),
                textcoords="offset points",
                va="center",
                fontsize=7,
                color=color,
                annotation_clip=False,
            )
        axes.set_ylim(low, high)
    return drawing
