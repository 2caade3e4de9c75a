"""Standard errors, degrees of freedom and simultaneous critical values of linear combinations of runs.

With weights w[run] the variance of an estimate is Σ_c σ²[c] Σ_{run in c} w² + Σ_a τ²[a] Σ_{v,s} (Σ_{run in (v,s)} w)²
+ θ Σ_s (Σ_{run in s} w)²; its degrees of freedom are Satterthwaite's over the mean squares that enter. The critical
value of a family is that of the largest |t|, by simulation of estimates and variance estimates together from a fixed
seed (a multivariate t in which every variance has its own degrees of freedom).

Sources: Satterthwaite (1946), Biometrics Bull. 2:110; Dunnett (1955), JASA 50:1096; Hothorn, Bretz and Westfall
    (2008), Biometrical J. 50:346 (simultaneous inference by the largest t); Hasler and Hothorn (2008) for unequal
    variances.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import sparse, special

from klab.reports.inference.contrasts import ROUNDING, Combinations
from klab.reports.inference.design import Array, Design, Indices
from klab.reports.inference.variance import Components

_SEED = 20_250_101
_DRAWS = (6_000, 50_000)
_NUMBERS = 600_000
"""A family of M is simulated with this many numbers in all, within the bounds of `_DRAWS` per member."""
_EXCEEDANCES = 10
"""A level that fewer draws than this would exceed is not found by simulation, but bounded by Šidák's inequality."""
_MANY = 1e8


@dataclass(frozen=True)
class Uncertainty:
    """How exact `M` estimates are.

    Attributes:
        error: ``[M]`` standard error; 0 where all scores agree, NaN where nothing can be said.
        freedom: ``[M]`` degrees of freedom.
        factors: matrices ``[M, K]`` whose products with themselves add up to the covariance.
        runs: ``[M, C]``, each cell's part of the run variance.
        rest: ``[M]``, what of it is not already inside the mean squares of `strata`.
        strata: mean-square parts, ``[M]`` each, with their degrees of freedom.
        cell_freedom, pool: ``[C]``, degrees of freedom of a cell's variance, and the pool it belongs to (-1: its own).
    """

    error: Array
    freedom: Array
    factors: tuple[sparse.csr_matrix, ...]
    runs: sparse.csr_matrix
    rest: Array
    strata: tuple[tuple[Array, float], ...]
    cell_freedom: Array
    pool: Indices


def uncertainty(combinations: Combinations, design: Design, components: Components) -> Uncertainty:
    """Standard errors and degrees of freedom of `combinations`."""
    weights = combinations.weights
    variance = np.nan_to_num(components.cell_variance)
    of_cell = sparse.csr_matrix(
        (np.ones(design.cell.size), (np.arange(design.cell.size), design.cell)), shape=(design.cell.size, design.cells)
    )
    squared = weights.multiply(weights).tocsr() @ of_cell
    runs = (squared @ sparse.diags(variance)).tocsr()
    factors = [(weights @ sparse.diags(np.sqrt(variance)[design.cell])).tocsr()]
    strata: list[tuple[Array, float]] = []
    inside = np.zeros(weights.shape[0])
    for axis in components.axes:
        sums = weights @ _indicator(axis.group)
        share = np.asarray(sums.multiply(sums).sum(axis=1)).ravel() * axis.scale
        error = components.error[axis.task]
        strata.append((share * max(axis.mean_square, error), axis.freedom))
        inside += share * error
        factors.append((sums * np.sqrt(axis.scale * max(axis.mean_square - error, 0.0))).tocsr())
    own = np.asarray(runs.sum(axis=1)).ravel()
    rest = np.maximum(own - inside, 0.0)
    rest[rest < 1e-9 * own] = 0.0
    for task in range(len(design.tasks)):
        if not components.seed_variance[task] > 0:
            continue
        sums = weights @ _indicator(np.where(design.task[design.cell] == task, design.block, -1))
        sums.data[np.abs(sums.data) < 1e-12] = 0.0
        share = np.asarray(sums.multiply(sums).sum(axis=1)).ravel() * components.seed_variance[task]
        strata.append((share, float(components.seed_freedom[task])))
        factors.append((sums * np.sqrt(components.seed_variance[task])).tocsr())
    total, spread = rest.copy(), _spread(runs, rest, own, design, components)
    for part, freedom in strata:
        total += part
        spread += 2 * part**2 / freedom
    nothing = ~combinations.known | (combinations.n < 2) | ~np.isfinite(_worst(squared, components.cell_variance))
    scale = float(np.max(np.abs(design.score), initial=0.0))
    error = np.where(np.sqrt(total) <= ROUNDING * scale, 0.0, np.sqrt(total))
    with np.errstate(divide="ignore", invalid="ignore"):
        satterthwaite = np.where(spread > 0, 2 * total**2 / spread, np.inf)
    return Uncertainty(
        np.where(nothing, np.nan, error),
        np.where(nothing, np.nan, satterthwaite),
        tuple(factors),
        runs,
        rest,
        tuple(strata),
        components.cell_freedom,
        components.pool,
    )


def _worst(squared: sparse.csr_matrix, variance: Array) -> Array:
    unknown = np.asarray((~np.isfinite(variance)), dtype=np.float64)
    return np.where(np.asarray(squared @ unknown).ravel() > 0, np.nan, 0.0)


