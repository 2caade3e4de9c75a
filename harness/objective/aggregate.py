"""Aggregations: from per-token terms to a number, with the denominators of the whole update.

Every function takes the terms `[N, T]` of some rows of the update, 0 off the own tokens, their mask, and the update's
totals; the results of the micro-batches of an update add up to that of the whole.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from klab.harness.objective.masking import lengths
from klab.harness.objective.registry import Registry

AGGREGATIONS = Registry("aggregation", "terms", "mask", "totals")


@dataclass(frozen=True)
class Totals:
    """Sizes of the whole update.

    Attributes:
        trajectories: N, including trajectories without own tokens.
        tokens: number of own tokens, an integer scalar.
        max_new_tokens: the completion budget.
    """

    trajectories: int
    tokens: Tensor
    max_new_tokens: int


@AGGREGATIONS.register("sequence_mean")
def sequence_mean(terms: Tensor, mask: Tensor, totals: Totals) -> Tensor:
    """Mean over trajectories of the mean over own tokens (GRPO, S1)."""
    return (terms / lengths(mask).clamp(min=1)).sum() / totals.trajectories


@AGGREGATIONS.register("token_mean")
def token_mean(terms: Tensor, mask: Tensor, totals: Totals) -> Tensor:
    """Mean over the update's own tokens (DAPO)."""
    return terms.sum() / totals.tokens.clamp(min=1)


@AGGREGATIONS.register("constant")
def constant_length(terms: Tensor, mask: Tensor, totals: Totals) -> Tensor:
    """Sum over own tokens divided by N·max_new_tokens (Dr. GRPO)."""
    return terms.sum() / (totals.trajectories * totals.max_new_tokens)


@AGGREGATIONS.register("sequence_sum")
def sequence_sum(terms: Tensor, mask: Tensor, totals: Totals) -> Tensor:
    """Mean over trajectories of the sum over own tokens."""
    return terms.sum() / totals.trajectories
