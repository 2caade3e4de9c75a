"""The input of the objective: tokens' log-probabilities under three policies, and the rewards of trajectories."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from klab.harness.objective.groups import Groups
from klab.harness.objective.kl import entropy
from klab.harness.objective.masking import masked


@dataclass(frozen=True, eq=False)
class TokenBatch:
    """N trajectories of one update, padded to T positions.

    Own tokens are those that the policy produced, as against padding and environment tokens. What the tensors hold off
    the own tokens is never read.

    Attributes:
        logp: ℓ, log-probability of each token under the current policy; carries the gradient.
        logp_behaviour: ℓ_old, under the policy that sampled the tokens.
        logp_reference: ℓ_ref, under the reference policy.
        mask: own tokens.
        rewards: R, the task's reward of each trajectory.
        groups: which prompt each trajectory answers.
        max_new_tokens: the completion budget, the denominator of the `constant` aggregation.
        logits: of the current policy, carrying the gradient; for the estimator `full`.
        logits_reference: of the reference policy; for the estimator `full`.
        greedy_rewards: reward of the greedy completion of the same prompt; for `greedy_baseline`.
        values: V, a critic's value of the state before each token; for `gae`, 0 when absent.
        n_groups: number of groups, when `groups` are known to be 0 … n_groups − 1; needed only where `groups` itself is
            mapped by `torch.func.vmap`.
        correction: a constant factor of each token's surrogate: π_old/μ, truncated or masked, where a
            sampler μ other than π_old drew the tokens. As in TRL and verl the KL term of the loss is not multiplied.
        entropy: H, of the current policy at each token, in nats; carries the gradient where the loss has an entropy
            bonus. Where it is absent, `logits` give it.
        reward_terms: the terms of the reward without their weights, NaN where a term has no value; for values that ask
            for them. None: the reward is one term.
        term_weights: the weight of each term in R.
        excluded_from_loss: trajectories whose rewards count in the statistics of the advantage, but none of
            whose tokens enter the loss (DAPO's overlong filtering). They still count in N, as in TRL and verl.

    Raises:
        ValueError: when shapes or types do not fit together.
    """

    logp: Float[Tensor, "N T"]
    logp_behaviour: Float[Tensor, "N T"]
    logp_reference: Float[Tensor, "N T"]
    mask: Bool[Tensor, "N T"]
    rewards: Float[Tensor, " N"]
    groups: Int[Tensor, " N"]
    max_new_tokens: int
    logits: Float[Tensor, "N T V"] | None = None
    logits_reference: Float[Tensor, "N T V"] | None = None
    greedy_rewards: Float[Tensor, " N"] | None = None
    values: Float[Tensor, "N T"] | None = None
    n_groups: int | None = None
    correction: Float[Tensor, "N T"] | None = None
    entropy: Float[Tensor, "N T"] | None = None
    reward_terms: Float[Tensor, "N K"] | None = None
    term_weights: tuple[float, ...] | None = None
    excluded_from_loss: Bool[Tensor, " N"] | None = None

    def __post_init__(self) -> None:
        if self.logp.dim() != 2 or not self.logp.is_floating_point():
            raise ValueError(f"logp must be floating point [N, T], not {self.logp.dtype} {list(self.logp.shape)}")
        n, t = self.logp.shape
        if n == 0 or t == 0:
            raise ValueError(f"a batch needs a trajectory and a position, not [{n}, {t}]")
        for name in ("logp_behaviour", "logp_reference", "values", "correction", "entropy"):
            _expect(name, getattr(self, name), (n, t))
        for name in ("rewards", "greedy_rewards", "excluded_from_loss"):
            _expect(name, getattr(self, name), (n,))
        _expect("mask", self.mask, (n, t))
        if self.mask.dtype != torch.bool:
            raise ValueError(f"mask must be bool, not {self.mask.dtype}")
        _expect("groups", self.groups, (n,))
        if self.groups.is_floating_point() or self.groups.dtype == torch.bool:
            raise ValueError(f"groups must be integers, not {self.groups.dtype}")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, not {self.max_new_tokens}")
        if self.reward_terms is not None:
            _expect("reward_terms", self.reward_terms, (n, len(self.term_weights or ())))
        if self.logits is not None:
            _expect("logits", self.logits, (n, t, self.logits.shape[-1]))
            _expect("logits_reference", self.logits_reference, tuple(self.logits.shape))

    def replace(self, **changes: Any) -> TokenBatch:
        """The same batch with some fields changed."""
        return dataclasses.replace(self, **changes)

    def rows(self, index: Int[Tensor, " n"] | slice) -> TokenBatch:
        """The trajectories of `index` alone: a micro-batch."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return self.replace(**{name: value[index] for name, value in tensors.items()})

    @property
    def loss_mask(self) -> Bool[Tensor, "N T"]:
        """The own tokens that enter the loss."""
        return self.mask if self.excluded_from_loss is None else self.mask & ~self.excluded_from_loss[:, None]

    def token_entropy(self, mask: Bool[Tensor, "N T"]) -> Float[Tensor, "N T"] | None:
        """H at the tokens of `mask`, 0 elsewhere: as given, else from the logits; None where there are neither."""
        if self.entropy is not None:
            return masked(self.entropy.to(self.logp.dtype), mask)
        if self.logits is None:
            return None
        return masked(entropy(masked(self.logits, mask[..., None])), mask)

    def grouping(self) -> Groups:
        """The trajectories by prompt."""
        return Groups.from_labels(self.groups, self.n_groups)


def _expect(name: str, value: Tensor | None, shape: tuple[int, ...]) -> None:
    if value is not None and tuple(value.shape) != shape:
        raise ValueError(f"{name} must have the shape {list(shape)}, not {list(value.shape)}")
