"""The rule that ends hopeless cells (`training.stop`), as a pure function of the cell's own evaluations."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from klab.grid.schema.training import STOP_FIGURES, StopRule


def why_hopeless(rule: StopRule, evaluations: Sequence[Mapping[str, Any]]) -> str | None:
    """Why a cell is to stop after the last of these evaluations, in words; None: it goes on.

    Args:
        evaluations: rows of evaluations.jsonl in order, the one before the first update included or not.
    """
    rows = [row for row in evaluations if row["update"] > 0]
    if not rows or rows[-1]["update"] < rule.after or len(rows) < rule.over:
        return None
    over = f" (mean of {rule.over} evaluations)" if rule.over > 1 else ""
    for name, bound in rule.unless.bounds.items():
        known = [value for row in rows[-rule.over :] if (value := row.get(name)) is not None]
        if len(known) < rule.over:
            continue
        mean = math.fsum(known) / rule.over
        words, side = STOP_FIGURES[name]
        if mean > bound if side == "at most" else mean < bound:
            beyond = "above" if side == "at most" else "below"
            return f"{words} {mean:.4g}{over} at update {rows[-1]['update']} is {beyond} {bound:g} (training.stop)"
    return None
