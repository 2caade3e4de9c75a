"""Axis values as a user would write them."""

from __future__ import annotations

import torch
from torch import Tensor

from klab.harness.objective import Groups, Placement, Returns, Totals
from klab.harness.objective.groups import mean_and_std

NOT_A_FUNCTION = 3


def quartic(log_ratio: Tensor, *, strength: float = 1.0) -> Tensor:
    return strength * log_ratio**4


def half_loss(*, beta: float) -> Placement:
    return Placement(loss=lambda phi, log_rho: beta * phi / 2)


def half_token(log_ratio: Tensor, mask: Tensor) -> Tensor:
    return log_ratio / 2


def soft(ratio: Tensor, advantage: Tensor, *, tau: float) -> Tensor:
    return torch.tanh(ratio / tau) * tau


def clipped_return(returns: Returns, limit: float = 1.0) -> Tensor:
    return returns.returns.clamp(-limit, limit)


def token_sum(terms: Tensor, mask: Tensor, totals: Totals) -> Tensor:
    return terms.sum() / totals.tokens


def both(logp: Tensor, log_rho: Tensor) -> Tensor:
    return (logp + log_rho) / 2


def anything(ratio: Tensor, advantage: Tensor, **settings: float) -> Tensor:
    return ratio * settings.get("scale", 1.0)


def whole_vocabulary(log_ratio: Tensor, logits: Tensor, logits_reference: Tensor) -> Tensor:
    here, there = logits.log_softmax(-1), logits_reference.log_softmax(-1)
    return (here.exp() * (here - there)).sum(-1)


def against_greedy(returns: Returns, greedy_rewards: Tensor) -> Tensor:
    return returns.returns - greedy_rewards[:, None]


def dppo(ratio: Tensor, advantage: Tensor, logp: Tensor, logp_behaviour: Tensor, width: float = 0.15) -> Tensor:
    moved = logp.exp() - logp_behaviour.exp()
    kept = torch.where(advantage > 0, moved <= width, moved >= -width)
    return torch.where(kept, ratio.clamp(max=20.0), 0.0)


def gdpo(returns: Returns, reward_terms: Tensor, term_weights: Tensor, groups: Groups, mask: Tensor) -> Tensor:
    known = ~reward_terms.isnan() & mask.any(1, keepdim=True)
    mean, spread = mean_and_std(groups.to_groups(reward_terms.nan_to_num()), groups.to_groups(known), "population")
    mean, spread = groups.to_rows(mean), groups.to_rows(spread)
    centred = torch.where(known, reward_terms.nan_to_num() - mean, 0.0)
    total = (term_weights * torch.where(spread == 0, 0.0, centred / (spread + 1e-6))).sum(1, keepdim=True)
    total = total.expand_as(returns.returns)
    middle, width = mean_and_std(total.reshape(1, -1, 1), mask.reshape(1, -1, 1), "sample")
    return (total - middle) * torch.rsqrt(width.square() + 1e-8)


def middle_ratio(log_rho: Tensor, mask: Tensor, *, share: float) -> dict[str, Tensor]:
    return {"middle": log_rho[mask].quantile(share).exp()}


def above_the_middle(ratio: Tensor, advantage: Tensor, *, middle: Tensor, strength: float) -> Tensor:
    return torch.where(ratio > middle, strength, 1.0)


above_the_middle.solver = middle_ratio  # type: ignore[attr-defined]


def everything(
    ratio: Tensor,
    advantage: Tensor,
    *,
    logp: Tensor,
    logp_behaviour: Tensor,
    logp_reference: Tensor,
    log_ratio: Tensor,
    mask: Tensor,
    rewards: Tensor,
    reward_terms: Tensor,
    term_weights: Tensor,
    lengths: Tensor,
    positions: Tensor,
    entropy: Tensor,
    greedy_rewards: Tensor,
    update: int,
) -> Tensor:
    """Asks for all that a weight may ask for without a critic, and says in its numbers what it was given."""
    total = logp + logp_behaviour + logp_reference + log_ratio + mask + lengths + positions + entropy + update
    by_row = rewards + greedy_rewards + (reward_terms.nan_to_num() * term_weights).sum(1)
    return (total + by_row[:, None]).detach()
