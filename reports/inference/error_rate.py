"""How the error rate of a study is divided: between its contrasts, effects and interactions, and between its looks.

Looks at a growing study are paid for by a spending function: by the fraction t of the seeds that it will have at most,
α(t) is spent, and a look at t[k] tests at level α(t[k]) − α(t[k−1]). The levels of all looks add up to α, so that the
chance of any false verdict at any of them is at most α whatever the dependence of looks and estimates (a little is
given away: the correlation between looks is not used), and however it is decided to go on.

Source: Lan and DeMets (1983), Biometrika 70:659; O'Brien and Fleming (1979), Biometrics 35:549; Pocock (1977),
Biometrika 64:191.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

ALPHA = 0.05
SHARES = (0.55, 0.3, 0.15)
"""How the error rate is divided between contrasts, effects and interactions where the design crosses axes."""
ALONE = 0.9
"""The share that several contrasts use where there is nothing else: the rest covers that their variances are shrunk. A
single contrast is an exact test and uses all."""
STATED = 0.8
"""The part of the contrasts' share that contrasts have which were stated beforehand; the others have the rest."""


def divided(alpha: float, tests: int) -> float:
    """The level of each of so many tests, by Šidák's formula."""
    return -math.expm1(math.log1p(-alpha) / max(tests, 1))


def spent(fraction: float, spending: str, alpha: float = ALPHA) -> float:
    """The error rate that may be spent by this fraction of the most seeds."""
    if fraction >= 1:
        return alpha
    if fraction <= 0:
        return 0.0
    if spending == "pocock":
        return alpha * math.log(1 + (math.e - 1) * fraction)
    normal = NormalDist()
    return 2 * normal.cdf(normal.inv_cdf(alpha / 2) / math.sqrt(fraction))


def look_level(looks: Sequence[int], most: int, spending: str = "obrien_fleming", alpha: float = ALPHA) -> float:
    """The level of the newest look.

    Args:
        looks: seeds per cell at each look, increasing.
        most: seeds per cell that there will be at most; a study that has more spends nothing after it.
    """
    before = looks[-2] if len(looks) > 1 else 0
    return spent(looks[-1] / most, spending, alpha) - spent(before / most, spending, alpha)


def look_share(looks: Sequence[int], most: int, spending: str = "obrien_fleming") -> float:
    """The part of the error rate that the newest look may use; see `look_level`. Never less than a billionth."""
    return max(look_level(looks, most, spending) / ALPHA, 1e-9)
