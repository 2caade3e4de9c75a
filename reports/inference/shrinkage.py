"""How far the variances of cells are shrunk to their common value: the degrees of freedom of an empirical Bayes prior.

The variance of a run of cell c is taken as scaled inverse χ² with d0 degrees of freedom (limma's prior); a residual
variance with f degrees of freedom is then scale·F(f, d0). d0 is not estimated by one number from few cells, which
would call unequal variances equal too often: its posterior is computed on a grid, uniform in the standard deviation ω
of log σ² over [0, `SPREAD`] and in the logarithm of the scale, and d0 is the one at the posterior mean of ω².

Sources: Smyth (2004), Stat. Appl. Genet. Mol. Biol. 3:3, eq. 3–6 and appendix; Phipson et al. (2016), Ann. Appl. Stat.
    10:946.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.special import betaln, polygamma

Array = NDArray[np.float64]
SPREAD = 1.6
_SPREADS = np.concatenate([[0.03], np.arange(0.1, SPREAD + 0.05, 0.1)])
_SCALES = np.exp(np.linspace(-1.6, 0.8, 19))


def prior_freedom(variances: Array, freedom: Array) -> float:
    """d0 of residual variances (``[cells]``, positive) with these degrees of freedom."""
    prior = _freedoms()[:, None, None]
    ratio = freedom * (variances / np.average(variances, weights=freedom))
    half = freedom / 2
    logs = np.sum(half * np.log(freedom)) - np.sum(half) * np.log(prior * _SCALES[:, None])[..., 0]
    logs = logs - np.sum(betaln(half, prior / 2), axis=-1)
    logs = logs - np.sum((half + prior / 2) * np.log1p(ratio / (prior * _SCALES[:, None])), axis=-1)
    weight = np.exp(logs - logs.max()).sum(axis=1)
    return 2 * _trigamma_inverse(float(np.average(_SPREADS**2, weights=weight)))


@lru_cache(maxsize=1)
def _freedoms() -> Array:
    return np.asarray([2 * _trigamma_inverse(float(spread) ** 2) for spread in _SPREADS])


def _trigamma_inverse(value: float) -> float:
    """x with trigamma(x) = value, by Newton's method on 1/trigamma (Smyth 2004, appendix)."""
    x = 0.5 + 1 / value
    for _ in range(50):
        trigamma = float(polygamma(1, x))
        step = trigamma * (1 - trigamma / value) / float(polygamma(2, x))
        x += step
        if -step / x < 1e-12:
            break
    return x
