"""The mathematics of an update: every axis of the objective as pure functions, composed in `loss`.

An axis value may be the user's own function, named by an import path. It is called as the built-in values of its axis
are, its parameters following as keywords:

* estimator `(log_ratio)` → φ: κ `[N, T]`, 0 off the own tokens;
* placement `()` → `Placement`;
* ratio `(log_ratio, mask)` → log ρ: λ `[N, T]`, 0 off the own tokens;
* weight `(ratio, advantage)` → w: ρ and A `[N, T]`, without gradient;
* advantage `(returns)` → A: a `Returns`;
* aggregation `(terms, mask, totals)` → scalar: terms `[N, T]`, 0 off the own tokens, of some rows of the update, and
`Totals` of
  all of it;
* path `(logp, log_rho)` → what w·A multiplies.

Whatever they return off the own tokens is ignored.
"""

from klab.harness.objective.advantage import Returns
from klab.harness.objective.aggregate import Totals
from klab.harness.objective.batch import TokenBatch
from klab.harness.objective.groups import Groups
from klab.harness.objective.loss import (
    LossCoefficients,
    LossOutput,
    UpdateContext,
    axis_functions,
    loss_terms,
    objective_loss,
    update_context,
)
from klab.harness.objective.placement import Placement
from klab.harness.objective.value import value_loss, value_metrics

__all__ = [
    "Groups",
    "LossCoefficients",
    "LossOutput",
    "Placement",
    "Returns",
    "TokenBatch",
    "Totals",
    "UpdateContext",
    "axis_functions",
    "loss_terms",
    "objective_loss",
    "update_context",
    "value_loss",
    "value_metrics",
]
