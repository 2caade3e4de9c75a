"""Statistics: golden numbers, agreement with scipy, and that nothing is called different more often than promised."""

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
    assert s.probability_of_improvement(X, Y) == pytest.approx(0.6458333, abs=1e-7)


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


@settings(max_examples=20, deadline=None)
@given(arrays(np.float64, st.integers(2, 7), elements=scores))
def test_sign_flips_agree_with_scipy(d: np.ndarray) -> None:
    reference = stats.permutation_test((d,), np.mean, permutation_type="samples", n_resamples=np.inf)
    assert s.sign_flip_p(d) == pytest.approx(reference.pvalue, abs=1e-9)


def test_p_cannot_be_smaller_than_the_number_of_seeds_allows() -> None:
    for n in (2, 3, 5, 10):
        assert s.sign_flip_p(np.ones(n)) == pytest.approx(2.0 ** (1 - n))


def test_sampled_sign_flips_agree_with_the_exact_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    d = np.random.default_rng(0).normal(0.5, 1.0, 12)
    exact = s.sign_flip_p(d)
    monkeypatch.setattr(s, "EXACT_FLIPS", 2)
    assert s.sign_flip_p(d) == pytest.approx(exact, abs=0.01)


def test_paired_p_is_that_of_scipy() -> None:
    generator = np.random.default_rng(1)
    x, y = generator.normal(size=6), generator.normal(size=6)
    assert s.paired_p(x, y) == pytest.approx(stats.ttest_rel(x, y).pvalue)
    assert s.paired_p(x, x) == 1.0
    assert s.paired_contrast(x, y).estimate == pytest.approx((x - y).mean())


def test_a_seed_that_one_side_lacks_is_not_a_pair() -> None:
    found = s.paired_contrast(np.array([1.0, np.nan, 3.0]), np.array([0.0, 5.0, 1.0]))
    assert (found.estimate, found.n) == (1.5, 2)


def test_holm_against_its_definition() -> None:
    p = np.array([0.01, 0.04, np.nan, 0.03, 0.005])
    assert s.holm(p) == pytest.approx([0.03, 0.06, np.nan, 0.06, 0.02], nan_ok=True)
    assert s.holm([0.9, 0.8]) == pytest.approx([1.0, 1.0])


@settings(max_examples=30, deadline=None)
@given(arrays(np.float64, (4, 3), elements=scores), arrays(np.float64, (5, 3), elements=scores))
def test_probability_of_improvement_is_mann_whitney(x: np.ndarray, y: np.ndarray) -> None:
    reference = np.mean([stats.mannwhitneyu(x[:, t], y[:, t]).statistic / (4 * 5) for t in range(3)])
    assert s.probability_of_improvement(x, y) == pytest.approx(reference)


def test_bootstrap_covers_and_needs_five_runs_on_three_tasks() -> None:
    generator = np.random.default_rng(2)
    covered = 0
    for trial in range(60):
        found = s.bootstrap_interval(
            generator.normal(size=(20, 4)), lambda x: float(x.mean()), replicates=200, seed=trial
        )
        covered += found.low <= 0.0 <= found.high
    assert 51 <= covered <= 60
    assert np.isnan(s.bootstrap_interval(X, s.interquartile_mean).low)


def test_the_bootstrap_resamples_within_each_task_and_each_task_by_itself() -> None:
    levels = np.tile([1.0, 2.0, 3.0], (5, 1))
    found = s.bootstrap_interval(levels, lambda x: float(x.mean()), replicates=200)
    assert (found.low, found.high) == (2.0, 2.0)  # one pool of all tasks would mix their levels
    opposed = np.array([1.0, -1.0, 0.0]) * np.arange(5.0)[:, None]
    found = s.bootstrap_interval(opposed, lambda x: float(x.mean()), replicates=200)
    assert found.low < -0.1 < 0.1 < found.high  # the same runs of every task would cancel


def test_performance_profile_is_the_share_of_runs_above() -> None:
    assert s.performance_profile(X, np.array([0.0, 0.4, 2.0])) == pytest.approx([1.0, 4 / 8, 0.0])


