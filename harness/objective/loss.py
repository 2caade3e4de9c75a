"""The composition of the axes: KL samples, returns, advantage, ratio, weight, surrogate, loss.

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
from torch import Tensor

from klab.grid import Objective
from klab.harness.objective.advantage import ADVANTAGES, Returns, value_targets
from klab.harness.objective.aggregate import AGGREGATIONS, Totals
from klab.harness.objective.batch import TokenBatch
from klab.harness.objective.groups import Groups
from klab.harness.objective.kl import ESTIMATORS, FROM_LOGITS, behaviour_kl
from klab.harness.objective.masking import last_token_mask, masked, suffix_sum
from klab.harness.objective.metrics import TokenStats, update_metrics
from klab.harness.objective.placement import PLACEMENTS, Placement
from klab.harness.objective.ratio import RATIOS
from klab.harness.objective.registry import Registry
from klab.harness.objective.weight import SOLVERS, WEIGHTS

PATHS = Registry("path", "logp", "log_rho")


@PATHS.register("score")
def score_path(logp: Tensor, log_rho: Tensor) -> Tensor:
    """w·A·∇ℓ."""
    return logp


@PATHS.register("ratio")
def ratio_path(logp: Tensor, log_rho: Tensor) -> Tensor:
    """w·A·∇log ρ, through every token that enters ρ (GSPO)."""
    return log_rho


@dataclass(frozen=True)
class AxisFunctions:
    """The functions that an objective chooses, with their parameters filled in."""

    estimator: Callable[..., Tensor]
    from_logits: bool
    placement: Placement
    ratio: Callable[..., Tensor]
    weight: Callable[..., Tensor]
    solver: Callable[..., dict[str, Tensor]] | None
    advantage: Callable[..., Tensor]
    value_targets: Callable[[Returns], Tensor]
    aggregation: Callable[..., Tensor]
    path: Callable[..., Tensor]


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
        from_logits=objective.estimator == FROM_LOGITS,
        placement=PLACEMENTS.bound(objective.placement, objective.arguments("placement"))(),
        ratio=RATIOS.bound(objective.ratio, objective.arguments("ratio")),
        weight=WEIGHTS.bound(objective.weight, {} if solver else settings),
        solver=(lambda log_rho, mask: solver(log_rho, mask, **settings)) if solver else None,
        advantage=ADVANTAGES.bound(objective.advantage, objective.arguments("advantage")),
        value_targets=_value_targets(objective),
        aggregation=AGGREGATIONS.bound(objective.aggregation, objective.arguments("aggregation")),
        # without a ratio log ρ would be 0 and carry no gradient
        path=score_path if objective.ratio == "none" else PATHS.bound(objective.path, objective.arguments("path")),
    )


def _value_targets(objective: Objective) -> Callable[[Returns], Tensor]:
    """R̂ with the γ and λ of `gae`; for advantages of the user's own, the plain returns."""
    gamma, lam = (objective.gamma, objective.lam) if objective.advantage == "gae" else (1.0, 1.0)
    return lambda returns: value_targets(returns, gamma, lam)


@dataclass(frozen=True)
class LossCoefficients:
    """LossCoefficients that move during training and are no part of the objective.

    Attributes:
        kl: multiplies whatever the placement charges or adds to the loss, and so its β.
        trust: of the trust region, trust·agg(e^λ − 1 − λ) in the loss.
    """

    kl: float = 1.0
    trust: float = 0.0


CONSTANT_COEFFICIENTS = LossCoefficients()


@dataclass(frozen=True)
class UpdateContext:
    """What belongs to the whole update and not to a micro-batch; without gradient.

    Attributes:
        advantages: A `[N, T]`, 0 off the own tokens.
        totals: the denominators.
        solved: parameters of the weight that were found for the whole update (the exponent of `adaptive`).
        coefficients: those of this update.
        value_targets: R̂ `[N, T]` for the critic whose values the batch holds; None without one.
    """

    advantages: Tensor
    totals: Totals
    solved: dict[str, Tensor] = field(default_factory=dict)
    coefficients: LossCoefficients = CONSTANT_COEFFICIENTS
    value_targets: Tensor | None = None

    def rows(self, index: Tensor | slice) -> UpdateContext:
        """The context of the micro-batch `batch.rows(index)`."""
        targets = None if self.value_targets is None else self.value_targets[index]
        return replace(self, advantages=self.advantages[index], value_targets=targets)


@dataclass(frozen=True, eq=False)
class LossOutput:
    """The loss of an update or a micro-batch: what to minimise, its terms, and what was measured.

    Attributes:
        loss: scalar with gradient, policy_loss + kl_loss, and the trust region's term where there is one.
        policy_loss: −agg(surrogate).
        kl_loss: the KL term of the loss placements, β included; 0 for the others.
        token_stats: the per-token quantities behind the metrics.
    """

    loss: Tensor
    policy_loss: Tensor
    kl_loss: Tensor
    token_stats: TokenStats

    @cached_property
    def metrics(self) -> dict[str, float]:
        """Plain numbers over the rows given (see `klab.harness.objective.metrics`), computed when first read."""
        return update_metrics(self.token_stats, loss=self.loss, policy_loss=self.policy_loss, kl_loss=self.kl_loss)


