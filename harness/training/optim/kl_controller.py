"""Coefficients that change: β of the KL term, adaptive (Ziegler et al. 2019) or on a schedule, and those of the
trust-region penalty (Schulman et al. 2017) and of the entropy bonus (He et al. 2025).

They are pure functions of the last coefficients and of the update's row of metrics, so that a resumed cell has the same
ones.
"""

from __future__ import annotations

from dataclasses import replace

from klab.grid.cell import Cell
from klab.grid.kl_settings import first_beta
from klab.harness.objective import LossCoefficients
from klab.harness.training.metrics import Row
from klab.harness.training.optim.schedule import RolloutSchedule

MAX_RELATIVE_ERROR = 0.2
"""Bound of the relative error that moves β (Ziegler et al. 2019)."""

KL_TOLERANCE = 1.5
"""A KL within this factor of the target leaves the trust region's coefficient as it is (Schulman et al. 2017)."""

MAX_TRUST_FACTOR = 2.0**10
"""How far the trust region's coefficient may go from its first value, so that it never overflows or vanishes."""


def initial_coefficients(cell: Cell) -> LossCoefficients:
    """The coefficients of the first update."""
    trust, control = cell.training.trust_region, cell.training.entropy_control
    found = LossCoefficients(kl=1.0, trust=0.0 if trust is None else trust.coefficient)
    if control is None:
        return found
    return replace(found, entropy=cell.objective.entropy_bonus, entropy_acts=False)


def coefficient_metrics(cell: Cell, coefficients: LossCoefficients) -> Row:
    """The coefficients that change as columns of an update's row of metrics."""
    found: Row = {}
    if cell.training.beta_control is not None:
        found["beta"] = coefficients.kl * first_beta(cell.objective)
    if cell.training.trust_region is not None:
        found["trust_coefficient"] = coefficients.trust
    if cell.training.entropy_control is not None:
        found["entropy_coefficient"] = coefficients.entropy_bonus(cell.objective.entropy_bonus)
    return found


def next_coefficients(cell: Cell, coefficients: LossCoefficients, row: Row) -> LossCoefficients:
    """The coefficients of the next update. What adapts stays where it is after an update that was skipped, that had no
    token in its loss, or that the critic alone made; a schedule goes on.

    Args:
        row: of the update that was made.
    """
    training, number = cell.training, int(row["update"])
    control, trust = training.beta_control, training.trust_region
    if control is not None and control.schedule != "adaptive":
        first = first_beta(cell.objective)
        coefficients = replace(coefficients, kl=control.scheduled(first, number + 1, training.updates) / first)
    if row["nonfinite"] or row.get("loss_tokens") == 0:
        return coefficients
    if training.critic is not None and number <= training.critic.warmup_updates:
        return coefficients
    if control is not None and control.target is not None and row["k3"] is not None:
        error = row["k3"] / control.target - 1.0
        step = max(-MAX_RELATIVE_ERROR, min(MAX_RELATIVE_ERROR, error)) / control.horizon
        coefficients = replace(coefficients, kl=coefficients.kl * (1.0 + step))
    last = number % RolloutSchedule.of(training).updates_per_rollout == 0
    if trust is not None and trust.target is not None and last and row["kl_behaviour"] is not None:
        factor = 2.0 if row["kl_behaviour"] > KL_TOLERANCE * trust.target else 1.0
        factor = 0.5 if row["kl_behaviour"] < trust.target / KL_TOLERANCE else factor
        bounds = trust.coefficient / MAX_TRUST_FACTOR, trust.coefficient * MAX_TRUST_FACTOR
        coefficients = replace(coefficients, trust=min(bounds[1], max(bounds[0], coefficients.trust * factor)))
    entropy = training.entropy_control
    if entropy is not None and row["entropy"] is not None:
        scarce, now = row["entropy"] <= entropy.target, coefficients.entropy or 0.0
        moved = now + entropy.step if scarce else now - entropy.step
        coefficients = replace(coefficients, entropy=min(entropy.high, max(entropy.low, moved)), entropy_acts=scarce)
    return coefficients
