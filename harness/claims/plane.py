"""The bias-variance plane: every ratio with every weight of the catalogue, computed by the harness itself."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from torch import Tensor

from klab.grid import Objective
from klab.harness.claims.drift import INSTANCES
from klab.harness.claims.instances import Setting, binary_reward
from klab.harness.exact.gradients import exact_gradient
from klab.harness.objective import axis_functions

RATIOS = ("none", "token", "sequence_mean", "future_mean", "prefix_product", "future_product", "sequence_product")
WEIGHTS = ("one", "ratio", "ppo_clip", "dual_clip", "truncate", "clamp", "truncate_clip", "power", "mask", "sigmoid")
"""All but `adaptive`, which depends on the whole update and has no place in a plane of one trajectory."""


@dataclass(frozen=True, slots=True)
class PlaneCell:
    """One ratio and weight: squared bias and trace variance of a trajectory, over |grad J|^2, means over instances."""

    ratio: str
    weight: str
    squared_bias: float
    variance: float


def coefficient(objective: Objective, setting: Setting, advantage: Tensor) -> Tensor:
    """w(rho_j, A) A `[M, H]` of every trajectory, as the harness computes it."""
    chosen = axis_functions(objective)
    mask = setting.policy.trajectories.mask
    rho = chosen.ratio(setting.log_ratio, mask).exp()
    return chosen.weight(rho, advantage) * advantage


@lru_cache(maxsize=2)
def cells(size: float = 0.3) -> tuple[PlaneCell, ...]:
    """Every ratio x weight at one size of random drift, for a centred binary reward (V = 3, H = 4)."""
    sums: dict[tuple[str, str], list[float]] = {}
    for seed in range(INSTANCES):
        setting, reward = Setting.random(3, 4, seed, drift=size), binary_reward(81, 1000 + seed)
        truth = exact_gradient(setting.policy, setting.policy, reward, 0.0).flatten()
        scale = float(truth @ truth)
        advantage = (reward - setting.sampling @ reward)[:, None].expand_as(setting.mask)
        for ratio in RATIOS:
            for weight in WEIGHTS if ratio != "none" else ("one",):
                terms = coefficient(Objective(placement="none", ratio=ratio, weight=weight), setting, advantage)
                gap = setting.mean(terms) - truth
                row = sums.setdefault((ratio, weight), [0.0, 0.0])
                row[0] += float(gap @ gap) / scale / INSTANCES
                row[1] += setting.spread(terms) / scale / INSTANCES
    return tuple(PlaneCell(ratio, weight, bias, spread) for (ratio, weight), (bias, spread) in sums.items())
