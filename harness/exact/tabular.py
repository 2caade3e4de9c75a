"""Softmax policies small enough to enumerate: one row of logits per prefix.

A policy over V symbols and horizon H has one row of V logits for each prefix shorter than H, prefixes in breadth-first
order (length 0, then length 1 in lexicographic order, ...). A one-step bandit is the case H = 1: a single row. With an
`end` symbol a trajectory stops once it is emitted (the end symbol is an own token) or when H symbols are written; rows
of prefixes that already ended are never visited and keep gradient 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Bool, Float64, Int64
from torch import Tensor

from klab.grid import UserError

Reward = Tensor | Callable[[Tensor], Tensor]
"""Rewards of the lab: a tensor over all V^H token rows in lexicographic order (or over the distinct trajectories, when
an end symbol makes them fewer), or a function of the token tensor `[M, H]` (padded with the end symbol) to `[M]`."""

LARGEST_ENUMERATION = 2**22
"""Most token positions (trajectories x horizon) that are ever enumerated: 4 million, about 32 MB per float64 tensor."""


@dataclass(frozen=True, slots=True, eq=False)
class Trajectories:
    """Every trajectory of a policy, in lexicographic order of its tokens.

    Attributes:
        tokens: positions after the end symbol repeat the end symbol.
        mask: true on the policy's own tokens.
        contexts: the row of the logits that each token is drawn from (the last own row on padding).
    """

    tokens: Int64[Tensor, "M H"]
    mask: Bool[Tensor, "M H"]
    contexts: Int64[Tensor, "M H"]

    @property
    def lengths(self) -> Int64[Tensor, " M"]:
        """Number of own tokens of each trajectory."""
        return self.mask.sum(-1)

    def __len__(self) -> int:
        return self.tokens.shape[0]


def contexts_of(vocabulary: int, horizon: int) -> int:
    """Number of prefixes shorter than `horizon` over `vocabulary` symbols: 1 + V + ... + V^(H-1)."""
    return sum(vocabulary**length for length in range(horizon))


def horizon_of(contexts: int, vocabulary: int) -> int:
    """The horizon whose prefixes fill `contexts` rows.

    Raises:
        ValueError: no horizon has that many prefixes.
    """
    horizon, rows = 0, 0
    while rows < contexts:
        rows += vocabulary**horizon
        horizon += 1
    if rows != contexts or vocabulary < 2:
        raise ValueError(
            f"logits of shape [{contexts}, {vocabulary}] are no tabular policy: the rows must number "
            f"1 + V + ... + V^(H-1) for some horizon H, with V >= 2"
        )
    return horizon


def check_size(vocabulary: int, horizon: int) -> None:
    """Refuse what cannot be enumerated.

    Raises:
        UserError: more than `LARGEST_ENUMERATION` token positions.
    """
    if vocabulary**horizon * horizon > LARGEST_ENUMERATION:
        raise UserError(
            f"{vocabulary}^{horizon} trajectories are too many to enumerate: at most {LARGEST_ENUMERATION:,} tokens"
        )


@lru_cache(maxsize=64)
def enumerate_trajectories(vocabulary: int, horizon: int, end: int | None = None) -> Trajectories:
    """Every trajectory over `vocabulary` symbols up to `horizon`; with `end`, those that stop at that symbol.

    Raises:
        UserError: more than `LARGEST_ENUMERATION` token positions.
    """
    check_size(vocabulary, horizon)
    ranks = torch.arange(vocabulary**horizon)
    powers = vocabulary ** torch.arange(horizon - 1, -1, -1)
    tokens = (ranks[:, None] // powers) % vocabulary
    mask = torch.ones_like(tokens, dtype=torch.bool)
    if end is not None:
        ended = (tokens == end).cumsum(-1)
        mask = (ended - (tokens == end).long()) == 0
        kept = ((tokens == end) | mask).all(-1)  # after the first end symbol only end symbols: one spelling of each
        tokens, mask = tokens[kept], mask[kept]
    offsets = torch.tensor([contexts_of(vocabulary, length) for length in range(horizon)])
    prefix_ranks = torch.zeros_like(tokens)
    for position in range(1, horizon):
        prefix_ranks[:, position] = prefix_ranks[:, position - 1] * vocabulary + tokens[:, position - 1]
    contexts = offsets + prefix_ranks
    last_own = mask.sum(-1, keepdim=True) - 1
    contexts = torch.where(mask, contexts, contexts.gather(1, last_own))
    return Trajectories(tokens, mask, contexts)


@dataclass(frozen=True, eq=False)
class TabularPolicy:
    """An autoregressive softmax policy given by its logits.

    Attributes:
        logits: one row per prefix shorter than H, breadth first. Other dtypes are converted.
        end: id of the end symbol, negative ids counting from the last; None when every trajectory has H tokens.

    Example:
        >>> TabularPolicy(torch.zeros(13, 3)).horizon
        3
    """

    logits: Float64[Tensor, "contexts V"]
    end: int | None = None

    def __post_init__(self) -> None:
        if self.logits.ndim != 2:
            raise ValueError(f"logits must be [contexts, V], got shape {list(self.logits.shape)}")
        vocabulary = self.logits.shape[1]
        horizon_of(self.logits.shape[0], vocabulary)
        object.__setattr__(self, "logits", self.logits.to(torch.float64))
        if self.end is not None:
            if not -vocabulary <= self.end < vocabulary:
                raise ValueError(f"end symbol {self.end} is outside the vocabulary of {vocabulary}")
            object.__setattr__(self, "end", self.end % vocabulary)

    @classmethod
    def random(
        cls,
        vocabulary: int,
        horizon: int,
        *,
        scale: float = 1.0,
        generator: torch.Generator | None = None,
        end: int | None = None,
    ) -> TabularPolicy:
        """A policy with independent normal logits of standard deviation `scale`."""
        check_size(vocabulary, horizon)
        rows = contexts_of(vocabulary, horizon)
        return cls(scale * torch.randn(rows, vocabulary, generator=generator, dtype=torch.float64), end)

    def perturbed(self, scale: float, generator: torch.Generator | None = None) -> TabularPolicy:
        """This policy with independent normal noise of standard deviation `scale` added to its logits: random drift."""
        noise = torch.randn(self.logits.shape, generator=generator, dtype=torch.float64)
        return TabularPolicy(self.logits.detach() + scale * noise, self.end)

    def moved(self, direction: Float64[Tensor, "contexts V"]) -> TabularPolicy:
        """This policy with `direction` added to its logits."""
        return TabularPolicy(self.logits.detach() + direction, self.end)

    @property
    def vocabulary(self) -> int:
        """V, the number of symbols."""
        return self.logits.shape[1]

    @property
    def horizon(self) -> int:
        """H, the most tokens of a trajectory."""
        return horizon_of(*self.logits.shape)

    @property
    def trajectories(self) -> Trajectories:
        """Every trajectory, lexicographic."""
        return enumerate_trajectories(self.vocabulary, self.horizon, self.end)

    def token_logits(self) -> Float64[Tensor, "M H V"]:
        """Logits that each token is drawn from; differentiable."""
        return self.logits[self.trajectories.contexts]

    def token_logp(self) -> Float64[Tensor, "M H"]:
        """Log-probability of each own token, 0 on padding; differentiable."""
        every = self.trajectories
        chosen = torch.log_softmax(self.logits, -1)[every.contexts, every.tokens]
        return torch.where(every.mask, chosen, torch.zeros_like(chosen))

    def logp(self) -> Float64[Tensor, " M"]:
        """Log-probability of each trajectory; differentiable."""
        return self.token_logp().sum(-1)

    def probabilities(self) -> Float64[Tensor, " M"]:
        """Probability of each trajectory, summing to 1; differentiable."""
        return self.logp().exp()

    def conditionals(self) -> Float64[Tensor, "contexts V"]:
        """The distribution of the next symbol in each context; differentiable."""
        return torch.softmax(self.logits, -1)

    def greedy(self) -> int:
        """Index of the greedy trajectory (most probable symbol at each step, lowest id on ties)."""
        best = self.logits.argmax(-1)
        every = self.trajectories
        follows = (best[every.contexts] == every.tokens) | ~every.mask
        return int(follows.all(-1).nonzero()[0, 0])

    def sample(self, count: int, generator: torch.Generator | None = None) -> Int64[Tensor, " count"]:
        """Indices of `count` independent trajectories, by inversion of the distribution function."""
        edges = self.probabilities().detach().cumsum(0)
        draws = torch.rand(count, generator=generator, dtype=torch.float64) * edges[-1]
        return torch.searchsorted(edges, draws, right=True).clamp_(max=len(edges) - 1)

    def token_scores(self) -> Float64[Tensor, "M H contexts*V"]:
        """Gradient of each token's log-probability with respect to the flattened logits, 0 on padding."""
        every = self.trajectories
        rows, vocabulary = self.logits.shape
        scores = torch.zeros(len(every), self.horizon, rows, vocabulary, dtype=torch.float64)
        local = torch.nn.functional.one_hot(every.tokens, vocabulary) - self.conditionals().detach()[every.contexts]
        local = local * every.mask[..., None]
        index = every.contexts[..., None, None].expand(-1, -1, 1, vocabulary)
        return scores.scatter_(2, index, local[:, :, None, :]).flatten(2)

    def reward_of(self, reward: Reward) -> Tensor:
        """The reward of each trajectory, float64 `[M]`.

        Raises:
            ValueError: a reward tensor of the wrong size.
        """
        every = self.trajectories
        if not isinstance(reward, Tensor):
            values = reward(every.tokens).to(torch.float64)
            if values.shape != (len(every),):
                raise ValueError(f"the reward function returned shape {list(values.shape)}, expected [{len(every)}]")
            return values
        values = reward.reshape(-1).to(torch.float64)
        if values.numel() == len(every):
            return values
        if values.numel() == self.vocabulary**self.horizon:
            powers = self.vocabulary ** torch.arange(self.horizon - 1, -1, -1)
            return values[(every.tokens * powers).sum(-1)]
        raise ValueError(
            f"reward has {values.numel()} entries; expected {self.vocabulary}^{self.horizon} "
            f"(all token rows) or {len(every)} (distinct trajectories)"
        )
