"""`result.json`: a cell's summary, a pure function of its rows of metrics and evaluations."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

DIVERGED_AFTER = 10
"""Non-finite updates in a row after which a cell is stopped as diverged."""

SPIKE = 5.0
"""A gradient norm above this multiple of the median of the preceding ones is a spike."""

_SPIKE_WINDOW = 20
_SPIKE_LEAST = 5


def summarize(
    planned: int,
    rows: Sequence[Mapping[str, Any]],
    evaluations: Sequence[Mapping[str, Any]],
    diverged: bool = False,
    hopeless: str | None = None,
) -> dict[str, Any]:
    """The measured part of a cell's result.

    Args:
        planned: the updates that the cell was to make; its tenth is the window of all smoothed rewards.
        rows, evaluations: in order of updates.
        diverged: training was ended as diverged. A cell without a finite update has diverged, too.
        hopeless: why `training.stop` ended it; None: it did not.

    `zero_gradient` marks a cell whose policy gradient was 0 in every update: it has learnt nothing.
    """
    diverged = diverged or (bool(rows) and all(row["nonfinite"] for row in rows))
    window = max(1, math.ceil(planned / 10))
    smooth = trailing_mean([row["reward_mean"] for row in rows], window)
    known = [value for value in smooth if value is not None]
    final, best = (known[-1], max(known)) if known else (None, None)
    fell = collapse(smooth, [row["reward_std"] for row in rows])
    accuracies = _known(evaluations, "accuracy")
    divergences = _known(evaluations, "reverse_kl")
    return {
        "state": "diverged" if diverged else "finished" if hopeless is None else "stopped",
        "reason": divergence_reason(rows) if diverged else hopeless,
        "updates": rows[-1]["update"] if rows else 0,
        "reward_final": final,
        "reward_best": best,
        "gap": None if final is None or best is None else best - final,
        "accuracy_final": accuracies[-1] if accuracies else None,
        "accuracy_best": max(accuracies, default=None),
        "reverse_kl_final": evaluations[-1]["reverse_kl"] if evaluations else None,
        "reverse_kl_max": max(divergences, default=None),
        "collapsed": fell is not None,
        "collapse_update": None if fell is None else rows[fell]["update"],
        "nonfinite_updates": sum(bool(row["nonfinite"]) for row in rows),
        "zero_gradient": bool(rows) and all(row["gradient_norm"] == 0 for row in rows),
        "gradient_spikes": gradient_spikes([row["gradient_norm"] for row in rows]),
        "ess_min": min(_known(rows, "ess"), default=None),
        "seconds": _seconds(rows) + _seconds(evaluations),
        "tokens": sum(row["tokens"] for row in rows) + _unused(rows),
        "parts": evaluations[-1]["parts"] if evaluations else {},
        **_timeouts([*rows, *evaluations]),
    }


def divergence_reason(rows: Sequence[Mapping[str, Any]]) -> str:
    """Why a cell diverged, in words, from its last rows."""
    streak = 0
    while streak < len(rows) and rows[-1 - streak]["nonfinite"]:
        streak += 1
    if not streak:
        return "weights are not finite"
    last = rows[-1]
    culprits = {"reward_mean": "rewards", "loss": "the loss", "gradient_norm": "the gradient"}
    found = next((words for name, words in culprits.items() if last.get(name, 0.0) is None), "the update")
    verb = "are" if found == "rewards" else "is"
    return f"{found} {verb} not finite (NaN or infinite), {streak} update{'s' * (streak > 1)} in a row"


def _timeouts(rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """How many rewards a limit of time decided, where that was counted."""
    counted = [row["reward_timeouts"] for row in rows if "reward_timeouts" in row]
    return {"reward_timeouts": sum(counted)} if counted else {}


def _unused(rows: Sequence[Mapping[str, Any]]) -> int:
    """Tokens that dynamic sampling sampled and did not use."""
    return sum({row["rollout"]: row["unused_tokens"] for row in rows if "unused_tokens" in row}.values())


def trailing_mean(values: Sequence[float | None], window: int) -> list[float | None]:
    """The mean of the last `window` known values up to each position (fewer at the start), None if none is."""
    means: list[float | None] = []
    for end in range(1, len(values) + 1):
        known = [value for value in values[max(0, end - window) : end] if value is not None]
        means.append(math.fsum(known) / len(known) if known else None)
    return means


def collapse(smooth: Sequence[float | None], deviations: Sequence[float | None]) -> int | None:
    """Where the smoothed reward fell for good from its best, or None.

    A cell has collapsed if its smoothed reward ends below half of the height of its best, and by more than half of
    the median spread of rewards within an update. Height is measured from 0, or from the lowest smoothed reward if
    that is below 0. The collapse is the first position after the best from which on it stays there.
    """
    known = [value for value in smooth if value is not None]
    spread = sorted(value for value in deviations if value is not None)
    if not known or not spread:
        return None
    best, floor = max(known), min(0.0, *known)
    limit = min(floor + (best - floor) / 2, best - spread[len(spread) // 2] / 2)
    fallen: int | None = None
    for position in range(len(smooth) - 1, -1, -1):
        value = smooth[position]
        if value is None:
            continue
        if value >= limit:
            break
        fallen = position
    return fallen


def gradient_spikes(norms: Sequence[float | None]) -> int:
    """How many finite gradient norms exceed `SPIKE` times the median of the up to 20 finite ones before them."""
    before: list[float] = []
    spikes = 0
    for value in norms:
        if value is None:
            continue
        recent = sorted(before[-_SPIKE_WINDOW:])
        if len(recent) >= _SPIKE_LEAST and value > SPIKE * recent[len(recent) // 2]:
            spikes += 1
        before.append(value)
    return spikes


def _seconds(rows: Sequence[Mapping[str, Any]]) -> float:
    return math.fsum(value for row in rows for key, value in row.items() if key.startswith("seconds"))


def _known(rows: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    return [row[key] for row in rows if row[key] is not None]
