"""Verdicts on claims in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from klab.reports.inference import UNDECIDED
from klab.reports.inference.power import MOST_SEEDS
from klab.reports.words import MARK, number

HOLDS, CONTRADICTED, DEPENDS = "holds", "contradicted", "depends on the task"
"""Verdicts on claims, beside `UNDECIDED`."""


class TaskVerdict(Protocol):
    """What a verdict over all tasks is made of."""

    @property
    def task(self) -> str: ...
    @property
    def low(self) -> float: ...
    @property
    def verdict(self) -> str: ...
    @property
    def more_seeds(self) -> int | None: ...
    @property
    def depends(self) -> bool: ...


def finding(verdict: str, estimate: float, low: float, within: float | None, seeds: int | None) -> str:
    """What was found on one task, in a clause.

    Args:
        within: the margin, where the verdict is that the interval lies within it.
        seeds: how many more per cell would decide; None: too many.
    """
    if not np.isfinite(low):
        return "no interval: it takes two seeds of both sides"
    if verdict == UNDECIDED:
        return _open_words(seeds)
    if within is not None:
        return f"no difference as large as {within:g}"
    return f"{'higher' if estimate > 0 else 'lower'} by {number(abs(estimate))}"


def overall(rows: Sequence[TaskVerdict]) -> tuple[str, str]:
    """The verdict over all tasks, and its words; marked where one of a task depends on stopped runs."""
    verdict, words = _overall(rows)
    return verdict, f"{words} {MARK}" if any(row.depends for row in rows) else words


def _overall(rows: Sequence[TaskVerdict]) -> tuple[str, str]:
    tasks = {verdict: [row.task for row in rows if row.verdict == verdict] for verdict in (HOLDS, CONTRADICTED)}
    if len(tasks[HOLDS]) == len(rows):
        return HOLDS, "holds here"
    if tasks[HOLDS] and tasks[CONTRADICTED]:
        found = "; ".join(f"{verdict} on {', '.join(names)}" for verdict, names in tasks.items())
        return DEPENDS, f"{DEPENDS} ({found})"
    open_ = [row for row in rows if row.verdict == UNDECIDED]
    if tasks[CONTRADICTED]:
        where = f" (undecided on {', '.join(row.task for row in open_)})" if open_ else ""
        return CONTRADICTED, f"contradicted here{where}"
    if all(not np.isfinite(row.low) for row in open_):
        return UNDECIDED, "undecided (no interval yet)"
    needed = [row.more_seeds for row in open_]
    most = None if None in needed else max(seeds for seeds in needed if seeds is not None)
    holds = f"holds on {', '.join(tasks[HOLDS])}; " if tasks[HOLDS] else ""
    return UNDECIDED, f"undecided ({holds}{_open_words(most)})"


def _open_words(seeds: int | None) -> str:
    """How many more seeds would decide."""
    if seeds is None:
        return f"more than {MOST_SEEDS} more seeds per cell"
    return f"{seeds} more seed{'s' * (seeds > 1)} per cell"
