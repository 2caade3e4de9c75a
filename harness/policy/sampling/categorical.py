"""Categorical sampling by inverting the cumulative distribution: one uniform random number per token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True, slots=True)
class UniformSlice:
    """Random numbers of some of a cell's trajectories, those from `first` on out of `total`.

    Each step consumes one number per trajectory of the cell, so that a trajectory gets the same numbers whether the
    cell's trajectories are sampled all at once or in parts.
    """

    generator: torch.Generator
    first: int
    total: int


def uniform_numbers(
    generator: torch.Generator | UniformSlice, count: int, device: torch.device
) -> Float[Tensor, "count 1"]:
    """Uniform random numbers in [0, 1), float64."""
    if isinstance(generator, torch.Generator):
        return torch.rand(count, 1, generator=generator, dtype=torch.float64).to(device, non_blocking=True)
    every = torch.rand(generator.total, 1, generator=generator.generator, dtype=torch.float64)
    return every[generator.first : generator.first + count].to(device, non_blocking=True)


def sample_tokens(
    logits: Float[Tensor, "N vocab_size"], uniforms: Float[Tensor, "N 1"] | None, top_p: float
) -> tuple[Int[Tensor, " N"], Float[Tensor, " N"]]:
    """Tokens drawn from logits, and their log-probabilities; each row by itself.

    Log-probabilities are those of the full distribution, whatever `top_p`.

    Args:
        uniforms: float64 in [0, 1); None takes the most likely tokens.
        top_p: draw from the smallest set of most likely tokens that holds this much probability.
    """
    logp = (logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits).log_softmax(-1)
    if uniforms is None:
        tokens = logp.argmax(-1, keepdim=True)
        return tokens.squeeze(-1), logp.gather(-1, tokens).squeeze(-1)
    probs = logp.exp().double()
    if top_p < 1.0:
        ordered, order = probs.sort(stable=True, dim=-1, descending=True)
        outside = ordered.cumsum(-1) - ordered >= top_p  # the most likely token is never outside
        probs = probs.masked_fill(outside.gather(-1, order.argsort(-1)), 0.0)
    cumulative = probs.cumsum(-1)
    tokens = (cumulative <= uniforms * cumulative[:, -1:]).sum(-1, keepdim=True).clamp_(max=logp.shape[-1] - 1)
    return tokens.squeeze(-1), logp.gather(-1, tokens).squeeze(-1)
