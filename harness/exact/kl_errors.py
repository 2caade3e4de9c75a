"""How far each KL estimator is, in each placement and with each ratio, from the gradient of KL(pi || reference)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from klab.grid import Objective
from klab.grid.catalogue import AXES
from klab.harness.exact.instance import Instance
from klab.harness.exact.report import report
from klab.harness.exact.tabular_setting import Setting
from klab.harness.exact.updates import every_trajectory

PLACEMENTS = tuple(name for name in AXES["placement"].values if name not in ("none", "log_ratio"))
ESTIMATORS = ("k1", "k2", "k3")


@dataclass(frozen=True, slots=True)
class KlError:
    """One entry of the table.

    Attributes:
        estimator, placement, ratio: the cell.
        drift: standard deviation of the random drift from the behaviour policy; 0 is on-policy.
        error: |E g - grad KL| / |grad KL|, by enumeration.
        cosine: cosine between the two.
    """

    estimator: str
    placement: str
    ratio: str
    drift: float
    error: float
    cosine: float


def kl_errors(
    instance: Instance | None = None, drifts: Sequence[float] = (0.0, 0.3), estimators: Sequence[str] = ESTIMATORS
) -> list[KlError]:
    """The table: estimators x placements x ratios x drifts, the KL term alone (reward 0, beta 1, KL summed over
    tokens).

    The score is weighted by the ratio itself (`weight: ratio`), advantages are the returns (`raw`), tokens are summed,
    and detached KL samples are taken at the current policy, so that nothing but the three axes is at work.
    """
    instance = instance or Instance()
    rows = []
    for drift in drifts:
        policy = instance.perturbed(drift).policy
        setting = Setting(policy, instance.behaviour, instance.reference, 0.0 * instance.reward)
        everything = every_trajectory(instance.behaviour)
        for estimator in estimators:
            for placement in PLACEMENTS:
                for ratio in AXES["ratio"].values:
                    found = report(kl_cell(estimator, placement, ratio), setting, everything)
                    rows.append(KlError(estimator, placement, ratio, drift, found.bias, found.cosine))
    return rows


def kl_cell(estimator: str, placement: str, ratio: str) -> Objective:
    """The objective of one entry of the table."""
    known = AXES["placement"].values[placement].parameters
    settings: dict[str, Any] = {"beta": 1.0, "kl_at": "current", "kl_scale": "sum"}
    return Objective(
        estimator=estimator, placement=placement, ratio=ratio, weight="ratio", advantage="raw",
        aggregation="sequence_sum", **{name: value for name, value in settings.items() if name in known},
    )  # fmt: skip
