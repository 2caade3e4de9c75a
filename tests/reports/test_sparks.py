"""Sparklines."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from klab.reports.sparkline import BLOCKS, sparkline


def test_rises_with_the_values_and_leaves_gaps() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == BLOCKS
    assert sparkline([0.0, None, float("nan"), 1.0]) == "▁  █"
    assert sparkline([5, 5, 5]) == "▄▄▄"
    assert sparkline([]) == ""
    assert sparkline([0.5], low=0.0, high=1.0) == "▅"


@example([1.1529270924073739e297, -1.7976931348507865e308], 2)
@given(st.lists(st.floats(allow_nan=True, allow_infinity=True) | st.none(), max_size=200), st.integers(1, 40))
def test_any_values_give_at_most_the_width(values: list[float | None], width: int) -> None:
    line = sparkline(values, width)
    assert len(line) == min(len(values), width)
    assert set(line) <= set(BLOCKS + " ")
