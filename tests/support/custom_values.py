"""Axis values as a user would write them."""

from __future__ import annotations

import torch
from torch import Tensor

from klab.harness.objective import Placement, Returns, Totals

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
