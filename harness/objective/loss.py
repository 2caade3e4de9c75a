"""The loss of an update: the axes composed in order, KL samples, returns, advantage, ratio, weight, surrogate, loss.

>>> import torch
>>> from klab.grid import Objective
>>> logp = torch.log(torch.tensor([[0.5, 0.25], [0.5, 0.5]])).requires_grad_()
>>> batch = TokenBatch(
...     logp, logp.detach(), logp.detach(), mask=torch.ones(2, 2, dtype=torch.bool),
...     rewards=torch.tensor([1.0, 0.0]), groups=torch.tensor([0, 0]), max_new_tokens=2)
>>> objective_loss(Objective(advantage="group_center"), batch).loss.backward()
>>> logp.grad
tensor([[-0.1250, -0.1250],
        [ 0.1250,  0.1250]])
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from klab.grid import Objective
from klab.harness.objective.advantage import ADVANTAGES, Returns, value_targets
from klab.harness.objective.aggregate import AGGREGATIONS, Totals
from klab.harness.objective.batch import TokenBatch
from klab.harness.objective.groups import Groups
from klab.harness.objective.kl import ESTIMATORS, behaviour_kl
from klab.harness.objective.masking import last_token_mask, masked, suffix_sum
from klab.harness.objective.metrics import TokenStats, update_metrics
from klab.harness.objective.placement import PLACEMENTS, Placement
from klab.harness.objective.ratio import RATIOS
from klab.harness.objective.registry import Registry
from klab.harness.objective.weight import SOLVERS, WEIGHTS, zero_preserving_product

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
        estimator_inputs, advantage_inputs: the fields of the batch that these functions are given as keywords.
        solver: finds the parameters of a weight that depend on the whole update; None where there are none.
        value_targets: R̂ of a critic.
    """

    estimator: Callable[..., Tensor]
    estimator_inputs: frozenset[str]
    placement: Placement
    ratio: Callable[..., Tensor]
    weight: Callable[..., Tensor]
    solver: Callable[..., dict[str, Tensor]] | None
    advantage: Callable[..., Tensor]
    advantage_inputs: frozenset[str]
    value_targets: Callable[[Returns], Tensor]
    aggregation: Callable[..., Tensor]
    path: Callable[..., Tensor]

    @property
    def needs(self) -> frozenset[str]:
        """The optional fields of a `TokenBatch` that must be given: `logits`, `logits_reference`, `greedy_rewards`."""
        return self.advantage_inputs | (self.estimator_inputs if self.placement.has_kl else frozenset())


@lru_cache(maxsize=4096)
def axis_functions(objective: Objective) -> AxisFunctions:
    """The functions of an objective, the user's own ones imported.

    Raises:
        UserError: when a custom value's module or function does not exist or does not take its parameters.
    """
    solver = SOLVERS.get(objective.weight)
    settings: Mapping[str, Any] = objective.arguments("weight")
    return AxisFunctions(
        estimator=ESTIMATORS.bound(objective.estimator, objective.arguments("estimator")),
        estimator_inputs=ESTIMATORS.needs(objective.estimator),
        placement=PLACEMENTS.bound(objective.placement, objective.arguments("placement"))(),
        ratio=RATIOS.bound(objective.ratio, objective.arguments("ratio")),
        weight=WEIGHTS.bound(objective.weight, {} if solver else settings),
        solver=(lambda log_rho, mask: solver(log_rho, mask, **settings)) if solver else None,
        advantage=ADVANTAGES.bound(objective.advantage, objective.arguments("advantage")),
        advantage_inputs=ADVANTAGES.needs(objective.advantage),
        value_targets=_value_targets(objective),
        aggregation=AGGREGATIONS.bound(objective.aggregation, objective.arguments("aggregation")),
        # without a ratio log ρ is 0 and carries no gradient
        path=score_path if objective.ratio == "none" else PATHS.bound(objective.path, objective.arguments("path")),
    )


def _value_targets(objective: Objective) -> Callable[[Returns], Tensor]:
    """R̂ with the γ and λ of `gae`; beside a custom advantage, the undiscounted returns."""
    gamma, lam = (objective.gamma, objective.lam) if objective.advantage == "gae" else (1.0, 1.0)
    return lambda returns: value_targets(returns, gamma, lam)


@dataclass(frozen=True)
class LossCoefficients:
    """Coefficients that change during training and are therefore no part of the objective.

    Attributes:
        kl: multiplies whatever the placement penalises or adds to the loss, and so its β.
        trust: coefficient of the trust region, trust·agg(e^λ − 1 − λ) in the loss.
    """

    kl: float = 1.0
    trust: float = 0.0


