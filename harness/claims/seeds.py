"""Claims C60-C65: what a handful of training seeds can and cannot show."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from klab.harness.claims.claim import Evidence, claim

Array = NDArray[np.float64]
LEVEL = 0.05


def welch_p(x_rs: Array, y_rs: Array) -> Array:
    """Two-sided p of Welch's test of every row of two `[experiments, seeds]` arrays."""
    return np.asarray(stats.ttest_ind(x_rs, y_rs, axis=1, equal_var=False).pvalue)


def paired_p(x_rs: Array, y_rs: Array) -> Array:
    """Two-sided p of the paired t-test of every row."""
    return np.asarray(stats.ttest_rel(x_rs, y_rs, axis=1).pvalue)


def sign_flip_p(x_rs: Array, y_rs: Array) -> Array:
    """Two-sided p of the exact sign-flip test of every row."""
    difference = x_rs - y_rs
    n = difference.shape[1]
    signs = 1 - 2 * (np.arange(2**n)[:, None] >> np.arange(n) & 1)
    sums = np.abs(difference @ signs.T)
    return np.asarray((sums >= np.abs(difference.sum(1, keepdims=True)) - 1e-12).mean(1))


def holm_rejects(p_rc: Array) -> Array:
    """Whether Holm's procedure rejects anything among the cells of every row."""
    return np.asarray(p_rc.min(1) * p_rc.shape[1] <= LEVEL)


def outcomes(rng: np.random.Generator, shape: tuple[int, ...], kind: str) -> Array:
    """Scores of runs of one algorithm: normal, or one run in ten collapses to 0."""
    scores = rng.normal(0.7, 0.05, shape)
    return np.where(rng.random(shape) < 0.1, 0.0, scores) if kind == "collapsing" else scores


def upper(rate: float, count: int) -> float:
    """What a rate may reach by the chance of `count` simulated experiments (4 standard errors)."""
    return rate + 4 * math.sqrt(rate * (1 - rate) / count)


@claim(
    "C60",
    "T",
    "Henderson et al. 2018",
    "One algorithm, ten seeds split five and five, can look significantly different.",
)
def same_algorithm_looks_different(evidence: Evidence) -> None:
    rng = np.random.default_rng(0)
    scores = outcomes(rng, (2000, 10), "normal")
    splits = [mask for mask in range(1024) if mask.bit_count() == 5 and mask & 1]
    chosen = np.asarray([[bool(mask >> seed & 1) for seed in range(10)] for mask in splits])
    some = np.stack([welch_p(scores[:300, half], scores[:300, ~half]) for half in chosen], axis=1)
    any_split = evidence.headline(
        "share of experiments with some split of ten seeds at p < .05", (some < LEVEL).any(1).mean()
    )
    one = evidence.number(
        "share with a fixed split at p < .05 (Welch)", (welch_p(scores[:, :5], scores[:, 5:]) < LEVEL).mean()
    )
    left, right = scores[:, :5], scores[:, 5:]
    apart = np.abs(left.mean(1) - right.mean(1)) > (left.std(1, ddof=1) + right.std(1, ddof=1)) / math.sqrt(5)
    bars = evidence.number("share whose +-1 standard error bars do not overlap", apart.mean())
    evidence.stated("some split is significant in most experiments", any_split > 0.5)
    evidence.stated("bars of one standard error separate more often than a test at 5% allows", bars > 2 * LEVEL)
    evidence.stated("a test on a split fixed in advance keeps its level", one <= upper(LEVEL, 2000))


def seeds_needed(effect: float, power: float = 0.8) -> int:
    """Smallest N per arm with N >= 2 (t_{a/2} + t_b)^2 / effect^2, t with 2N - 2 degrees of freedom; effect in standard
    deviations."""
    for count in range(2, 10_000):
        freedom = 2 * count - 2
        total = stats.t.ppf(1 - LEVEL / 2, freedom) + stats.t.ppf(power, freedom)
        if count >= 2 * (total / effect) ** 2:
            return count
    raise ValueError(f"an effect of {effect} standard deviations needs more than 10,000 seeds")


@claim(
    "C61",
    "T",
    "Colas et al. 2018",
    "N ~ 2 sigma^2 (t_{a/2} + t_b)^2 / eps^2 seeds per arm give Welch's test its power.",
)
def seeds_for_power(evidence: Evidence) -> None:
    rng = np.random.default_rng(1)
    powers = []
    for effect in (0.5, 1.0, 2.0):
        count = seeds_needed(effect)
        evidence.number(f"effect {effect:g} sigma: seeds per arm for power .8", count)
        draws = rng.standard_normal((2, 4000, count))
        powers.append(
            evidence.headline(
                f"effect {effect:g} sigma: simulated power", (welch_p(draws[0] + effect, draws[1]) < LEVEL).mean()
            )
        )
    few = rng.standard_normal((2, 4000, 3))
    evidence.number(
        "effect 1 sigma with 3 seeds per arm: simulated power", (welch_p(few[0] + 1, few[1]) < LEVEL).mean()
    )
    evidence.stated("simulated power within .05 of .8, or above", all(power > 0.75 for power in powers))


