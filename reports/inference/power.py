"""What a design can see before it has run: detectable differences, and the seeds that a difference needs.

The bounds are those that `analyse` will use when all cells are equally noisy: shrunken variances with the degrees of
freedom that they then have, and the largest |t| of all contrasts with a common baseline, by quadrature. Power is that
of one contrast whose true difference is the one stated.

Source: Dunnett (1955), JASA 50:1096; for unequal variance estimates Hasler and Hothorn (2008), Biometrical J. 50:793.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import numpy as np
from scipy import special

from klab.reports.inference.error_rate import ALONE, ALPHA, SHARES, STATED, divided
from klab.reports.inference.shrinkage import prior_freedom

POWER = 0.8
_NODES = 24
MOST_SEEDS = 2000
"""More seeds per cell than these count as hopeless."""


@dataclass(frozen=True)
class PlannedDesign:
    """What is known of a study before it runs.

    Attributes:
        tasks: configurations per task, each with a baseline among them.
        stated: contrasts stated beforehand; 0: none, then all contrasts share the error rate.
        crossed: by axis, its number of values, where the design crosses axes; empty where it does not.
        alpha: the error rate of everything together, at the next look.
    """

    tasks: tuple[int, ...]
    stated: int = 0
    crossed: tuple[tuple[str, int], ...] = ()
    alpha: float = ALPHA

    @property
    def contrasts(self) -> int:
        """How many contrasts share their part of the error rate; over several tasks their averages, too."""
        across = min(self.tasks) - 1 if len(self.tasks) > 1 else 0
        return self.stated or sum(count - 1 for count in self.tasks) + across

    @property
    def contrast_alpha(self) -> float:
        """The part of the error rate that these contrasts have."""
        share = SHARES[0] if self.crossed else ALONE if self.contrasts > 1 else 1.0
        others = sum(count - 1 for count in self.tasks) > self.stated
        return self.alpha * share * (STATED if self.stated and others else 1.0)


@dataclass(frozen=True)
class Noise:
    """Standard deviations of a score.

    Attributes:
        run: of a run of a cell, the seed's own effect removed.
        axes: by axis, of the effect of a value from seed to seed (seed × axis).
    """

    run: float
    axes: tuple[tuple[str, float], ...] = ()


def detectable_contrast(design: PlannedDesign, seeds: int, noise: Noise, power: float = POWER) -> float:
    """The difference between a cell and the baseline that is found with this power; NaN where nothing is ever found."""
    if seeds < 2 or design.contrasts < 1:
        return float("nan")
    cells = min(count for count in design.tasks if count > 1)
    most = float((cells - 1) * (seeds - 1))
    own = most if cells < 3 else min(_cell_freedom(cells, seeds), most)
    freedom = min(2 * own, most)
    sizes = [design.stated] if design.stated else [count - 1 for count in design.tasks]
    rest = design.contrasts - sum(sizes)
    bound = _largest_t([size for size in (*sizes, rest) if size > 0], own, freedom, design.contrast_alpha)
    # Axes vary from seed to seed in both cells, which differ in at least one of them.
    variance = 2 * noise.run**2 + 2 * max((sd**2 for _, sd in noise.axes), default=0.0)
    return _noncentrality(freedom, bound, power) * float(np.sqrt(variance / seeds))


def detectable_effect(design: PlannedDesign, axis: str, seeds: int, noise: Noise, power: float = POWER) -> float:
    """The mean effect of a value of this axis, over all cells, that is found with this power."""
    levels = dict(design.crossed)[axis]
    if seeds < 2:
        return float("nan")
    level = divided(divided(design.alpha * SHARES[1], len(design.crossed)), levels - 1)
    freedom = float((levels - 1) * (seeds - 1))
    bound = float(-special.stdtrit(freedom, level / 2))
    pairs = max(sum(design.tasks) / levels, 1.0)
    variance = 2 * noise.run**2 / pairs + 2 * dict(noise.axes).get(axis, 0.0) ** 2
    return _noncentrality(freedom, bound, power) * float(np.sqrt(variance / seeds))


def seeds_needed(seen: Callable[[int], float], difference: float) -> int | None:
    """The fewest seeds with which `seen`, the detectable difference at so many seeds, is no more than `difference`.

    None where more than 2000 would be needed.
    """
    low, high = 1, 2
    while not seen(high) <= difference:
        low, high = high, high * 2
        if high > MOST_SEEDS:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if seen(middle) <= difference else (middle, high)
    return high


@lru_cache(maxsize=1024)
def _cell_freedom(cells: int, seeds: int) -> float:
    """Degrees of freedom of a cell's shrunken variance in a typical study with equal variances."""
    own = (cells - 1) * (seeds - 1) / cells
    shown = min(cells, 200)
    typical = special.chdtri(own, 1 - (np.arange(shown) + 0.5) / shown) / own
    return own + prior_freedom(typical, np.full(shown, own))


def _noncentrality(freedom: float, bound: float, power: float) -> float:
    """The noncentrality at which |t| exceeds the bound with this power; that it does on the other side is neglected."""
    if freedom > 1e4:
        return bound + NormalDist().inv_cdf(power)
    return float(special.nctdtrinc(freedom, 1 - power, bound))


@lru_cache(maxsize=4096)
def _bound(sizes: tuple[int, ...], own: float, freedom: float, alpha: float) -> float:
    count = sum(sizes)
    single = float(-special.stdtrit(freedom, divided(alpha, count) / 2))
    if count == 1:
        return single
    z, weight = np.polynomial.hermite_e.hermegauss(_NODES)
    weight = weight / weight.sum()
    levels = (np.arange(_NODES) + 0.5) / _NODES
    spread = special.chdtri(own, 1 - levels) / own
    scale = np.sqrt(spread[:, None] + spread)[:, :, None]  # [the baseline's variance, the cell's, the baseline's mean]

    def inside(bound: float) -> float:
        each = special.ndtr(scale * bound + z) - special.ndtr(-scale * bound + z)
        blocks = [float((each.mean(axis=1) ** size).mean(axis=0) @ weight) for size in sizes]
        return float(np.prod(blocks))

    low, high = float(-special.stdtrit(freedom, alpha / 2)) * 0.8, single * 1.2
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if inside(middle) < 1 - alpha else (low, middle)
    return high


def _largest_t(sizes: Sequence[int], own: float, freedom: float, alpha: float) -> float:
    """The bound of |t| that one of the contrasts exceeds with probability `alpha` when nothing differs.

    Args:
        sizes: contrasts per baseline.
        own: degrees of freedom of a cell's variance.
        freedom: degrees of freedom of a contrast.
    """
    return _bound(tuple(sizes), own, freedom, alpha)
