"""The aggregation axis: from per-token terms to one number, with the denominators of the whole update.

Every function takes the terms of some rows of the update, 0 off the own tokens, their mask, and the totals of the whole
update; the results of the micro-batches of an update therefore add up to that of the whole.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from jaxtyping import Bool, Float, Int
from torch import Tensor

from klab.harness.objective.groups import Groups
from klab.harness.objective.masking import lengths
from klab.harness.objective.registry import Registry

AGGREGATIONS = Registry("aggregation")


@dataclass(frozen=True)
class Totals:
    """Sizes of the whole update.

    Attributes:
        trajectories: N, including trajectories without own tokens.
        tokens: number of own tokens.
        max_new_tokens: the completion budget.
        prompts: number of groups that have own tokens.
        prompt_tokens: own tokens of the group of each trajectory of the rows at hand.
    """

    trajectories: int
    tokens: Int[Tensor, ""]
    max_new_tokens: int
    prompts: Int[Tensor, ""]
    prompt_tokens: Int[Tensor, "n 1"]

    @classmethod
    def of(cls, mask: Bool[Tensor, "N T"], groups: Groups, max_new_tokens: int) -> Totals:
        """Those of an update whose own tokens are `mask`."""
        by_group = groups.to_groups(lengths(mask)).sum(1)
        return cls(mask.shape[0], mask.sum(), max_new_tokens, (by_group > 0).sum(), groups.to_rows(by_group))

    def rows(self, index: Int[Tensor, " n"] | slice) -> Totals:
        """The same totals, for some rows of the update."""
        return replace(self, prompt_tokens=self.prompt_tokens[index])


@AGGREGATIONS.register("sequence_mean")
def sequence_mean(terms: Float[Tensor, "n T"], mask: Bool[Tensor, "n T"], totals: Totals) -> Float[Tensor, ""]:
    """Mean over trajectories of the mean over own tokens (GRPO, Shao et al. 2024)."""
    return (terms / lengths(mask).clamp(min=1)).sum() / totals.trajectories


@AGGREGATIONS.register("token_mean")
def token_mean(terms: Float[Tensor, "n T"], mask: Bool[Tensor, "n T"], totals: Totals) -> Float[Tensor, ""]:
    """Mean over the update's own tokens (DAPO, Yu et al. 2025)."""
    return terms.sum() / totals.tokens.clamp(min=1)


@AGGREGATIONS.register("constant")
def constant_length(terms: Float[Tensor, "n T"], mask: Bool[Tensor, "n T"], totals: Totals) -> Float[Tensor, ""]:
    """Sum over own tokens divided by N·max_new_tokens (Dr. GRPO, Liu et al. 2025b)."""
    return terms.sum() / (totals.trajectories * totals.max_new_tokens)


@AGGREGATIONS.register("sequence_sum")
def sequence_sum(terms: Float[Tensor, "n T"], mask: Bool[Tensor, "n T"], totals: Totals) -> Float[Tensor, ""]:
    """Mean over trajectories of the sum over own tokens (RLOO, Ahmadian et al. 2024)."""
    return terms.sum() / totals.trajectories


@AGGREGATIONS.register("prompt_mean")
def prompt_mean(terms: Float[Tensor, "n T"], mask: Bool[Tensor, "n T"], totals: Totals) -> Float[Tensor, ""]:
    """Mean over prompts of the mean over the own tokens of the prompt's trajectories (ScaleRL, Khatri et al. 2025)."""
    return (terms / totals.prompt_tokens.clamp(min=1)).sum() / totals.prompts.clamp(min=1)