CONSTANT_COEFFICIENTS = LossCoefficients()


@dataclass(frozen=True)
class UpdateContext:
    """What is computed once for a whole update and shared by its micro-batches; without gradient.

    Attributes:
        advantages: A, 0 off the own tokens.
        totals: the denominators of the aggregation.
        solved: parameters of the weight that were found for the whole update (the exponent of `adaptive`).
        coefficients: those of this update.
        value_targets: R̂ for the critic whose values the batch holds; None without one.
    """

    advantages: Float[Tensor, "N T"]
    totals: Totals
    solved: dict[str, Float[Tensor, ""]] = field(default_factory=dict)
    coefficients: LossCoefficients = CONSTANT_COEFFICIENTS
    value_targets: Float[Tensor, "N T"] | None = None

    def rows(self, index: Int[Tensor, " n"] | slice) -> UpdateContext:
        """The context of the micro-batch `batch.rows(index)`."""
        targets = None if self.value_targets is None else self.value_targets[index]
        return replace(self, advantages=self.advantages[index], value_targets=targets)


@dataclass(frozen=True, eq=False)
class LossOutput:
    """The loss of an update or a micro-batch, with its terms and metrics.

    Attributes:
        loss: to minimise, with gradient: policy_loss + kl_loss, and the trust region's term where there is one.
        policy_loss: −agg(surrogate).
        kl_loss: the KL term of the loss placements, β included; 0 for the others.
        token_stats: the per-token quantities behind the metrics.
    """

    loss: Float[Tensor, ""]
    policy_loss: Float[Tensor, ""]
    kl_loss: Float[Tensor, ""]
    token_stats: TokenStats

    @cached_property
    def metrics(self) -> dict[str, float]:
        """Numbers over the rows given (see `klab.harness.objective.metrics.update_metrics`), computed on first use."""
        return update_metrics(self.token_stats, loss=self.loss, policy_loss=self.policy_loss, kl_loss=self.kl_loss)


@torch.no_grad()
def update_context(
    objective: Objective,
    batch: TokenBatch,
    coefficients: LossCoefficients = CONSTANT_COEFFICIENTS,
    groups: Groups | None = None,
    phi: Float[Tensor, "N T"] | None = None,
) -> UpdateContext:
    """Advantages, denominators, solved parameters and a critic's targets of a whole update.

    Reads the current policy (`logp`, `logits`) only for `kl_at: current`, estimators on logits and the weight
    `adaptive`.

    Args:
        objective: the point on the axes.
        batch: the whole update.
        coefficients: those of this update.
        groups: the trajectories by prompt, where they are known; else they are found from `batch.groups`.
        phi: `detached_kl` of the whole update, where it is known; else it is computed.
    """
    functions = axis_functions(objective)
    mask, dtype = batch.mask, batch.logp.dtype
    phi = _detached_kl(functions, batch) if phi is None else phi
    rewards = batch.rewards.to(dtype)
    token_rewards = torch.where(last_token_mask(mask), rewards[:, None], 0.0)
    if functions.placement.reward is not None and phi is not None:
        token_rewards = masked(token_rewards - coefficients.kl * functions.placement.reward(phi, mask), mask)
    returns = Returns(
        returns=suffix_sum(token_rewards),
        token_rewards=token_rewards,
        rewards=rewards,
        mask=mask,
        groups=batch.grouping() if groups is None else groups,
        values=None if batch.values is None else masked(batch.values.to(dtype), mask),
    )
    inputs = {name: value.to(dtype) for name, value in _inputs(batch, functions.advantage_inputs).items()}
    advantages = masked(functions.advantage(returns, **inputs), mask)
    if functions.placement.advantage is not None and phi is not None:
        advantages = masked(advantages - coefficients.kl * functions.placement.advantage(phi, mask), mask)
    totals = Totals(mask.shape[0], batch.loss_mask.sum(), batch.max_new_tokens)
    solved = {} if functions.solver is None else functions.solver(_log_rho(functions, batch)[1], batch.loss_mask)
    targets = None if returns.values is None else functions.value_targets(returns)
    return UpdateContext(advantages, totals, solved, coefficients, targets)


@torch.no_grad()
def detached_kl(objective: Objective, batch: TokenBatch) -> Float[Tensor, "N T"] | None:
    """φ for the placements in the reward and the advantage, of some rows of an update; None where there is neither."""
    return _detached_kl(axis_functions(objective), batch)


