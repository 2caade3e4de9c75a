"""Tokens drawn from their distribution by inverting the cumulative one: one uniform number per token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class UniformSlice:
    """The random numbers of some of a cell's trajectories: the n that follow the first `first` of `total`.

    Each step consumes one number per trajectory of the cell, so these are what they would be among all of them.
    """

    generator: torch.Generator
    first: int
    total: int


def uniform_numbers(generator: torch.Generator | UniformSlice, rows: int, device: torch.device) -> Tensor:
    """Uniform numbers [rows, 1] in float64."""
    if isinstance(generator, torch.Generator):
        return torch.rand(rows, 1, generator=generator, device=device, dtype=torch.float64)
    every = torch.rand(generator.total, 1, generator=generator.generator, device=device, dtype=torch.float64)
    return every[generator.first : generator.first + rows]


def sample_tokens(logits: Tensor, numbers: Tensor | None, top_p: float) -> tuple[Tensor, Tensor]:
    """Tokens [N] drawn from logits [N, V], and their log-probabilities [N]; each row by itself.

    Args:
        numbers: float64 [N, 1], uniform; None takes the most likely tokens.
        top_p: draw from the smallest set of most likely tokens that holds this much probability.
    """
    logp = (logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits).log_softmax(-1)
    if numbers is None:
        chosen = logp.argmax(-1, keepdim=True)
        return chosen.squeeze(-1), logp.gather(-1, chosen).squeeze(-1)
    probabilities = logp.exp().double()
    if top_p < 1.0:
        ordered, order = probabilities.sort(stable=True, dim=-1, descending=True)
        outside = ordered.cumsum(-1) - ordered >= top_p  # the most likely token is never outside
        probabilities = probabilities.masked_fill(outside.gather(-1, order.argsort(-1)), 0.0)
    cumulative = probabilities.cumsum(-1)
    chosen = (cumulative <= numbers * cumulative[:, -1:]).sum(-1, keepdim=True).clamp_(max=logp.shape[-1] - 1)
    return chosen.squeeze(-1), logp.gather(-1, chosen).squeeze(-1)
