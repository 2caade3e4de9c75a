"""Statistics that describe runs: golden numbers, and agreement with scipy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from klab.reports import statistics as s

X = np.array([[0.1, 0.4], [0.2, 0.5], [0.35, 0.9], [0.6, 1.2]])
Y = np.array([[0.05, 0.5], [0.25, 0.45], [0.3, 0.8]])
scores = st.floats(-100, 100, allow_nan=False).map(lambda value: round(value, 3))


def test_golden_numbers_of_agarwal_et_al() -> None:
    assert s.interquartile_mean(X) == pytest.approx(0.4625)
    assert s.interquartile_mean(Y) == pytest.approx(0.375)
    assert (X.mean(), Y.mean()) == pytest.approx((0.53125, 0.391667), abs=1e-6)
    assert s.optimality_gap(X) == pytest.approx(0.49375)
    assert s.optimality_gap(Y) == pytest.approx(0.608333, abs=1e-6)


@settings(max_examples=30, deadline=None)
@given(arrays(np.float64, st.integers(2, 12), elements=scores))
def test_t_interval_is_that_of_scipy(x: np.ndarray) -> None:
    found = s.t_interval(x)
    if x.std(ddof=1) > 0:
        low, high = stats.t.interval(0.95, x.size - 1, loc=x.mean(), scale=stats.sem(x))
        assert (found.low, found.high) == pytest.approx((low, high), rel=1e-9, abs=1e-9)
    assert found.n == x.size


def test_one_seed_has_a_mean_and_no_interval() -> None:
    found = s.t_interval([0.7, np.nan])
    assert (found.estimate, found.n) == (0.7, 1)
    assert np.isnan([found.low, found.high]).all()
    assert s.t_interval([]).n == 0
