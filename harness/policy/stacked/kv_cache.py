"""Incremental decoding with cached keys and values that grow, for cells that are stacked where their shapes agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from klab.harness.policy.stacked.attention import AttentionLayout, attention
from klab.harness.policy.stacked.batched_layers import batched_forward
from klab.harness.policy.stacked.growing_prefix_tree import DecodingStep, GrowingPrefixTree
from klab.harness.policy.stacked.model import StackedModel, Weights
from klab.harness.policy.stacked.prefill import KVCache, Prefill
from klab.harness.policy.stacked.prefix_tree_layout import causal_bias


class KVCacheDecoder:
    """An `IncrementalDecoder` whose cells are computed together in the steps in which their shapes agree."""

    one_by_one = False

    def __init__(self, model: StackedModel, prompts: Sequence[Sequence[Sequence[int]]], group_size: int) -> None:
        self.model = model
        self.trees = [GrowingPrefixTree(listed, group_size) for listed in prompts]
        self._caches: dict[tuple[int, ...], KVCache] = {}
        self._weights: dict[tuple[int, ...], Weights] = {}

    def start(self, cells: Sequence[int]) -> dict[int, Tensor]:
        found: dict[int, Tensor] = {}
        device, dtype = self.model.device, self.model.dtype
        for stack in self.model.stacks([(len(tree.prompts), tree.width) for tree in self.trees]):
            trees = [self.trees[c] for c in stack]
            num_rows, width = len(trees[0].prompts), trees[0].width
            prefill = Prefill(
                [tree.prompts for tree in trees], num_rows, width, device, causal_bias(width, device, dtype)
            )
            logits = self._logits(stack, prefill.tokens, prefill)
            self._caches[tuple(stack)] = prefill.cache
            for cell, each in zip(stack, logits.unbind(0), strict=True):
                found[cell] = each.repeat_interleave(self.trees[cell].group_size, 0)
        return found

    def known_states(self, cell: int) -> None:
        return None

    def step(self, last_tokens: Mapping[int, Tensor], unfinished: Mapping[int, Sequence[bool]]) -> dict[int, Tensor]:
        active = list(last_tokens)
        steps = []
        for cell in active:
            live = np.array(unfinished[cell])
            gathered = self.trees[cell].rearrange(live)
            if gathered is not None:
                rows, slots = (torch.from_numpy(index).to(self.model.device) for index in gathered)
                self._split_cache(cell)
                self._caches[(cell,)] = [(k[:, rows, slots], v[:, rows, slots]) for k, v in self._caches[(cell,)]]
            steps.append(self.trees[cell].grow(last_tokens[cell].cpu().numpy(), live))
        found: dict[int, Tensor] = {}
        caches: dict[tuple[int, ...], KVCache] = {}
        for members in self.model.stacks([step.shape for step in steps]):
            cells = tuple(active[m] for m in members)
            batch = _StepBatch(
                [steps[m] for m in members], self._joint_cache(cells), self.model.device, self.model.dtype
            )
            logits = self._logits(cells, batch.tokens, batch)
            caches[cells] = batch.cache
            for m, each in zip(members, logits.unbind(0), strict=True):
                index = torch.from_numpy(steps[m].token_of_trajectory).to(each.device)
                found[active[m]] = each.index_select(0, index)
        self._caches = caches
        return found

    def _logits(self, cells: Sequence[int], tokens: Tensor, layout: AttentionLayout) -> Tensor:
        key = tuple(cells)
        if key not in self._weights:
            self._weights[key] = self.model.weights([cells])[0]
        weights = self._weights[key]
        return self.model.logits(weights, batched_forward(self.model, weights, tokens, layout))

    def _joint_cache(self, cells: tuple[int, ...]) -> KVCache:
        """The keys and values of some cells as one stack."""
        if cells in self._caches:
            return self._caches[cells]
        for cell in cells:
            self._split_cache(cell)
        parts = [self._caches[(cell,)] for cell in cells]
        if len(parts) == 1:
            return parts[0]
        return [
            (torch.cat([k for k, _ in layer], 1), torch.cat([v for _, v in layer], 1))
            for layer in zip(*parts, strict=True)
        ]

    def _split_cache(self, cell: int) -> None:
        """Split the stack that holds a cell's keys and values into its cells."""
        holder = next(key for key in self._caches if cell in key)
        if len(holder) > 1:
            cache, n = self._caches.pop(holder), len(holder)
            for position, member in enumerate(holder):
                self._caches[(member,)] = [(k.chunk(n, 1)[position], v.chunk(n, 1)[position]) for k, v in cache]


class _StepBatch:
    """One decoding step of cells with equal shapes as an `AttentionLayout`; `cache` is extended by the new tokens."""

    def __init__(self, steps: Sequence[DecodingStep], cache: KVCache, device: torch.device, dtype: torch.dtype) -> None:
        M, num_slots = len(steps[0].tokens), steps[0].token_of_slot.size
        self.tokens = torch.from_numpy(np.stack([s.tokens for s in steps])).to(device)
        self.positions = torch.from_numpy(np.concatenate([s.positions for s in steps])).to(device)
        self.position_limit = int(self.positions.max()) + 1
        token_of_slot = np.concatenate([s.token_of_slot.reshape(-1) + M * a for a, s in enumerate(steps)])
        slot_of_token = np.concatenate([s.slot_of_token + num_slots * a for a, s in enumerate(steps)])
        self.token_of_slot = torch.from_numpy(token_of_slot).to(device)
        self.slot_of_token = torch.from_numpy(slot_of_token).to(device)
        self.output_index: Tensor | None = None
        masked = torch.from_numpy(~np.concatenate([s.attends for s in steps])).to(device)
        self.attn_bias = torch.zeros(masked.shape, dtype=dtype, device=device).masked_fill_(masked, -torch.inf)
        self.cache = list(cache)

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        old_keys, old_values = self.cache[layer]
        keys, values = torch.cat((old_keys, keys), 2), torch.cat((old_values, values), 2)
        self.cache[layer] = (keys, values)
        return attention(queries, keys, values, self.attn_bias)
