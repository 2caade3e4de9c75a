"""However many points come, a curve stays small, and says what the points say."""

from __future__ import annotations

import math
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from klab.harness.serve.series import BUCKETS, Series, columns, mean_of, spark

Points = list[tuple[int, float]]


def series(points: Points) -> Series:
    found = Series()
    for x, y in points:
        found.add(x, y)
    return found


@given(st.lists(st.tuples(st.integers(0, 5000), st.floats(-1e6, 1e6)), min_size=1, max_size=400))
def test_stretches_are_means_and_ranges_of_their_points(points: Points) -> None:
    found = series(points)
    stretches = dict(found.points())
    assert len(stretches) <= BUCKETS
    assert found.last == points[-1][1]
    for place, point in stretches.items():
        inside = [(x, y) for x, y in points if x // found.width == place]
        assert point.x == pytest.approx(fmean(x for x, _ in inside))
        assert point.y == pytest.approx(fmean(y for _, y in inside), rel=1e-9, abs=1e-6)
        assert (point.low, point.high) == (min(y for _, y in inside), max(y for _, y in inside))
    assert {x // found.width for x, _ in points} == set(stretches)


def test_few_points_stay_as_they_are() -> None:
    points = [(x, x**0.5) for x in range(BUCKETS)]
    assert [(point.x, point.y) for _, point in series(points).points()] == points


@pytest.mark.parametrize("value", [math.nan, math.inf, None, "0.5", True, 10**400, [1.0]])
def test_what_is_no_number_is_no_point(value: object) -> None:
    found = series([(1, 0.5)])
    found.add(2, value)
    found.add(-1, 0.5)
    found.add(10**30, 0.5)
    assert [point.x for _, point in found.points()] == [1]


def test_a_mean_stops_where_the_shortest_run_is_and_has_the_range_of_the_runs() -> None:
    long, short = series([(x, 1.0) for x in range(10)]), series([(x, 3.0) for x in range(4)])
    found = mean_of([long, short, Series()])
    assert [(point.x, point.y, point.low, point.high) for point in found] == [(x, 2.0, 1.0, 3.0) for x in range(4)]


def test_runs_of_different_lengths_are_averaged_over_the_same_stretches() -> None:
    long, short = series([(x, float(x)) for x in range(1000)]), series([(x, float(x)) for x in range(100)])
    assert long.width > short.width
    for point in mean_of([long, short]):
        assert point.y == pytest.approx(point.x)
        assert point.x < 100


def test_columns_are_short_and_have_a_band_only_where_there_is_one() -> None:
    assert columns(point for _, point in series([(1, 1 / 3), (2, 0.5)]).points()) == {"x": [1, 2], "y": [0.33333, 0.5]}
    assert set(columns(mean_of([series([(1, 1.0)]), series([(1, 2.0)])]))) == {"x", "y", "low", "high"}


def test_a_small_curve_has_at_most_so_many_values() -> None:
    found = spark(series([(x, float(x)) for x in range(1000)]), 32)
    assert 16 <= len(found) <= 32
    assert found == sorted(found, key=lambda value: value or 0.0)
    assert spark(Series()) == []