@torch.no_grad()
def update_context(
    objective: Objective,
    batch: TokenBatch,
    coefficients: LossCoefficients = CONSTANT_COEFFICIENTS,
    groups: Groups | None = None,
) -> UpdateContext:
    """Advantages, denominators, solved parameters and a critic's targets of a whole update.

    Reads the current policy (`logp`, `logits`) only for `kl_at: current`, the estimator `full` and the weight
    `adaptive`.

    Args:
        groups: the trajectories by prompt, where they are known; else they are found from `batch.groups`.
    """
    chosen = axis_functions(objective)
    mask, dtype = batch.mask, batch.logp.dtype
    phi = _detached_kl(chosen, batch)
    rewards = batch.rewards.to(dtype)
    token_rewards = torch.where(last_token_mask(mask), rewards[:, None], 0.0)
    if chosen.placement.reward is not None and phi is not None:
        token_rewards = masked(token_rewards - coefficients.kl * chosen.placement.reward(phi, mask), mask)
    returns = Returns(
        returns=suffix_sum(token_rewards),
        token_rewards=token_rewards,
        rewards=rewards,
        mask=mask,
        groups=batch.grouping() if groups is None else groups,
        greedy_rewards=None if batch.greedy_rewards is None else batch.greedy_rewards.to(dtype),
        values=None if batch.values is None else masked(batch.values.to(dtype), mask),
    )
    advantages = masked(chosen.advantage(returns), mask)
    if chosen.placement.advantage is not None and phi is not None:
        advantages = masked(advantages - coefficients.kl * chosen.placement.advantage(phi, mask), mask)
    totals = Totals(mask.shape[0], batch.loss_mask.sum(), batch.max_new_tokens)
    solved = {} if chosen.solver is None else chosen.solver(_log_rho(chosen, batch)[1], batch.loss_mask)
    targets = None if returns.values is None else chosen.value_targets(returns)
    return UpdateContext(advantages, totals, solved, coefficients, targets)


def loss_terms(objective: Objective, batch: TokenBatch, context: UpdateContext) -> tuple[Tensor, Tensor]:
    """The objective's two terms of the loss, −agg(surrogate) and the KL term, as scalars with gradient.

    A pure function of tensors without control flow that depends on their values: it works under `torch.func.grad` and
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
    chosen = axis_functions(objective)
    policy_loss, kl_loss, token_stats = _terms(chosen, batch, context)
    loss = policy_loss + kl_loss
    if context.coefficients.trust:
        loss = loss + context.coefficients.trust * _trust_region(chosen, batch, context)
    return LossOutput(loss, policy_loss, kl_loss, token_stats)


def _trust_region(chosen: AxisFunctions, batch: TokenBatch, context: UpdateContext) -> Tensor:
    """agg(e^λ − 1 − λ), an estimate of KL(π_old‖π)."""
    log_ratio, _ = _log_rho(chosen, batch)
    estimate: Tensor = chosen.aggregation(behaviour_kl(log_ratio), batch.loss_mask, context.totals)
    return estimate


def _terms(chosen: AxisFunctions, batch: TokenBatch, context: UpdateContext) -> tuple[Tensor, Tensor, TokenStats]:
    mask, advantages = batch.loss_mask, context.advantages
    log_ratio, log_rho = _log_rho(chosen, batch)
    kappa = masked(batch.logp - batch.logp_reference, mask)
    rho = log_rho.detach().exp()
    weight = chosen.weight(rho, advantages, **context.solved).detach()
    factor = weight if batch.correction is None else weight * batch.correction.detach()
    follows = kappa if chosen.placement.log_ratio_surrogate else masked(batch.logp, mask)
    terms = masked(factor * advantages * chosen.path(follows, log_rho), mask)
    policy_loss = -chosen.aggregation(terms, mask, context.totals)
    if chosen.placement.loss is None:
        kl_loss = torch.zeros_like(policy_loss)
    else:
        phi = masked(chosen.placement.loss(_kl(chosen, batch, kappa), log_rho), mask)
        kl_loss = context.coefficients.kl * chosen.aggregation(phi, mask, context.totals)
    token_stats = TokenStats(log_ratio.detach(), kappa.detach(), rho, weight, advantages, mask, batch.groups)
    return policy_loss, kl_loss, token_stats


def _log_rho(chosen: AxisFunctions, batch: TokenBatch) -> tuple[Tensor, Tensor]:
    """λ and log ρ, 0 off the tokens of the loss."""
    mask = batch.loss_mask
    log_ratio = masked(batch.logp - batch.logp_behaviour, mask)
    return log_ratio, masked(chosen.ratio(log_ratio, mask), mask)


def _detached_kl(chosen: AxisFunctions, batch: TokenBatch) -> Tensor | None:
    """φ for the placements in the reward and the advantage; None when there is none."""
    if chosen.placement.reward is None and chosen.placement.advantage is None:
        return None
    policy = batch.logp if chosen.placement.kl_at == "current" else batch.logp_behaviour
    return _kl(chosen, batch, masked(policy - batch.logp_reference, batch.mask)).detach()


def _kl(chosen: AxisFunctions, batch: TokenBatch, kappa: Tensor) -> Tensor:
    if not chosen.from_logits:
        return masked(chosen.estimator(kappa), batch.mask)
    if batch.logits is None or batch.logits_reference is None:
        raise ValueError("the estimator 'full' needs logits and logits_reference")
    inside = batch.mask[..., None]
    return masked(chosen.estimator(masked(batch.logits, inside), masked(batch.logits_reference, inside)), batch.mask)