def _spread(runs: sparse.csr_matrix, rest: Array, own: Array, design: Design, components: Components) -> Array:
    """Variance of the run part of the variance estimates: pools vary as one, other cells each by itself.

    However many cells enter, the part of a task is no more certain than the task's MS_E.
    """
    freedom, pool = components.cell_freedom, components.pool
    found = np.zeros(runs.shape[0])
    for task in range(len(design.tasks)):
        here = design.task == task
        part = runs @ here.astype(np.float64)
        alone = np.where(here & (pool < 0) & (freedom > 0), 2 / np.where(freedom > 0, freedom, 1.0), 0.0)
        single = runs.multiply(runs) @ alone
        together = here & (pool >= 0)
        if together.any():
            single = single + 2 * (runs @ together.astype(np.float64)) ** 2 / float(freedom[together][0])
        least = 2 * part**2 / max(float(components.error_freedom[task]), 1e-12)
        found += np.where(part > 0, np.maximum(single, least), 0.0)
    ratio = rest / np.where(own > 0, own, 1.0)
    return np.asarray(found * ratio**2, dtype=np.float64)


def _indicator(group: Indices) -> sparse.csr_matrix:
    inside = np.flatnonzero(group >= 0)
    number = np.unique(group[inside], return_inverse=True)[1]
    width = int(number.max()) + 1 if number.size else 0
    return sparse.csr_matrix((np.ones(inside.size), (inside, number)), shape=(group.size, width))


def critical_values(found: Uncertainty, rows: Indices, alpha: float) -> Array:
    """Bounds of |t| for the estimates `rows`, one of which is exceeded with probability `alpha` when nothing differs.

    They are proportional to the estimates' own t-quantiles; at levels too small to simulate they are Šidák's. All must
    have a positive standard error. The order of the rows decides which random numbers each gets: sort them by something
    that names do not change.
    """
    bounds = quantile(-np.expm1(np.log1p(-alpha) / max(rows.size, 1)), found.freedom[rows])
    if rows.size < 2 or alpha * _draw_count(rows.size) < _EXCEEDANCES:
        return bounds
    largest = np.max(_simulate(found, rows) / bounds, axis=1)
    return bounds * float(np.quantile(largest, 1 - alpha))


def _draw_count(size: int) -> int:
    return int(np.clip(_NUMBERS // size, *_DRAWS))


def quantile(p: float | Array, freedom: Array) -> Array:
    """|t| beyond which the two tails of Student's t have probability `p`."""
    return np.asarray(-special.stdtrit(np.minimum(freedom, _MANY), np.asarray(p) / 2), dtype=np.float64)


def tail(statistic: Array, freedom: Array) -> Array:
    """Probability of the two tails of Student's t beyond ±`statistic`."""
    return np.asarray(2 * special.stdtr(np.minimum(freedom, _MANY), -np.abs(statistic)), dtype=np.float64)


def _simulate(found: Uncertainty, rows: Indices) -> Array:
    """``[draws, rows]``, |t| of every estimate when nothing differs."""
    draws = _draw_count(rows.size)
    generator = np.random.Generator(np.random.PCG64(_SEED))
    factors = [factor[rows] for factor in found.factors]
    covariance = sum((factor @ factor.T).toarray() for factor in factors)
    scale = np.sqrt(np.diag(covariance))
    root = np.linalg.cholesky(covariance / np.outer(scale, scale) + 1e-9 * np.eye(rows.size))
    normal = generator.standard_normal((draws, rows.size), dtype=np.float32) @ root.T.astype(np.float32)
    variance = _draw_runs(found, rows, generator, draws)
    for part, freedom in found.strata:
        if part[rows].any():
            variance += generator.chisquare(freedom, draws)[:, None] / freedom * part[rows]
    ratio = np.sqrt(variance) / found.error[rows]
    return np.asarray(np.abs(normal) / np.maximum(ratio, 1e-12), dtype=np.float64)


def _draw_runs(found: Uncertainty, rows: Indices, generator: np.random.Generator, draws: int) -> Array:
    # The cells get their random numbers in an order that the order of the estimates decides.
    columns = found.runs[rows].tocsc()
    sizes = np.diff(columns.indptr)
    used = np.flatnonzero(sizes)
    used = used[np.lexsort((columns.indices[columns.indptr[used]], -sizes[used]))]
    parts = columns[:, used].toarray()
    own = parts.sum(axis=1)
    parts = parts * (found.rest[rows] / np.where(own > 0, own, 1.0))[:, None]
    variance = np.zeros((draws, rows.size))
    pool = found.pool[used]
    for number in np.unique(pool[pool >= 0]):
        freedom = float(found.cell_freedom[used[pool == number]][0])
        variance += (generator.chisquare(freedom, draws) / freedom)[:, None] * parts[:, pool == number].sum(axis=1)
    alone = np.flatnonzero(pool < 0)
    if alone.size:
        each = found.cell_freedom[used[alone]]
        drawn = 2 * generator.standard_gamma(each / 2, (draws, alone.size), dtype=np.float32) / each.astype(np.float32)
        variance += drawn @ parts[:, alone].T.astype(np.float32)
    return variance
