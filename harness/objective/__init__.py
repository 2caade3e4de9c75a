"""The objective: every axis as pure functions of tensors, composed into the loss of an update.

The axes: `kl` (estimators), `divergence`, `placement`, `ratio`, `weight` with `weight_masks`, `soft_weights` and
`covariance`, `advantage` with `advantage_groups`, `aggregate`, and the gradient paths in `functions`; `loss` composes
them. Symbols and shapes are those of `klab.grid.glossary`; a function of the user's own is called as
`klab.grid.custom_values` says (`klab axes weight` prints it).
"""

from klab.harness.objective.advantage import Returns
from klab.harness.objective.aggregate import Totals
from klab.harness.objective.batch import TokenBatch
from klab.harness.objective.divergence import Divergence
from klab.harness.objective.functions import AxisFunctions, axis_functions
from klab.harness.objective.groups import Groups
from klab.harness.objective.loss import (
    LossCoefficients,
    LossOutput,
    UpdateContext,
    detached_kl,
    loss_terms,
    objective_loss,
    update_context,
)
from klab.harness.objective.placement import Placement
from klab.harness.objective.value import value_loss, value_metrics

__all__ = [
    "AxisFunctions",
    "Divergence",
    "Groups",
    "LossCoefficients",
    "LossOutput",
    "Placement",
    "Returns",
    "TokenBatch",
    "Totals",
    "UpdateContext",
    "axis_functions",
    "detached_kl",
    "loss_terms",
    "objective_loss",
    "update_context",
    "value_loss",
    "value_metrics",
]
