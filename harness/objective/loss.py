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

from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from klab.grid import Objective
from klab.harness.objective.advantage import Returns
from klab.harness.objective.aggregate import Totals
from klab.harness.objective.batch import TokenBatch
from klab.harness.objective.functions import AxisFunctions, axis_functions
from klab.harness.objective.groups import Groups
from klab.harness.objective.inputs import View
from klab.harness.objective.kl import behaviour_kl
from klab.harness.objective.masking import last_token_mask, masked, masked_quantile, suffix_sum
from klab.harness.objective.metrics import TokenStats, update_metrics
from klab.harness.objective.weight import zero_preserving_product


@dataclass(frozen=True)
class LossCoefficients:
    """Coefficients that change during training and are therefore no part of the objective.

    Attributes:
        kl: multiplies whatever the placement penalises or adds to the loss, and so its β.
        trust: coefficient of the trust region, trust·agg(e^λ − 1 − λ) in the loss.
        entropy: c of the entropy bonus, c·agg(H); None: the objective's own.
        entropy_acts: whether the bonus is in the loss of this update.
    """

    kl: float = 1.0
    trust: float = 0.0
    entropy: float | None = None
    entropy_acts: bool = True

    def entropy_bonus(self, constant: float) -> float:
        """What agg(H) is multiplied by in this update.

        Args:
            constant: the objective's own c.
        """
        if not self.entropy_acts:
            return 0.0
        return constant if self.entropy is None else self.entropy


CONSTANT_COEFFICIENTS = LossCoefficients()

SAME_ENTROPY = 1e-6
"""Entropies within this share of a bound count as equal to it: tokens of one state have one entropy, and rounding,
which depends on how an update is cut up, shall not choose among them."""


@dataclass(frozen=True)
class UpdateContext:
    """What is computed once for a whole update and shared by its micro-batches; without gradient.

    Attributes:
        advantages: A, 0 off the own tokens.
        totals: the denominators of the aggregation.
        solved: parameters of the weight that were found for the whole update (the exponent of `adaptive`): scalars, or
            tensors with a row for each trajectory.
        coefficients: those of this update.
        value_targets: R̂ for the critic whose values the batch holds; None without one.
        update: number of the update, from 0.
        high_entropy: the tokens whose surrogate is in the loss, with `entropy_share`; None: all.
    """

    advantages: Float[Tensor, "N T"]
    totals: Totals
    solved: dict[str, Tensor] = field(default_factory=dict)
    coefficients: LossCoefficients = CONSTANT_COEFFICIENTS
    value_targets: Float[Tensor, "N T"] | None = None
    update: int = 0
    high_entropy: Bool[Tensor, "N T"] | None = None

    def rows(self, index: Int[Tensor, " n"] | slice) -> UpdateContext:
        """The context of the micro-batch `batch.rows(index)`."""
        targets = None if self.value_targets is None else self.value_targets[index]
        return replace(
            self,
            advantages=self.advantages[index],
            totals=self.totals.rows(index),
            solved={name: value[index] if value.dim() else value for name, value in self.solved.items()},
            value_targets=targets,
            high_entropy=None if self.high_entropy is None else self.high_entropy[index],
        )


