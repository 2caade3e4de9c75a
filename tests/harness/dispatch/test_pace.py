"""The time left is that of the last quarter of an hour, not of the whole time that somebody has looked."""

from __future__ import annotations

import pytest

from klab.harness.dispatch.pace import Pace
from klab.harness.dispatch.status import CellStatus


def cells(done: int) -> list[CellStatus]:
    return [CellStatus("a", "running", update=done, updates=1000), CellStatus("b", "failed", update=5, updates=1000)]


def test_there_is_no_time_left_before_any_progress() -> None:
    pace = Pace()
    assert pace.left(cells(10), now=0.0) is None
    assert pace.left(cells(10), now=5.0) is None


def test_the_open_cells_count_at_the_pace_since_the_first_look() -> None:
    pace = Pace()
    pace.left(cells(10), now=0.0)
    assert pace.left(cells(20), now=10.0) == pytest.approx(980.0)
    assert pace.left(cells(110), now=100.0) == pytest.approx(890.0)


def test_a_day_without_progress_does_not_make_a_run_slow() -> None:
    pace = Pace()
    for second in range(0, 86_400, 60):
        pace.left(cells(100), now=float(second))
    found = None
    for second in range(0, 1200, 2):
        found = pace.left(cells(100 + second // 2), now=86_400.0 + second)
    assert found == pytest.approx((1000 - 699) * 2, rel=0.05)


def test_looking_often_keeps_few_looks() -> None:
    pace = Pace()
    for step in range(100_000):
        pace.left(cells(step // 100), now=step / 10)
    assert len(pace._looks) < 130
