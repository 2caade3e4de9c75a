"""Categorical sampling by inverting the cumulative distribution: one uniform random number per token.

On a device the same tokens are found with less traffic to its memory: sums of chunks before single tokens, and the
nucleus of top-p by bisection instead of two sorts of the whole vocabulary. Both ways add in float64, in other orders:
they differ only where a random number falls within 1e-15 of the border between two tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

CHUNK = 128
"""Tokens whose probabilities are summed before one of them is looked for."""


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


class UniformTable:
    """The numbers that `uniform_numbers` gives step by step, by step and trajectory."""

    def __init__(self, generator: torch.Generator | UniformSlice, count: int) -> None:
        self._generator, self._count = generator, count
        self._numbers: NDArray[np.float64] = np.zeros((0, count))

    def numbers(self, first_steps: Sequence[int], steps: int) -> NDArray[np.float64]:
        """[steps, count], those of every trajectory from its own first step on."""
        missing = max(first_steps) + steps - len(self._numbers)
        if missing > 0:
            cpu = torch.device("cpu")
            more = [uniform_numbers(self._generator, self._count, cpu).view(1, -1).numpy() for _ in range(missing)]
            self._numbers = np.concatenate([self._numbers, *more])
        rows = np.arange(steps)[:, None] + np.array(first_steps)[None, :]
        found: NDArray[np.float64] = self._numbers[rows, np.arange(self._count)[None, :]]
        return found


@dataclass(frozen=True, slots=True)
class Draw:
    """How the next token follows from logits.

    Attributes:
        temperature: divides the logits.
        top_p: draw from the smallest set of most likely tokens that holds this much probability.
        greedy: take the most likely token instead of drawing one.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    greedy: bool = False

    def __call__(
        self, logits: Float[Tensor, "N vocab_size"], uniforms: Float[Tensor, "N 1"] | None
    ) -> tuple[Int[Tensor, " N"], Float[Tensor, " N"]]:
        """See `sample_tokens`."""
        tempered = logits if self.temperature == 1.0 else logits / self.temperature
        return sample_tokens(tempered, None if self.greedy else uniforms, self.top_p)


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
    elif logits.device.type == "cpu":
        probs = logp.exp().double()
        tokens = invert(probs if top_p == 1.0 else nucleus(probs, top_p), uniforms)
    else:
        probs = logp.exp()
        tokens = invert_by_chunks(probs if top_p == 1.0 else nucleus_by_bisection(probs, top_p), uniforms)
    return tokens.squeeze(-1), logp.gather(-1, tokens).squeeze(-1)


def invert(probs: Float[Tensor, "N vocab_size"], uniforms: Float[Tensor, "N 1"]) -> Int[Tensor, "N 1"]:
    """The token in whose part of the cumulative distribution each uniform number falls."""
    cumulative = probs.cumsum(-1)
    below = (cumulative <= uniforms * cumulative[:, -1:]).sum(-1, keepdim=True)
    return below.clamp_(max=probs.shape[-1] - 1)


def invert_by_chunks(probs: Float[Tensor, "N vocab_size"], uniforms: Float[Tensor, "N 1"]) -> Int[Tensor, "N 1"]:
    """What `invert` gives, with the cumulative sums of chunks and of the one chunk that holds the token."""
    N, V = probs.shape
    chunks = functional.pad(probs, (0, -V % CHUNK)).view(N, -1, CHUNK)
    mass = chunks.sum(-1, dtype=torch.float64)
    cumulative = functional.pad(mass.cumsum(-1), (1, 0))
    target = uniforms * cumulative[:, -1:]
    chunk = _position(cumulative[:, 1:], mass, target)
    inside = chunks.gather(1, chunk[:, :, None].expand(-1, 1, CHUNK)).squeeze(1).double()
    return chunk * CHUNK + _position(cumulative.gather(1, chunk) + inside.cumsum(-1), inside, target)


def _position(cumulative: Tensor, mass: Tensor, target: Tensor) -> Tensor:
    """The first entry whose cumulative mass exceeds the target; rounding never makes it one beyond the last mass."""
    entries = torch.arange(mass.shape[-1], device=mass.device)
    last = torch.where(mass > 0, entries, 0).amax(-1, keepdim=True)
    return torch.minimum((cumulative <= target).sum(-1, keepdim=True), last)


def nucleus(probs: Float[Tensor, "N vocab_size"], top_p: float) -> Float[Tensor, "N vocab_size"]:
    """The probabilities with 0 outside the smallest set of most likely tokens that holds `top_p`.

    Of equally likely tokens the first are the more likely ones.
    """
    ordered, order = probs.sort(stable=True, dim=-1, descending=True)
    outside = ordered.cumsum(-1) - ordered >= top_p  # the most likely token is never outside
    return probs.masked_fill(outside.gather(-1, order.argsort(-1)), 0.0)


def nucleus_by_bisection(probs: Float[Tensor, "N vocab_size"], top_p: float) -> Float[Tensor, "N vocab_size"]:
    """What `nucleus` gives, by bisection on the bits of the least likely token's probability.

    Positive floating-point numbers are ordered as the integers that have the same bits.
    """
    integer, width = (torch.int64, 63) if probs.dtype == torch.float64 else (torch.int32, 31)
    bits = probs.view(integer)

    def mass_above(threshold: Tensor) -> Tensor:
        return torch.where(bits > threshold, probs, 0.0).sum(-1, keepdim=True, dtype=torch.float64)

    high = bits.amax(-1, keepdim=True)  # tokens above it hold less than top_p, those above `low` do not
    low = torch.full_like(high, -1)
    for _ in range(width):
        middle = low + (high - low) // 2
        enough = mass_above(middle) >= top_p
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    equal = bits == high
    before = mass_above(high) + (equal.cumsum(-1, dtype=torch.int32) - 1) * high.view(probs.dtype).double()
    return torch.where((bits > high) | (equal & (before < top_p)), probs, 0.0)