def test_block_error_is_the_residual_of_cells_and_seeds() -> None:
    generator = np.random.default_rng(3)
    scores_cs = generator.normal(size=(6, 5)) + generator.normal(size=5) * 3
    scores_cs[[0, 2, 2], [1, 0, 4]] = np.nan
    cell, seed = np.nonzero(np.isfinite(scores_cs))
    design = np.hstack([cell[:, None] == np.arange(6), (seed[:, None] == np.arange(5))[:, 1:]]).astype(float)
    y = scores_cs[cell, seed]
    residual = y - design @ np.linalg.lstsq(design, y, rcond=None)[0]
    variance, freedom = s.block_error(scores_cs)
    assert freedom == y.size - np.linalg.matrix_rank(design)
    assert variance == pytest.approx(residual @ residual / freedom)


def test_critical_difference_is_tukeys_on_complete_blocks() -> None:
    scores_cs = np.random.default_rng(4).normal(size=(4, 6))
    variance, freedom = s.block_error(scores_cs)
    expected = stats.studentized_range.ppf(0.95, 4, freedom) * np.sqrt(variance / 6)
    assert s.critical_difference(scores_cs) == pytest.approx(expected)
    assert np.isnan(s.critical_difference(scores_cs[:, :1]))


def test_blocks_that_share_no_seed_have_fewer_degrees_of_freedom() -> None:
    apart = np.array([[1.0, 2.0, np.nan, np.nan], [3.0, 5.0, np.nan, np.nan], [np.nan, np.nan, 1.0, 4.0]])
    apart = np.vstack([apart, [np.nan, np.nan, 2.0, 2.0]])
    variance, freedom = s.block_error(apart)
    assert freedom == 2  # 8 scores, 4 cells, 2 seeds in each of two components: 8 - 4 - (4 - 2)
    assert variance == pytest.approx(((1.0 - 2.0) ** 2 + (3.0 - 0.0) ** 2) / 4 / 2)


def test_unequal_counts_enter_tukeys_test_by_their_harmonic_mean() -> None:
    scores_cs = np.random.default_rng(6).normal(size=(3, 8))
    scores_cs[0, 2:] = np.nan
    variance, freedom = s.block_error(scores_cs)
    per_mean = variance * (1 / 2 + 1 / 8 + 1 / 8) / 3
    expected = stats.studentized_range.ppf(0.95, 3, freedom) * np.sqrt(per_mean)
    assert s.critical_difference(scores_cs) == pytest.approx(expected)


def test_a_sampled_p_counts_the_data_themselves() -> None:
    """(hits + 1)/(draws + 1), Phipson and Smyth (2010): a Monte Carlo p is never 0."""
    assert s.sign_flip_p(np.ones(40), draws=500) == pytest.approx(1 / 501)


def test_critical_groups_are_maximal_runs_of_close_means() -> None:
    assert s.critical_groups(np.array([0.9, 0.85, 0.7, 0.2]), 0.16) == [(0, 1), (1, 2), (3, 3)]
    assert s.critical_groups(np.array([0.9, 0.2]), np.nan) == [(0, 1)]


@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_equal_algorithms_are_not_called_different_more_often_than_promised(seeds: int) -> None:
    """A/A comparison with noisy seeds that shift both sides alike: 5% tests reject 5% (sign flips: at most), families
    at most 5%.
    """
    generator = np.random.default_rng(seeds)
    trials = 1000
    shift = generator.normal(size=(trials, 1, seeds)) * 2
    data = shift + generator.standard_t(8, size=(trials, 6, seeds))
    t_hits = np.mean([s.paired_p(trial[0], trial[1]) < 0.05 for trial in data])
    flip_hits = np.mean([s.sign_flip_p(trial[0] - trial[1]) <= 0.05 for trial in data])
    misses = np.mean([not (c := s.paired_contrast(trial[0], trial[1])).low <= 0 <= c.high for trial in data])
    family = np.mean([np.ptp(trial.mean(1)) > s.critical_difference(trial) for trial in data[:250]])
    assert 0.03 <= t_hits <= 0.07
    assert 0.03 <= misses <= 0.07
    assert flip_hits <= 0.07
    assert family <= 0.09
