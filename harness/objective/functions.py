"""The functions behind an objective: the chosen value of every axis with its parameters filled in, and the gradient
paths."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial

from jaxtyping import Float
from torch import Tensor

from klab.grid import Objective
from klab.grid.canonical import reads_divergence
from klab.grid.custom_values import SOLVER
from klab.harness.objective.advantage import Returns, value_targets
from klab.harness.objective.aggregate import AGGREGATIONS
from klab.harness.objective.custom import divide_parameters, optional_inputs
from klab.harness.objective.divergence import DIVERGENCES, REVERSE, Divergence
from klab.harness.objective.kl import ESTIMATORS
from klab.harness.objective.placement import PLACEMENTS, Placement
from klab.harness.objective.ratio import RATIOS
from klab.harness.objective.registry import Registry
from klab.harness.objective.values import ADVANTAGES, PENALTIES, SOLVERS, WEIGHTS

PATHS = Registry("path")


@PATHS.register("score")
def score_path(logp: Float[Tensor, "N T"], log_rho: Float[Tensor, "N T"]) -> Float[Tensor, "N T"]:
    """The surrogate's gradient is w·A·∇ℓ."""
    return logp


@PATHS.register("ratio")
def ratio_path(logp: Float[Tensor, "N T"], log_rho: Float[Tensor, "N T"]) -> Float[Tensor, "N T"]:
    """The surrogate's gradient is w·A·∇log ρ, through every token that enters ρ (GSPO, Zheng et al. 2025a)."""
    return log_rho


@dataclass(frozen=True)
class AxisFunctions:
    """The functions that an objective chooses, with their parameters filled in.

    Attributes:
        asks: by axis, and for the solver, what the function is given as keywords (see `View`).
        solver: finds the parameters of a weight that depend on the whole update; None where there are none.
        penalty: of a weight that adds a term to the loss: that of each token, from λ and what the solver found.
        entropy_bonus, entropy_share: the objective's.
        value_targets: R̂ of a critic.
    """

    asks: Mapping[str, frozenset[str]]
    estimator: Callable[..., Tensor]
    placement: Placement
    ratio: Callable[..., Tensor]
    weight: Callable[..., Tensor]
    solver: Callable[..., dict[str, Tensor]] | None
    penalty: Callable[..., Tensor] | None
    advantage: Callable[..., Tensor]
    value_targets: Callable[[Returns], Tensor]
    aggregation: Callable[..., Tensor]
    path: Callable[..., Tensor]
    entropy_bonus: float = 0.0
    entropy_share: float = 1.0

    @property
    def needs(self) -> frozenset[str]:
        """What the functions in use ask for, by the names of `klab.grid.custom_values.VIEW`."""
        used = (names for axis, names in self.asks.items() if axis != "estimator" or self.placement.has_kl)
        return frozenset().union(*used)


@lru_cache(maxsize=4096)
def axis_functions(objective: Objective) -> AxisFunctions:
    """The functions of an objective, the user's own ones imported.

    Raises:
        UserError: when a custom value's module or function does not exist or does not take its parameters.
    """
    asks = {
        registry.axis: registry.needs(getattr(objective, registry.axis))
        for registry in (ESTIMATORS, RATIOS, WEIGHTS, ADVANTAGES)
    }
    weight, solver, penalty = _weight_and_solver(objective)
    if solver is not None:
        asks["weight"] = optional_inputs(WEIGHTS.function(objective.weight), WEIGHTS.signature)
        asks["solver"] = optional_inputs(solver, SOLVER)
    return AxisFunctions(
        asks=asks,
        estimator=_estimator(objective),
        placement=PLACEMENTS.bound(objective.placement, objective.arguments("placement"))(),
        ratio=RATIOS.bound(objective.ratio, objective.arguments("ratio")),
        weight=weight,
        solver=solver,
        penalty=penalty,
        advantage=ADVANTAGES.bound(objective.advantage, objective.arguments("advantage")),
        value_targets=_value_targets(objective),
        aggregation=AGGREGATIONS.bound(objective.aggregation, objective.arguments("aggregation")),
        # without a ratio log ρ is 0 and carries no gradient
        path=score_path if objective.ratio == "none" else PATHS.bound(objective.path, objective.arguments("path")),
        entropy_bonus=objective.entropy_bonus,
        entropy_share=objective.entropy_share,
    )


@lru_cache(maxsize=4096)
def divergence_of(objective: Objective) -> Divergence:
    """The divergence whose estimate an objective penalises; reverse KL where the estimator reads none.

    Raises:
        UserError: when a custom divergence cannot be loaded or called.
    """
    if not reads_divergence(objective.estimator):
        return REVERSE
    made: Divergence = DIVERGENCES.bound(objective.divergence, objective.arguments("divergence"))()
    return made


def _estimator(objective: Objective) -> Callable[..., Tensor]:
    """The estimator with its parameters filled in, of the objective's divergence where it reads one."""
    estimator = ESTIMATORS.bound(objective.estimator, objective.arguments("estimator"))
    if not reads_divergence(objective.estimator):
        return estimator
    return partial(estimator, divergence=divergence_of(objective))


def _weight_and_solver(
    objective: Objective,
) -> tuple[Callable[..., Tensor], Callable[..., dict[str, Tensor]] | None, Callable[..., Tensor] | None]:
    """The weight with its parameters filled in, and likewise the function that finds those of the whole update, and the
    weight's penalty."""
    name, settings = objective.weight, objective.arguments("weight")
    function = WEIGHTS.function(name)
    solver: Callable[..., dict[str, Tensor]] | None = SOLVERS.get(name) or getattr(function, "solver", None)
    own, found = (settings, {}) if solver is None else divide_parameters(function, solver, name, settings)
    penalty = partial(PENALTIES[name], **own) if name in PENALTIES else None
    if solver is None:
        return WEIGHTS.bound(name, settings), None, penalty
    return WEIGHTS.bound(name, own, solved=True), partial(solver, **found), penalty


def _value_targets(objective: Objective) -> Callable[[Returns], Tensor]:
    """R̂ with the γ and λ of `gae`; beside a custom advantage, the undiscounted returns."""
    gamma, lam = (objective.gamma, objective.lam) if objective.advantage == "gae" else (1.0, 1.0)
    return lambda returns: value_targets(returns, gamma, lam)
