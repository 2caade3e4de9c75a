"""Over-optimisation in numbers: how much gold each configuration gets for its distance, where, and what it keeps.

Gold, the reward that is the truth, is followed along √KL to the reference while training maximises the reward that
stands for it (Gao, Schulman and Hilton 2023, "Scaling Laws for Reward Model Overoptimization").
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from klab.reports.comparison import Comparison
from klab.reports.figures.gold_paths import Path, paths
from klab.reports.frame import records
from klab.reports.study import Study
from klab.reports.words import mean_span, number, signed

COLUMNS = {
    "group": "the configuration's id",
    "label": "its name in the report",
    "runs": "runs in the means",
    "gold_start": "gold at the first evaluation",
    "gold_most": "the most gold of the mean curve over runs",
    "gold_most_low": "95% t-interval over seeds at that evaluation, not adjusted for the choice of it",
    "gold_most_high": "its other end",
    "update_most": "update of that evaluation",
    "root_kl_most": "√KL there",
    "gold_per_nat": "gold won until there, per nat of (√KL)²",
    "gold_matched": "gold where √KL first reaches `root_kl_matched`, between evaluations by a straight line",
    "root_kl_matched": "the greatest √KL that every configuration reaches",
    "root_kl_final": "√KL at the last evaluation: where training stopped",
    "gold_final": "gold there",
    "gold_final_low": "95% t-interval over seeds",
    "gold_final_high": "its other end",
    "gold_lost": "the most gold less the last",
    "proxy_final": "the reward that was trained on, at the last evaluation",
    "gap_final": "proxy less gold there, both standardised over the starting policy's completions; where it is known",
}
"""Columns of the table, and what they mean."""


def matched_distance(found: Sequence[Path]) -> float:
    """The greatest √KL that every path reaches."""
    return min(float(path.distance.mean.max()) for path in found)


def table(study: Study, comparison: Comparison) -> pd.DataFrame:
    """One row per configuration, most gold first, with `COLUMNS`; empty where no gold was recorded."""
    found = paths(study, comparison)
    rows = [_row(path, matched_distance(found)) for path in found]
    frame = pd.DataFrame(rows, columns=list(COLUMNS))
    return frame.sort_values("gold_most", ascending=False, kind="stable", ignore_index=True)


def _row(path: Path, matched: float) -> dict[str, Any]:
    best, gold, distance = path.best, path.gold, path.distance
    nats = float(distance.mean[best]) ** 2
    won = float(gold.mean[best] - gold.mean[0])
    return {
        "group": path.group,
        "label": path.label,
        "runs": gold.runs,
        "gold_start": gold.mean[0],
        "gold_most": gold.mean[best],
        "gold_most_low": gold.low[best],
        "gold_most_high": gold.high[best],
        "update_most": gold.updates[best],
        "root_kl_most": distance.mean[best],
        "gold_per_nat": won / nats if nats > 0 else np.nan,
        "gold_matched": path.gold_at(matched),
        "root_kl_matched": matched,
        "root_kl_final": distance.mean[-1],
        "gold_final": gold.mean[-1],
        "gold_final_low": gold.low[-1],
        "gold_final_high": gold.high[-1],
        "gold_lost": gold.mean[best] - gold.mean[-1],
        "proxy_final": path.proxy.mean[-1],
        "gap_final": np.nan if path.gap is None else path.gap.mean[-1],
    }


def sentence(frame: pd.DataFrame, baseline: str | None) -> str:
    """What a table says: who gets the most gold, who at a common distance, and who loses most; empty without rows."""
    if frame.empty:
        return ""
    rows = records(frame)
    most = rows[0]
    text = f"Most gold: {_name(most)}, {number(most['gold_most'])} at √KL {number(most['root_kl_most'], 2)}"
    base = next((row for row in rows if row["group"] == baseline), None)
    if base is not None and base is not most:
        text += f" (the baseline: {number(base['gold_most'])} at {number(base['root_kl_most'], 2)})"
    if len(rows) > 1:
        first = max(rows, key=lambda row: row["gold_matched"])
        text += (
            f". Most at √KL {number(first['root_kl_matched'], 2)}, which is as far as all get: {_name(first)}, "
            f"{number(first['gold_matched'])}"
        )
    worst = max(rows, key=lambda row: row["gold_lost"])
    if worst["gold_lost"] > 0:
        text += (
            f". Most lost again: {_name(worst)}, {signed(-worst['gold_lost'])} by the end, at √KL "
            f"{number(worst['root_kl_final'], 2)}"
        )
    return text + "."


def _name(row: dict[str, Any]) -> str:
    label = str(row["label"])
    return "the baseline" if label == "baseline" else f"“{label}”"


CAPTION = (
    "Means over runs of held-out evaluations; square brackets are 95% t-intervals over seeds, not adjusted for the "
    "choice of the evaluation. Gold per nat: what was won until the most gold, divided by the KL there. Gold at a "
    "distance: where the path first gets as far as all do. Lost: from the most gold to the last. Proxy and gap (proxy "
    "less gold, both standardised over the starting policy's completions) at the last evaluation."
)
HEADS = ("cell", "most gold", "at √KL", "gold per nat", "gold at √KL {}", "last gold", "at √KL", "lost", "proxy", "gap")


def heads(frame: pd.DataFrame) -> list[str]:
    """Headings of the printed table."""
    matched = number(float(frame["root_kl_matched"].iloc[0]), 2) if len(frame) else "–"
    return [head.format(matched) for head in HEADS]


def texts(row: dict[str, Any]) -> list[str]:
    """A row of the printed table."""
    return [
        str(row["label"]),
        mean_span(row["gold_most"], row["gold_most_low"], row["gold_most_high"]),
        number(row["root_kl_most"], 2),
        number(row["gold_per_nat"]),
        number(row["gold_matched"]),
        mean_span(row["gold_final"], row["gold_final_low"], row["gold_final_high"]),
        number(row["root_kl_final"], 2),
        signed(-row["gold_lost"]),
        number(row["proxy_final"], 2),
        number(row["gap_final"], 2),
    ]
