"""Incremental decoding with keys and values at fixed addresses, so that a step is one replayed CUDA graph.

Every trajectory has a row of its own, in which the token at position p stands in slot p. A step of a small model is
hundreds of kernels that run for less time than they take to launch; recorded once, they are launched together. The
number of rows is halved when half of the trajectories have ended, and slots are added in blocks: few shapes, hence few
recordings, which are kept from rollout to rollout (weights change in place).

The numbers are those of `KVCacheDecoder` up to rounding. Which of the two decodes is part of what determines the bits:
on GPUs the fixed one, on CPUs the growing one, where sharing prefixes saves more; KLAB_DECODING overrules that.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from klab.grid.errors import UserError
from klab.harness.policy.prefix_tree import Indices
from klab.harness.policy.stacked.batched_layers import batched_forward
from klab.harness.policy.stacked.model import StackedModel, Weights
from klab.harness.policy.stacked.prefill import Prefill

VARIABLE = "KLAB_DECODING"
KINDS = ("growing", "static")

BLOCK = 128
"""Slots are added in multiples of this."""

MIN_ROWS = 8
MAX_RECORDINGS = 4
"""Recordings per model, each with its keys and values; the least recently used one makes room."""


def uses_static_cache(device: torch.device) -> bool:
    """Whether models on this device decode with fixed memory: on GPUs, unless KLAB_DECODING says `growing`.

    Raises:
        UserError: KLAB_DECODING is neither `growing` nor `static`.
    """
    chosen = os.environ.get(VARIABLE, "")
    if chosen and chosen not in KINDS:
        raise UserError("no such way of decoding", key=VARIABLE, value=chosen, allowed=KINDS)
    return chosen == "static" if chosen else device.type != "cpu"


class GraphCache:
    """The recorded decoding steps of one model, by number of rows per cell and row length."""

    def __init__(self) -> None:
        self.runners: OrderedDict[tuple[int, int], GraphRunner] = OrderedDict()

    def runner(self, model: StackedModel, num_rows: int, length: int) -> GraphRunner:
        """The recording of a shape, made if there is none, with all keys and values zero."""
        key = (num_rows, length)
        if key not in self.runners:
            if len(self.runners) >= MAX_RECORDINGS:
                self.runners.popitem(last=False)
            self.runners[key] = GraphRunner(model, num_rows, length)
        self.runners.move_to_end(key)
        self.runners[key].zero_cache()
        return self.runners[key]

    def clear(self) -> None:
        """Drop all recordings and the memory that they hold."""
        self.runners.clear()


class StaticCacheDecoder:
    """An `IncrementalDecoder` in rows of equal, fixed length.

    Args:
        graphs: the model's recordings.
        capture: record CUDA graphs; a CPU has none.
    """

    def __init__(
        self,
        model: StackedModel,
        prompts: Sequence[Sequence[Sequence[int]]],
        group_size: int,
        graphs: GraphCache,
        capture: bool = True,
    ) -> None:
        self.model, self.prompts, self.group_size, self.graphs = model, prompts, group_size, graphs
        self.capture = capture and model.device.type != "cpu"
        self.num_rows = max(len(listed) for listed in prompts) * group_size
        self.row = [np.arange(len(listed) * group_size) for listed in prompts]
        self.next_position = np.zeros((len(prompts), self.num_rows), dtype=np.int64)
        for c, listed in enumerate(prompts):
            lengths = [len(prompt) for prompt in listed]
            self.next_position[c, : len(self.row[c])] = np.repeat(lengths, group_size)

    def start(self) -> dict[int, Tensor]:
        model, device, C = self.model, self.model.device, len(self.prompts)
        width = max(len(prompt) for listed in self.prompts for prompt in listed)
        P = self.num_rows // self.group_size
        prefill = Prefill(self.prompts, P, width, device)
        weights = model.weights([range(C)])[0]
        logits = model.logits(weights, batched_forward(model, weights, prefill.tokens, prefill))
        prompt_row = torch.arange(C * P, device=device).repeat_interleave(self.group_size)
        self.runner = self.graphs.runner(model, self.num_rows, _row_length(width + 1, model.context_length))
        for fixed_pair, pair in zip(self.runner.cache, prefill.cache, strict=True):
            for fixed, computed in zip(fixed_pair, pair, strict=True):
                fixed[:, :, :width] = computed.index_select(1, prompt_row)
        return {
            c: each[: len(self.prompts[c])].repeat_interleave(self.group_size, 0)
            for c, each in enumerate(logits.unbind(0))
        }

    def step(self, last_tokens: Mapping[int, Tensor], unfinished: Mapping[int, Sequence[bool]]) -> dict[int, Tensor]:
        live = {c: np.flatnonzero(np.array(unfinished[c])) for c in last_tokens}
        self._resize(live)
        tokens, positions = np.zeros_like(self.next_position), np.zeros_like(self.next_position)
        for c, trajectories in live.items():
            rows = self.row[c][trajectories]
            tokens[c, rows] = last_tokens[c].cpu().numpy()[trajectories]
            positions[c, rows] = self.next_position[c, rows]
            self.next_position[c, rows] += 1
        logits = self.runner.run(self.model, tokens, positions, self.capture)
        device = self.model.device
        return {c: logits[c].index_select(0, torch.from_numpy(self.row[c]).to(device)) for c in last_tokens}

    def _resize(self, live: Mapping[int, Indices]) -> None:
        """Halve the rows where half of them are idle in every cell, add slots where some row is full."""
        most = max(len(trajectories) for trajectories in live.values())
        needed = 1 + max(int(self.next_position[c, self.row[c][t]].max(initial=0)) for c, t in live.items())
        old, num_rows = self.runner, self.num_rows
        while num_rows // 2 >= max(most, MIN_ROWS):
            num_rows //= 2
        length = old.length if needed <= old.length else _row_length(needed, self.model.context_length)
        if (num_rows, length) == (self.num_rows, old.length):
            return
        old_row, old_position = np.zeros((len(self.prompts), num_rows), dtype=np.int64), self.next_position
        old_row += np.arange(len(self.prompts))[:, None] * self.num_rows
        self.next_position = np.zeros((len(self.prompts), num_rows), dtype=np.int64)
        for c, trajectories in live.items():
            rows = self.row[c][trajectories]
            old_row[c, : len(rows)] += rows
            self.next_position[c, : len(rows)] = old_position[c, rows]
            self.row[c] = np.zeros_like(self.row[c])
            self.row[c][trajectories] = np.arange(len(rows))
        self.num_rows = num_rows
        self.runner = self.graphs.runner(self.model, num_rows, length)
        index = torch.from_numpy(old_row.reshape(-1)).to(self.model.device)
        for new_pair, old_pair in zip(self.runner.cache, old.cache, strict=True):
            for fixed, earlier in zip(new_pair, old_pair, strict=True):
                fixed[:, :, : old.length] = earlier.index_select(1, index)


class GraphRunner:
    """One decoding step of C cells in L rows of `length` slots each, at fixed addresses; also its `AttentionLayout`.

    It does not hold the model, which holds it.

    Attributes:
        tokens: token ids [C, L].
        cache: keys and values of every layer, [num_kv_heads, C·L, length, head_dim].
    """

    def __init__(self, model: StackedModel, num_rows: int, length: int) -> None:
        a, device, cells = model.architecture, model.device, model.cells
        self.length = self.position_limit = length
        self.weights: Weights = model.weights([range(cells)])[0]
        self.tokens = torch.zeros((cells, num_rows), dtype=torch.long, device=device)
        self.positions = torch.zeros((cells * num_rows, 1), dtype=torch.long, device=device)
        self.token_of_slot = self.slot_of_token = torch.arange(cells * num_rows, device=device)
        self.output_index: Tensor | None = None
        shape = (2, a.num_kv_heads, cells * num_rows, length, a.head_dim)
        self.cache = [torch.zeros(shape, dtype=model.dtype, device=device).unbind(0) for _ in range(a.num_layers)]
        self._attn_bias = torch.zeros((1, cells * num_rows, 1, length), dtype=model.dtype, device=device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits = torch.zeros(0)
        self._rotary_tables: list[tuple[Tensor, Tensor]] = []

    def zero_cache(self) -> None:
        """Make every slot finite: a slot that no token has reached is multiplied by 0."""
        for pair in self.cache:
            for fixed in pair:
                fixed.zero_()

    def run(self, model: StackedModel, tokens: Indices, positions: Indices, capture: bool) -> Tensor:
        """Logits [C, L, vocab_size] after one more token per row [C, L]; the next call overwrites them."""
        self.tokens.copy_(torch.from_numpy(tokens))
        self.positions.copy_(torch.from_numpy(positions).view(-1, 1))
        if not capture:
            return self._step(model)
        if self._graph is None:
            self._graph = self._record(model)
        self._graph.replay()
        return self._logits

    def _record(self, model: StackedModel) -> torch.cuda.CUDAGraph:
        """Record a step. Libraries initialise themselves in a step before it, which writes the same keys and values."""
        backend = torch.get_device_module(model.device)
        aside = backend.Stream()
        aside.wait_stream(backend.current_stream())
        with backend.stream(aside):
            self._step(model)
        backend.current_stream().wait_stream(aside)
        self._rotary_tables = list(model.rotary.tables.values())  # a graph reads the memory it was recorded with
        graph: torch.cuda.CUDAGraph = backend.CUDAGraph()
        with backend.graph(graph):
            self._logits = self._step(model)
        return graph

    def _step(self, model: StackedModel) -> Tensor:
        later = torch.arange(self.length, device=self.positions.device) > self.positions
        self._attn_bias.zero_().masked_fill_(later[None, :, None], -torch.inf)
        return model.logits(self.weights, batched_forward(model, self.weights, self.tokens, self))

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        heads, rows, _, head_dim = queries.shape
        kv_heads = len(keys)
        index = self.positions.view(1, -1, 1, 1).expand(kv_heads, -1, 1, head_dim)
        cached_keys, cached_values = self.cache[layer]
        cached_keys.scatter_(2, index, keys)
        cached_values.scatter_(2, index, values)
        # the query heads that share a key-value head become queries of that one head
        grouped = queries.view(kv_heads, heads // kv_heads, rows, head_dim).transpose(1, 2)
        out = functional.scaled_dot_product_attention(grouped, cached_keys, cached_values, self._attn_bias)
        return out.transpose(1, 2).reshape(heads, rows, 1, head_dim)


def _row_length(needed: int, context_length: int) -> int:
    """Slots of a row that must hold `needed` tokens: whole blocks, beyond the context only where `needed` is."""
    return max(needed, min(-(-needed // BLOCK) * BLOCK, context_length))
