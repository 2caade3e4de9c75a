"""Wall time by phase of an update."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

PHASES = ("rollout", "reward", "reference", "forward", "backward", "step")


class PhaseTimer:
    """Adds up the seconds spent in each phase until `take` empties it.

    >>> timer = PhaseTimer()
    >>> with timer("reward"):
    ...     total = sum(range(10))
    >>> sorted(timer.take(cells=1))
    ['seconds_backward', 'seconds_forward', 'seconds_reference', 'seconds_reward', 'seconds_rollout', 'seconds_step']
    """

    def __init__(self) -> None:
        self._spent = dict.fromkeys(PHASES, 0.0)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self._spent[phase] += time.perf_counter() - started

    def take(self, cells: int) -> dict[str, float]:
        """Seconds per phase since the last call, shared equally by the `cells` of the pack."""
        taken = {f"seconds_{phase}": spent / cells for phase, spent in self._spent.items()}
        self._spent = dict.fromkeys(PHASES, 0.0)
        return taken
