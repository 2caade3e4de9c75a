"""Step-by-step logits of growing trajectories from a transformers model, its own cache of keys and values included."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from klab.harness.policy.hf.policy import TransformersPolicy


class CachedDecoder:
    """Each prompt forwarded once, padded at the left; then one token per open trajectory. Those that end leave."""

    def __init__(self, policy: TransformersPolicy, prompts: Sequence[Sequence[Sequence[int]]], group_size: int) -> None:
        self.policy, self.prompts, self.group_size = policy, prompts, group_size
        self._weights = policy.weights()
        self._caches: list[Any] = []
        self._present: list[Tensor] = []
        self._rows: list[Tensor] = []
        """By cell, which trajectories the cache still holds."""

    def start(self) -> dict[int, Tensor]:
        from transformers import DynamicCache

        found = {}
        for cell, listed in enumerate(self.prompts):
            cache = DynamicCache(config=self.policy.model.base.config)
            tokens, present = padded(listed, self.policy.device, left=True)
            logits, _ = self.policy.logits(self._weights[cell], tokens, present, 1, cache)
            cache.batch_repeat_interleave(self.group_size)
            self._caches.append(cache)
            self._present.append(present.repeat_interleave(self.group_size, 0))
            self._rows.append(torch.arange(len(listed) * self.group_size, device=self.policy.device))
            found[cell] = logits[:, -1].repeat_interleave(self.group_size, 0)
        return found

    def step(self, newest: Mapping[int, Tensor], open_rows: Mapping[int, Sequence[bool]]) -> dict[int, Tensor]:
        found = {}
        for cell, tokens in newest.items():
            going = torch.tensor(open_rows[cell], device=self.policy.device)
            stay = going[self._rows[cell]].nonzero().view(-1)
            if len(stay) < len(self._rows[cell]):
                self._caches[cell].batch_select_indices(stay)
                self._present[cell], self._rows[cell] = self._present[cell][stay], self._rows[cell][stay]
            rows = self._rows[cell]
            self._present[cell] = torch.cat((self._present[cell], torch.ones_like(rows, dtype=torch.bool)[:, None]), 1)
            logits, _ = self.policy.logits(
                self._weights[cell], tokens[rows][:, None], self._present[cell], 1, self._caches[cell]
            )
            every = logits.new_zeros(len(tokens), logits.shape[-1])
            found[cell] = every.index_copy_(0, rows, logits[:, -1])
        return found


class UncachedDecoder:
    """The reference path, and that of models without such a cache: every sequence forwarded anew for every token."""

    def __init__(self, policy: TransformersPolicy, prompts: Sequence[Sequence[Sequence[int]]], group_size: int) -> None:
        self.policy = policy
        self._rows = [[list(prompt) for prompt in listed for _ in range(group_size)] for listed in prompts]
        self._weights = policy.weights()

    def start(self) -> dict[int, Tensor]:
        return {cell: self._logits(cell, range(len(rows))) for cell, rows in enumerate(self._rows)}

    def step(self, newest: Mapping[int, Tensor], open_rows: Mapping[int, Sequence[bool]]) -> dict[int, Tensor]:
        found = {}
        for cell, tokens in newest.items():
            going = [row for row, is_open in enumerate(open_rows[cell]) if is_open]
            for row in going:
                self._rows[cell][row].append(int(tokens[row]))
            found[cell] = self._logits(cell, going)
        return found

    def _logits(self, cell: int, going: Sequence[int]) -> Tensor:
        device = self.policy.device
        tokens, present = padded([self._rows[cell][row] for row in going], device)
        values, _ = self.policy.logits(self._weights[cell], tokens, present, tokens.shape[1])
        last = values[torch.arange(len(going), device=device), present.sum(1) - 1]
        every = last.new_zeros(len(self._rows[cell]), last.shape[-1])
        return every.index_copy_(0, torch.tensor(going, device=device), last)


def padded(rows: Sequence[Sequence[int]], device: torch.device, left: bool = False) -> tuple[Tensor, Tensor]:
    """Token ids [N, S] of rows of unequal lengths, and which of them are no padding."""
    S = max(len(row) for row in rows)
    gaps = [[0] * (S - len(row)) for row in rows]
    full = [[*gap, *row] if left else [*row, *gap] for row, gap in zip(rows, gaps, strict=True)]
    lengths = torch.tensor([len(row) for row in rows], device=device)[:, None]
    columns = torch.arange(S, device=device)[None, :]
    present = columns >= S - lengths if left else columns < lengths
    return torch.tensor(full, dtype=torch.long, device=device), present
