"""How fast a run goes on, hence when it will be done."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence

from klab.harness.dispatch.status import FINAL_STATES, CellStatus

_WINDOW = 900.0
"""Seconds over which the pace is taken: a run that stood still for a day is not slow when it goes on."""
_LOOKS = 120


class Pace:
    """Updates per second over the last quarter of an hour, hence the time left."""

    def __init__(self) -> None:
        self._looks: deque[tuple[float, int]] = deque()

    def left(self, rows: Sequence[CellStatus], now: float | None = None) -> float | None:
        """Seconds until the open cells are done at this pace; None before any progress.

        Args:
            now: seconds of a clock that only goes forward; None: those of the system's.
        """
        now = time.monotonic() if now is None else now
        done = sum(row.update for row in rows)
        ahead = sum(max(0, row.updates - row.update) for row in rows if row.state not in FINAL_STATES)
        looks = self._looks
        if not looks or now - looks[-1][0] >= _WINDOW / _LOOKS or len(looks) == 1:
            looks.append((now, done))
        while len(looks) > 2 and looks[1][0] < now - _WINDOW:
            looks.popleft()
        began, before = looks[0]
        return ahead * (now - began) / (done - before) if done > before else None
