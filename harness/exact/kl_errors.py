"""How far each KL estimator is, in each placement and with each ratio, from the gradient of its own divergence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from klab.grid import Objective
from klab.grid.catalogue import AXES
from klab.harness.exact.instance import Instance
from klab.harness.exact.report import report
from klab.harness.exact.tabular_setting import Setting
from klab.harness.exact.updates import every_trajectory

PLACEMENTS = tuple(name for name in AXES["placement"].values if name not in ("none", "log_ratio"))
ESTIMATORS = {"reverse": ("k1", "k2", "k3")}
"""Estimators of the table by divergence; of the others, `OF_ANY`."""
OF_ANY = ("k1", "k3", "reinforce")


@dataclass(frozen=True, slots=True)
class KlError:
    """One entry of the table.

    Attributes:
        divergence, estimator, placement, ratio: the cell.
        drift: standard deviation of the random drift from the behaviour policy; 0 is on-policy.
        error: |E g - grad D| / |grad D|, by enumeration, D being `token_divergence`.
        cosine: cosine between the two.
        variance: trace of the covariance of the gradient of one trajectory, relative to |grad D|^2.
    """

    divergence: str
    estimator: str
    placement: str
    ratio: str
    drift: float
    error: float
    cosine: float
    variance: float


def kl_errors(
    instance: Instance | None = None,
    drifts: Sequence[float] = (0.0, 0.3),
    divergences: Sequence[str] = ("reverse",),
) -> list[KlError]:
    """The table: divergences x estimators x placements x ratios x drifts, the KL term alone (reward 0, beta 1, KL
    summed over tokens).

    The score is weighted by the ratio itself (`weight: ratio`), advantages are the returns (`raw`), tokens are summed,
    and detached KL samples are taken at the current policy, so that nothing but the four axes is at work.
    """
    instance = instance or Instance()
    rows = []
    for drift in drifts:
        policy = instance.perturbed(drift).policy
        setting = Setting(policy, instance.behaviour, instance.reference, 0.0 * instance.reward)
        everything = every_trajectory(instance.behaviour)
        for divergence in divergences:
            estimators = ESTIMATORS.get(divergence, OF_ANY)
            for estimator, placement, ratio in product(estimators, PLACEMENTS, AXES["ratio"].values):
                found = report(kl_cell(estimator, placement, ratio, divergence), setting, everything)
                quality = (found.bias, found.cosine, found.variance_relative)
                rows.append(KlError(divergence, estimator, placement, ratio, drift, *quality))
    return rows


def kl_cell(estimator: str, placement: str, ratio: str, divergence: str = "reverse") -> Objective:
    """The objective of one entry of the table."""
    known = AXES["placement"].values[placement].parameters
    settings: dict[str, Any] = {"beta": 1.0, "kl_at": "current", "kl_scale": "sum"}
    return Objective(
        estimator=estimator, divergence=divergence, placement=placement, ratio=ratio, weight="ratio", advantage="raw",
        aggregation="sequence_sum", **{name: value for name, value in settings.items() if name in known},
    )  # fmt: skip