@dataclass(frozen=True, eq=False)
class LossOutput:
    """The loss of an update or a micro-batch, with its terms and metrics.

    Attributes:
        loss: to minimise, with gradient: policy_loss + kl_loss, and the terms of the trust region and of the entropy
            where there are any.
        policy_loss: −agg(surrogate), with the penalty of a weight that has one.
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
    update: int = 0,
) -> UpdateContext:
    """Advantages, denominators, solved parameters and a critic's targets of a whole update.

    Reads the current policy (`logp`, `logits`, `entropy`) only for `kl_at: current`, estimators on logits, weights with
    a solver, `entropy_share` and functions that ask for it.

    Args:
        objective: the point on the axes.
        batch: the whole update.
        coefficients: those of this update.
        groups: the trajectories by prompt, where they are known; else they are found from `batch.groups`.
        phi: `detached_kl` of the whole update, where it is known; else it is computed.
        update: number of the update, for functions that ask for it.
    """
    functions = axis_functions(objective)
    mask, dtype = batch.mask, batch.logp.dtype
    groups = batch.grouping() if groups is None else groups
    view = View(batch, mask, update, groups=groups)
    phi = _detached_kl(functions, batch, view) if phi is None else phi
    phi = None if coefficients.kl == 0.0 else phi  # 0 times an overflow is no number
    rewards = batch.rewards.to(dtype)
    token_rewards = torch.where(last_token_mask(mask), rewards[:, None], 0.0)
    if functions.placement.reward is not None and phi is not None:
        token_rewards = masked(token_rewards - coefficients.kl * functions.placement.reward(phi, mask), mask)
    returns = Returns(
        returns=suffix_sum(token_rewards),
        token_rewards=token_rewards,
        rewards=rewards,
        mask=mask,
        groups=groups,
        values=None if batch.values is None else masked(batch.values.to(dtype), mask),
    )
    advantages = masked(functions.advantage(returns, **view.inputs(functions.asks["advantage"])), mask)
    if functions.placement.advantage is not None and phi is not None:
        advantages = masked(advantages - coefficients.kl * functions.placement.advantage(phi, mask), mask)
    context = UpdateContext(
        advantages,
        Totals.of(batch.loss_mask, groups, batch.max_new_tokens),
        coefficients=coefficients,
        value_targets=None if returns.values is None else functions.value_targets(returns),
        update=update,
        high_entropy=_high_entropy(functions, batch),
    )
    if functions.solver is None:
        return context
    view = replace(view, mask=batch.loss_mask, advantage=advantages)
    log_rho = _log_rho(functions, batch, view)[1]
    asked = replace(view, ratio=log_rho.exp()).inputs(functions.asks["solver"])
    return replace(context, solved=functions.solver(log_rho, batch.loss_mask, **asked))


@torch.no_grad()
def detached_kl(objective: Objective, batch: TokenBatch) -> Float[Tensor, "N T"] | None:
    """φ for the placements in the reward and the advantage, of some rows of an update; None where there is neither."""
    return _detached_kl(axis_functions(objective), batch, View(batch, batch.mask))


def loss_terms(
    objective: Objective, batch: TokenBatch, context: UpdateContext
) -> tuple[Float[Tensor, ""], Float[Tensor, ""], Float[Tensor, ""]]:
    """The terms of the loss, −agg(surrogate), the KL term and −c·agg(H), with gradient.

    A pure function of tensors whose control flow does not depend on their values: it works under `torch.func.grad` and
    `vmap`, as do `update_context` and `objective_loss` (with `TokenBatch.n_groups` where the groups themselves are
    mapped).
    """
    functions = axis_functions(objective)
    policy_loss, kl_loss, _ = _terms(functions, batch, context)
    return policy_loss, kl_loss, _entropy_loss(functions, batch, context)


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
    if context.coefficients.entropy_bonus(functions.entropy_bonus):
        loss = loss + _entropy_loss(functions, batch, context)
    return LossOutput(loss, policy_loss, kl_loss, token_stats)


def _trust_region(functions: AxisFunctions, batch: TokenBatch, context: UpdateContext) -> Float[Tensor, ""]:
    """agg(e^λ − 1 − λ), an estimate of KL(π_old‖π)."""
    log_ratio = masked(batch.logp - batch.logp_behaviour, batch.loss_mask)
    estimate: Tensor = functions.aggregation(behaviour_kl(log_ratio), batch.loss_mask, context.totals)
    return estimate


def _entropy_loss(functions: AxisFunctions, batch: TokenBatch, context: UpdateContext) -> Float[Tensor, ""]:
    """−c·agg(H); 0 without an entropy bonus."""
    bonus = context.coefficients.entropy_bonus(functions.entropy_bonus)
    if not bonus:
        return torch.zeros((), dtype=batch.logp.dtype, device=batch.logp.device)
    mean: Tensor = functions.aggregation(_entropy(batch, batch.loss_mask), batch.loss_mask, context.totals)
    return -bonus * mean


def _high_entropy(functions: AxisFunctions, batch: TokenBatch) -> Bool[Tensor, "N T"] | None:
    """The tokens of the loss whose entropy is at least the quantile 1 − entropy_share over the update's (Wang et al.
    2025; TRL)."""
    if functions.entropy_share >= 1.0:
        return None
    mask = batch.loss_mask
    entropy = _entropy(batch, mask)
    bound = masked_quantile(entropy.flatten(), mask.flatten(), 1.0 - functions.entropy_share)
    return mask & (entropy >= bound * (1.0 - SAME_ENTROPY))


def _entropy(batch: TokenBatch, mask: Bool[Tensor, "N T"]) -> Float[Tensor, "N T"]:
    found = batch.token_entropy(mask)
    if found is None:
        raise ValueError("this objective needs entropy, which the batch does not have")
    return found


def _terms(
    functions: AxisFunctions, batch: TokenBatch, context: UpdateContext
) -> tuple[Float[Tensor, ""], Float[Tensor, ""], TokenStats]:
    mask, advantages = batch.loss_mask, context.advantages
    view = View(batch, mask, context.update, advantages)
    log_ratio, log_rho = _log_rho(functions, batch, view)
    kappa = masked(batch.logp - batch.logp_reference, mask)
    rho = log_rho.detach().exp()
    asked = view.inputs(functions.asks["weight"])
    weight = functions.weight(rho, advantages, **asked, **context.solved).detach()
    factor = weight if batch.correction is None else zero_preserving_product(weight, batch.correction.detach())
    logp = kappa if functions.placement.log_ratio_surrogate else masked(batch.logp, mask)
    surrogate = masked(zero_preserving_product(factor, advantages) * functions.path(logp, log_rho), mask)
    if functions.penalty is not None:
        penalty = functions.penalty(log_ratio, **context.solved)
        corrected = penalty if batch.correction is None else zero_preserving_product(batch.correction.detach(), penalty)
        surrogate = surrogate - masked(corrected, mask)
    if context.high_entropy is not None:
        surrogate = torch.where(context.high_entropy, surrogate, 0.0)
    policy_loss = -functions.aggregation(surrogate, mask, context.totals)
    if functions.placement.loss is None or context.coefficients.kl == 0.0:
        kl_loss = torch.zeros_like(policy_loss)
    else:
        phi = masked(functions.placement.loss(_kl(functions, batch, view, kappa), log_rho), mask)
        kl_loss = context.coefficients.kl * functions.aggregation(phi, mask, context.totals)
    token_stats = TokenStats(log_ratio.detach(), kappa.detach(), rho, weight, advantages, mask, batch.groups)
    return policy_loss, kl_loss, token_stats


def _log_rho(
    functions: AxisFunctions, batch: TokenBatch, view: View
) -> tuple[Float[Tensor, "N T"], Float[Tensor, "N T"]]:
    """λ and log ρ, 0 off the tokens of the loss."""
    mask = batch.loss_mask
    log_ratio = masked(batch.logp - batch.logp_behaviour, mask)
    return log_ratio, masked(functions.ratio(log_ratio, mask, **view.inputs(functions.asks["ratio"])), mask)


def _detached_kl(functions: AxisFunctions, batch: TokenBatch, view: View) -> Float[Tensor, "N T"] | None:
    """φ for the placements in the reward and the advantage; None where there is neither."""
    if functions.placement.reward is None and functions.placement.advantage is None:
        return None
    policy = batch.logp if functions.placement.kl_at == "current" else batch.logp_behaviour
    return _kl(functions, batch, view, masked(policy - batch.logp_reference, batch.mask)).detach()


def _kl(functions: AxisFunctions, batch: TokenBatch, view: View, kappa: Float[Tensor, "N T"]) -> Float[Tensor, "N T"]:
    """φ at own tokens, 0 elsewhere."""
    asked = replace(view, mask=batch.mask).inputs(functions.asks["estimator"])
    return masked(functions.estimator(kappa, **asked), batch.mask)