def bootstrap_coverage(runs: int, tasks: int, experiments: int = 400, replicates: int = 400) -> float:
    """Share of experiments whose stratified percentile bootstrap 95% interval of the mean contains the true mean."""
    rng = np.random.default_rng(100 * runs + tasks)
    scores = rng.standard_normal((experiments, runs, tasks))
    index = rng.integers(0, runs, (replicates, runs, tasks))
    means = np.stack([np.take_along_axis(scores, rows[None], axis=1).mean((1, 2)) for rows in index], axis=1)
    low, high = np.quantile(means, [0.025, 0.975], axis=1)
    return float(((low <= 0) & (high >= 0)).mean())


@claim(
    "C62",
    "O",
    "Agarwal et al. 2021 (rliable)",
    "Stratified bootstrap intervals make results of a handful of runs (3-10) reliable.",
)
def bootstrap_intervals(evidence: Evidence) -> None:
    coverage = {
        (runs, tasks): evidence.headline(
            f"{runs} runs x {tasks} tasks: coverage of the 95% interval", bootstrap_coverage(runs, tasks)
        )
        for runs in (3, 5, 10)
        for tasks in (1, 10)
    }
    evidence.stated("coverage at least .93 with 3 to 10 runs", min(coverage.values()) >= 0.93)
    evidence.restricted("coverage at least .90 with 10 runs of 10 tasks", coverage[10, 10] >= 0.90)
    evidence.restricted(
        "coverage improves with the number of runs",
        coverage[3, 10] < coverage[10, 10] and coverage[3, 1] < coverage[10, 1],
    )
    evidence.remark(
        "With n runs the bootstrap's variance is (n-1)/n of the sample's: 3 runs lose a third whatever the "
        "number of tasks."
    )


@claim(
    "C65", "T", "this book (A/A test)",
    "Comparing an algorithm with itself rejects no more often than the nominal level with 3, 5 and 10 "
"seeds, and Holm keeps it over a family of cells.",
)  # fmt: skip
def a_a_test(evidence: Evidence) -> None:
    experiments, cells = 4000, 10
    rng = np.random.default_rng(2)
    bound = upper(LEVEL, experiments)
    rates, families, uncorrected = [], [], []
    for kind in ("normal", "collapsing"):
        for seeds in (3, 5, 10):
            x, y = outcomes(rng, (experiments, seeds), kind), outcomes(rng, (experiments, seeds), kind)
            for name, test in (("Welch", welch_p), ("paired t", paired_p), ("sign flip", sign_flip_p)):
                p = test(x, y)
                rates.append(evidence.number(f"{kind}, {seeds} seeds: false positives, {name}", (p <= LEVEL).mean()))
            shared = rng.normal(0, 0.05, (experiments, 1, seeds))  # what a seed gives every cell: data order, start
            scores = outcomes(rng, (experiments, cells + 1, seeds), kind) + shared
            p_cells = np.stack([paired_p(scores[:, cell], scores[:, cells]) for cell in range(cells)], axis=1)
            families.append(
                evidence.headline(
                    f"{kind}, {seeds} seeds: some of {cells} cells rejected, Holm", holm_rejects(p_cells).mean()
                )
            )
            uncorrected.append(
                evidence.number(f"{kind}, {seeds} seeds: the same without correction", (p_cells <= LEVEL).any(1).mean())
            )
    shared = rng.normal(0, 1.0, (experiments, 5))
    x, y = (shared + rng.normal(0, 0.3, (experiments, 5)) + shift for shift in (0.5, 0.0))
    power = {
        name: evidence.number(f"5 seeds with a common seed effect: power, {name}", (test(x, y) <= LEVEL).mean())
        for name, test in (("Welch", welch_p), ("paired t", paired_p))
    }
    evidence.stated("no test rejects above its level", max(rates) <= bound)
    evidence.stated("Holm keeps the family-wise rate", max(families) <= bound)
    evidence.stated("without correction it is exceeded", max(uncorrected) > bound)
    evidence.stated("pairing by seed gains power", power["paired t"] > power["Welch"])
    evidence.remark("The sign-flip test cannot reject with 3 seeds (smallest p .25) nor with 5 (.0625).")