def loss_terms(
    objective: Objective, batch: TokenBatch, context: UpdateContext
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """The two terms of the loss, −agg(surrogate) and the KL term, with gradient.

    A pure function of tensors whose control flow does not depend on their values: it works under `torch.func.grad` and
    `vmap`, as do `update_context` and `objective_loss` (with `TokenBatch.n_groups` where the groups themselves are
    mapped).
    """
    return _terms(axis_functions(objective), batch, context)[:2]


def objective_loss(objective: Objective, batch: TokenBatch, context: UpdateContext | None = None) -> LossOutput:
    """The loss of an update.

    Args:
        objective: the point on the axes.
        batch: the update's trajectories, or a micro-batch of them.
        context: for a micro-batch, its rows of the whole update's `update_context`; the losses of the micro-batches
            then add up to that of the whole, and so do their gradients. Without it the batch is the whole update.

    Raises:
        UserError: for a custom value that cannot be imported or called.
        ValueError: when the batch lacks what the objective needs (logits, greedy rewards).
    """
    if context is None:
        context = update_context(objective, batch)
    functions = axis_functions(objective)
    policy_loss, kl_loss, token_stats = _terms(functions, batch, context)
    loss = policy_loss + kl_loss
    if context.coefficients.trust:
        loss = loss + context.coefficients.trust * _trust_region(functions, batch, context)
    return LossOutput(loss, policy_loss, kl_loss, token_stats)


def _trust_region(functions: AxisFunctions, batch: TokenBatch, context: UpdateContext) -> Float[Tensor, ""]:
    """agg(e^λ − 1 − λ), an estimate of KL(π_old‖π)."""
    log_ratio, _ = _log_rho(functions, batch)
    estimate: Tensor = functions.aggregation(behaviour_kl(log_ratio), batch.loss_mask, context.totals)
    return estimate


def _terms(
    functions: AxisFunctions, batch: TokenBatch, context: UpdateContext
) -> tuple[Float[Tensor, ""], Float[Tensor, ""], TokenStats]:
    mask, advantages = batch.loss_mask, context.advantages
    log_ratio, log_rho = _log_rho(functions, batch)
    kappa = masked(batch.logp - batch.logp_reference, mask)
    rho = log_rho.detach().exp()
    weight = functions.weight(rho, advantages, **context.solved).detach()
    factor = weight if batch.correction is None else zero_preserving_product(weight, batch.correction.detach())
    logp = kappa if functions.placement.log_ratio_surrogate else masked(batch.logp, mask)
    surrogate = masked(zero_preserving_product(factor, advantages) * functions.path(logp, log_rho), mask)
    policy_loss = -functions.aggregation(surrogate, mask, context.totals)
    if functions.placement.loss is None:
        kl_loss = torch.zeros_like(policy_loss)
    else:
        phi = masked(functions.placement.loss(_kl(functions, batch, kappa), log_rho), mask)
        kl_loss = context.coefficients.kl * functions.aggregation(phi, mask, context.totals)
    token_stats = TokenStats(log_ratio.detach(), kappa.detach(), rho, weight, advantages, mask, batch.groups)
    return policy_loss, kl_loss, token_stats


def _log_rho(functions: AxisFunctions, batch: TokenBatch) -> tuple[Float[Tensor, "N T"], Float[Tensor, "N T"]]:
    """λ and log ρ, 0 off the tokens of the loss."""
    mask = batch.loss_mask
    log_ratio = masked(batch.logp - batch.logp_behaviour, mask)
    return log_ratio, masked(functions.ratio(log_ratio, mask), mask)


def _detached_kl(functions: AxisFunctions, batch: TokenBatch) -> Float[Tensor, "N T"] | None:
    """φ for the placements in the reward and the advantage; None where there is neither."""
    if functions.placement.reward is None and functions.placement.advantage is None:
        return None
    policy = batch.logp if functions.placement.kl_at == "current" else batch.logp_behaviour
    return _kl(functions, batch, masked(policy - batch.logp_reference, batch.mask)).detach()


def _kl(functions: AxisFunctions, batch: TokenBatch, kappa: Float[Tensor, "N T"]) -> Float[Tensor, "N T"]:
    """φ at own tokens, 0 elsewhere."""
    inside = batch.mask[..., None]
    logits = {name: masked(value, inside) for name, value in _inputs(batch, functions.estimator_inputs).items()}
    return masked(functions.estimator(kappa, **logits), batch.mask)


def _inputs(batch: TokenBatch, names: frozenset[str]) -> dict[str, Tensor]:
    """The optional fields of the batch that an axis value asks for.

    Raises:
        ValueError: where the batch has none.
    """
    found = {name: getattr(batch, name) for name in sorted(names)}
    for name, value in found.items():
        if value is None:
            raise ValueError(f"this objective needs {name}, which the batch does not have")
    return found
