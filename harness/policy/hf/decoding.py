"""Incremental decoding with a transformers model, cell by cell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from klab.harness.policy.hf.functional_model import FunctionalModel


class CellModel(Protocol):
    """A transformers model with the parameters of several cells."""

    model: FunctionalModel

    @property
    def device(self) -> torch.device: ...

    def weights(self) -> list[dict[str, Tensor]]:
        """Each cell's parameters by name."""
        ...

    def logits(
        self,
        weights: Mapping[str, Tensor],
        tokens: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        cache: Any = None,
    ) -> tuple[Tensor, Tensor]:
        """Logits and final hidden states, see `FunctionalModel`."""
        ...


class CachedDecoder:
    """An `IncrementalDecoder` with transformers' cache of keys and values.

    Each prompt is forwarded once, padded at the left, then one token per unfinished trajectory. Finished ones leave
    the cache.
    """

    one_by_one = False

    def __init__(self, policy: CellModel, prompts: Sequence[Sequence[Sequence[int]]], group_size: int) -> None:
        self.policy, self.prompts, self.group_size = policy, prompts, group_size
        self._weights = policy.weights()
        self._caches: list[Any] = []
        self._masks: list[Tensor] = []
        self._cached: list[list[int]] = []
        """By cell, which trajectories the cache still holds."""

    def start(self, cells: Sequence[int]) -> dict[int, Tensor]:
        from transformers import DynamicCache

        found = {}
        for cell, listed in enumerate(self.prompts):
            cache = DynamicCache(config=self.policy.model.base.config)
            tokens, mask = pad_rows(listed, self.policy.device, left=True)
            logits, _ = self.policy.logits(self._weights[cell], tokens, mask, 1, cache)
            cache.batch_repeat_interleave(self.group_size)
            self._caches.append(cache)
            self._masks.append(mask.repeat_interleave(self.group_size, 0))
            self._cached.append(list(range(len(listed) * self.group_size)))
            found[cell] = logits[:, -1].repeat_interleave(self.group_size, 0)
        return found

    def known_states(self, cell: int) -> None:
        return None

    def step(self, last_tokens: Mapping[int, Tensor], unfinished: Mapping[int, Sequence[bool]]) -> dict[int, Tensor]:
        found = {}
        for cell, tokens in last_tokens.items():
            stay = [place for place, row in enumerate(self._cached[cell]) if unfinished[cell][row]]
            if len(stay) < len(self._cached[cell]):
                places = self._index(stay)
                self._caches[cell].batch_select_indices(places)
                self._masks[cell] = self._masks[cell][places]
                self._cached[cell] = [self._cached[cell][place] for place in stay]
            rows = self._index(self._cached[cell])
            self._masks[cell] = torch.cat((self._masks[cell], torch.ones_like(rows, dtype=torch.bool)[:, None]), 1)
            logits, _ = self.policy.logits(
                self._weights[cell], tokens[rows][:, None], self._masks[cell], 1, self._caches[cell]
            )
            every = logits.new_zeros(len(tokens), logits.shape[-1])
            found[cell] = every.index_copy_(0, rows, logits[:, -1])
        return found

    def _index(self, rows: Sequence[int]) -> Tensor:
        return torch.tensor(rows, dtype=torch.long).to(self.policy.device, non_blocking=True)


class UncachedDecoder:
    """An `IncrementalDecoder` that forwards every sequence anew for every token: the reference, and for models whose
    cache cannot be cut to a subset of sequences."""

    one_by_one = False

    def __init__(self, policy: CellModel, prompts: Sequence[Sequence[Sequence[int]]], group_size: int) -> None:
        self.policy = policy
        self._sequences = [[list(prompt) for prompt in listed for _ in range(group_size)] for listed in prompts]
        self._weights = policy.weights()

    def start(self, cells: Sequence[int]) -> dict[int, Tensor]:
        return {cell: self._logits(cell, range(len(sequences))) for cell, sequences in enumerate(self._sequences)}

    def known_states(self, cell: int) -> None:
        return None

    def step(self, last_tokens: Mapping[int, Tensor], unfinished: Mapping[int, Sequence[bool]]) -> dict[int, Tensor]:
        found = {}
        for cell, tokens in last_tokens.items():
            live = [i for i, goes_on in enumerate(unfinished[cell]) if goes_on]
            for i in live:
                self._sequences[cell][i].append(int(tokens[i]))
            found[cell] = self._logits(cell, live)
        return found

    def _logits(self, cell: int, live: Sequence[int]) -> Tensor:
        device = self.policy.device
        tokens, mask = pad_rows([self._sequences[cell][i] for i in live], device)
        values, _ = self.policy.logits(self._weights[cell], tokens, mask, tokens.shape[1])
        last = values[torch.arange(len(live), device=device), mask.sum(1) - 1]
        every = last.new_zeros(len(self._sequences[cell]), last.shape[-1])
        return every.index_copy_(0, torch.tensor(live, device=device), last)


def pad_rows(rows: Sequence[Sequence[int]], device: torch.device, left: bool = False) -> tuple[Tensor, Tensor]:
    """Token ids [N, S] of N rows, padded to the longest, and bool [N, S], which of them are no padding."""
    S = max(len(row) for row in rows)
    gaps = [[0] * (S - len(row)) for row in rows]
    full = [[*gap, *row] if left else [*row, *gap] for row, gap in zip(rows, gaps, strict=True)]
    lengths = torch.tensor([len(row) for row in rows])[:, None]
    columns = torch.arange(S)[None, :]
    mask = columns >= S - lengths if left else columns < lengths
    tokens = torch.tensor(full, dtype=torch.long)
    return tokens.to(device, non_blocking=True), mask.to(device, non_blocking=True)
