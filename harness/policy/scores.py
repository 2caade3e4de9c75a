"""Log-probabilities of the tokens of rollouts under a policy, with gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from klab.harness.policy.footprint import MAX_LOGITS
from klab.harness.policy.ordered_gather import take_rows
from klab.harness.policy.rollout import Rollout


@dataclass(frozen=True, slots=True)
class ScoreOptions:
    """What to compute; see `token_scores`."""

    temperature: float = 1.0
    logits: bool = False
    entropy: bool = False
    states: bool = False
    plain: bool = False
    entropy_gradient: bool = False


@dataclass(slots=True)
class TokenScores:
    """One cell's trajectories under a policy, N trajectories of at most T tokens; 0 outside the rollout's mask.

    Attributes:
        logp: log-probability of each generated token; carries the gradient where gradients are enabled.
        entropy: entropy in nats of the distribution that each was drawn from; with gradient where it was
            asked for.
        logits: divided by the temperature; carries the gradient.
        states: the final hidden state that predicts each; carries the gradient.
    """

    logp: Float[Tensor, "N T"]
    entropy: Float[Tensor, "N T"] | None = None
    logits: Float[Tensor, "N T vocab_size"] | None = None
    states: Float[Tensor, "N T hidden_size"] | None = None


class Scorer(Protocol):
    """The part of a policy that scores rollouts."""

    cells: int

    def score(self, rollouts: Sequence[Rollout], options: ScoreOptions) -> list[TokenScores]:
        """Score every cell's rollout; see `token_scores`, which checks and fills in the arguments."""
        ...


def max_logits(device: torch.device) -> int:
    """Logits held at once on a device."""
    return MAX_LOGITS.get(device.type, MAX_LOGITS["cuda"])


def token_scores(
    policy: Scorer,
    rollouts: Sequence[Rollout],
    *,
    temperature: float = 1.0,
    logits: bool = False,
    entropy: bool = False,
    states: bool = False,
    plain: bool = False,
    entropy_gradient: bool = False,
) -> list[TokenScores]:
    """Score every cell's rollout under its policy.

    What is computed for a cell depends on that cell alone. Top-p does not enter.

    Args:
        rollouts: one per cell of the policy.
        temperature: divides the logits, as when sampling.
        logits, entropy, states: which of the optional tensors are wanted.
        entropy_gradient: the entropy carries the gradient where gradients are enabled.
        plain: the reference path: every trajectory forwarded in full, nothing shared.

    Raises:
        ValueError: another number of rollouts than the policy has cells.
    """
    if len(rollouts) != policy.cells:
        raise ValueError(f"{len(rollouts)} rollouts for {policy.cells} cells")
    return policy.score(rollouts, ScoreOptions(temperature, logits, entropy, states, plain, entropy_gradient))


def entropy_of(logp: Float[Tensor, "*rows vocab_size"]) -> Float[Tensor, "*rows"]:
    """−Σ_v π(v)·log π(v) in nats, from log-probabilities; its gradient −(1 + log π)·π keeps nothing but those."""
    found: Tensor = _Entropy.apply(logp)  # type: ignore[no-untyped-call]
    return found


class _Entropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logp: Tensor) -> Tensor:
        ctx.save_for_backward(logp)
        return -(logp.exp() * logp).nan_to_num(0.0).sum(-1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (logp,) = ctx.saved_tensors
        slope: Tensor = -logp.exp().mul_(logp + 1)
        return slope.nan_to_num_(0.0).mul_(grad.unsqueeze(-1))


def gather_scores(
    rollout: Rollout,
    logits_index: Int[Tensor, "N T"],
    logits: Float[Tensor, "K vocab_size"],
    states: Float[Tensor, "K hidden_size"] | None,
    options: ScoreOptions,
) -> TokenScores:
    """The scores of a rollout from logits that were computed once for several of its tokens.

    Args:
        logits_index: the row of `logits` that predicts each token.
        logits: float32 or wider.
        states: the hidden states they were computed from; None if they are not wanted.
    """
    tempered = logits if options.temperature == 1.0 else logits / options.temperature
    mask, V = rollout.mask, logits.shape[-1]
    N, T = mask.shape
    logp = tempered.log_softmax(-1)
    chosen = take_rows(logp.view(-1), (logits_index * V + rollout.tokens).view(-1)).view(N, T)
    scores = TokenScores(torch.where(mask, chosen, 0.0))
    if options.entropy:
        if options.entropy_gradient:
            by_row = take_rows(entropy_of(logp), logits_index.view(-1)).view(N, T)
            scores.entropy = torch.where(mask, by_row, 0.0)
        else:
            with torch.no_grad():
                scores.entropy = torch.where(mask, entropy_of(logp)[logits_index], 0.0)
    if options.logits:
        scores.logits = gather_rows(tempered, logits_index, mask)
    if options.states:
        assert states is not None
        scores.states = gather_rows(states, logits_index, mask)
    return scores


def gather_rows(
    values: Float[Tensor, "K width"], index: Int[Tensor, "N T"], mask: Bool[Tensor, "N T"]
) -> Float[Tensor, "N T width"]:
    """Rows of `values` by index; 0 outside the mask."""
    rows = take_rows(values, index.view(-1)).view(*index.shape, -1)
    return torch.where(mask.unsqueeze(-1), rows, 0.0)
