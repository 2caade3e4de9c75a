"""The mathematics of an update: every axis of the objective as pure functions, composed in `loss`."""

from harness.objective.advantage import Returns
from harness.objective.aggregate import Totals
from harness.objective.batch import TokenBatch
from harness.objective.loss import Context, Outcome, objective_loss, parts, surrogate, update_context
from harness.objective.placement import Placement

__all__ = [
    "Context",
    "Outcome",
    "Placement",
    "Returns",
    "TokenBatch",
    "Totals",
    "objective_loss",
    "parts",
    "surrogate",
    "update_context",
]
