"""The score of one run from its own files: the plain form of what `klab.reports.scores` computes for all at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from klab.grid.score import RESULTS, chosen_metric, parse_score

if TYPE_CHECKING:
    from klab.harness.store.cell_folder import CellFolder

LAST = 0.1
"""Evaluations count from where this share of the planned updates is left."""

Row = Mapping[str, Any]


def cell_score(folder: CellFolder, name: str) -> float | None:
    """The score of a run that has ended; None where it has none.

    Args:
        name: as `klab.grid.score.parse_score` reads it.

    Raises:
        UserError: there is no such score, or a file of the cell is damaged.
    """
    score, result = parse_score(name), folder.result()
    if result is None:
        return None
    if score.kind in RESULTS:
        return _number(result.get(score.kind))
    if score.kind == "lm_eval":
        metrics = result.get("lm_eval") or {}
        metric = chosen_metric(score.part, metrics)
        return None if metric is None else _number(metrics[metric])
    rows = folder.evaluations()
    if score.kind == "reward_at_kl":
        return _at_kl(rows, score.argument or 0.0)
    planned = folder.cell().training.updates
    last = [row for row in rows if row["update"] >= (1 - LAST) * planned - 1e-9]
    if result["state"] == "stopped":  # its last evaluation is carried forward
        last = rows[-1:]
    if score.kind == "objective":
        cell = folder.cell()
        own = cell.objective.canonical(cell.training.on_policy).get("placement.beta") or 0.0
        beta = own if score.argument is None else score.argument
        reward, kl = (_mean(last, _field(key), weighted=True) for key in ("reward", "reverse_kl"))
        return None if reward is None or kl is None else reward - beta * kl
    if score.kind == "parts":
        return _mean(last, lambda row: (row.get("parts") or {}).get(score.part), weighted=True)
    return _mean(last, _field(score.kind), weighted=score.kind != "accuracy")


def _field(name: str) -> Callable[[Row], Any]:
    return lambda row: row.get(name)


def _mean(rows: Sequence[Row], value: Callable[[Row], Any], weighted: bool) -> float | None:
    """The mean over evaluations, weighted by their completions; None where one has no value."""
    values = [_number(value(row)) for row in rows]
    if not values or None in values:
        return None
    weights = [_number(row.get("completions")) or 1.0 if weighted else 1.0 for row in rows]
    return sum(w * v for w, v in zip(weights, values, strict=True) if v is not None) / sum(weights)


def _at_kl(rows: Sequence[Row], level: float) -> float | None:
    """The reward where KL first reaches `level`, linear between evaluations."""
    path = [(_number(row.get("reverse_kl")), _number(row.get("reward"))) for row in rows]
    for place, (kl, reward) in enumerate(path):
        if kl is None or kl < level:
            continue
        before = path[place - 1] if place else (None, None)
        if kl == level or before[0] is None or before[1] is None or reward is None:
            return reward
        share = (level - before[0]) / (kl - before[0])
        return before[1] + share * (reward - before[1])
    return None


def _number(value: object) -> float | None:
    if isinstance(value, bool):
        return float(value)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
