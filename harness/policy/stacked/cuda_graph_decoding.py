"""Step-by-step logits with keys and values in fixed memory, so that a step is one replayed CUDA graph.

Every trajectory has a lane of its own, in which the token at position p stands in slot p. A step of a small model
consists of hundreds of kernels that run shorter than they take to launch; recorded once, they are launched together.
Lanes are halved when half of the trajectories have ended, and slots are added in blocks: few shapes, few recordings,
kept from rollout to rollout (weights change in place).

The numbers are those of `Decoding` up to rounding. Which of the two is used is part of what makes the bits: GPUs decode
in fixed memory, CPUs in growing memory, where sharing prefixes saves more; KLAB_DECODING overrules that.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from klab.grid.errors import UserError
from klab.harness.policy.stacked.attention import attention
from klab.harness.policy.stacked.packed_layout import Indices

if TYPE_CHECKING:
    from klab.harness.policy.stacked.batched_layers import Weights
    from klab.harness.policy.stacked.policy import StackedPolicy


VARIABLE = "KLAB_DECODING"
KINDS = ("growing", "static")
BLOCK = 128
"""Slots are added in multiples of this."""

FEWEST_LANES = 8
SHAPES_KEPT = 4
"""Recordings per policy, each with its keys and values; the least recently used one makes room."""

_tapes: WeakKeyDictionary[StackedPolicy, OrderedDict[tuple[int, int], GraphRunner]] = WeakKeyDictionary()


def uses_static_cache(device: torch.device) -> bool:
    """Whether policies on this device decode in fixed memory: on GPUs, unless KLAB_DECODING says `growing`.

    Raises:
        UserError: KLAB_DECODING is something else.
    """
    chosen = os.environ.get(VARIABLE, "")
    if chosen and chosen not in KINDS:
        raise UserError("no such way of decoding", key=VARIABLE, value=chosen, allowed=KINDS)
    return chosen == "static" if chosen else device.type == "cuda"


def forget() -> None:
    """Let go of all recordings, and of the memory that they hold."""
    _tapes.clear()


class StaticCacheDecoder:
    """The trajectories of every cell of a policy, growing by one token per step in lanes of equal length.

    Args:
        capture: record CUDA graphs; on a CPU there are none.
    """

    def __init__(
        self, policy: StackedPolicy, prompts: Sequence[Sequence[Sequence[int]]], group_size: int, capture: bool = True
    ) -> None:
        self.policy, self.prompts, self.group_size = policy, prompts, group_size
        self.capture = capture and policy.device.type == "cuda"
        self.lanes = max(len(listed) for listed in prompts) * group_size
        self.lane = [np.arange(len(listed) * group_size) for listed in prompts]
        self.positions = np.zeros((len(prompts), self.lanes), dtype=np.int64)
        for c, listed in enumerate(prompts):
            self.positions[c, : len(self.lane[c])] = np.repeat([len(prompt) for prompt in listed], group_size)

    def start(self) -> dict[int, Tensor]:
        """Logits [N, V] of the first token of each trajectory, by cell."""
        policy, device, C = self.policy, self.policy.device, len(self.prompts)
        width = max(len(prompt) for listed in self.prompts for prompt in listed)
        P = self.lanes // self.group_size
        padded = np.zeros((C, P, width), dtype=np.int64)
        last = np.zeros((C, P), dtype=np.int64)
        for c, listed in enumerate(self.prompts):
            for p, prompt in enumerate(listed):
                padded[c, p, : len(prompt)] = prompt
                last[c, p] = len(prompt) - 1
        reading = _Reading(C * P, width, torch.from_numpy(last.reshape(-1)).to(device))
        weights = policy.weights([range(C)])[0]
        tokens = torch.from_numpy(padded).to(device).view(C, -1)
        logits = policy.logits(weights, policy.hidden_states(weights, tokens, reading))
        origin = torch.arange(C * P, device=device).repeat_interleave(self.group_size)
        self.tape = self._tape(_length(width + 1, policy.context_length))
        for (keys, values), (read_keys, read_values) in zip(self.tape.cache, reading.cache, strict=True):
            for fixed, read in ((keys, read_keys), (values, read_values)):
                fixed[:, :, :width] = read.index_select(1, origin)
        return {
            c: each[: len(self.prompts[c])].repeat_interleave(self.group_size, 0)
            for c, each in enumerate(logits.unbind(0))
        }

    def step(self, newest: Mapping[int, Tensor], open_rows: Mapping[int, Sequence[bool]]) -> dict[int, Tensor]:
        """Logits [N, V] of the next token of every open trajectory of some cells; rows of ended ones are meaningless.

        Args:
            newest: by cell, the last token [N] of each trajectory.
            open_rows: by cell, which trajectories go on.
        """
        live = {c: np.flatnonzero(np.array(open_rows[c])) for c in newest}
        self._make_room(live)
        tokens, positions = np.zeros_like(self.positions), np.zeros_like(self.positions)
        for c, rows in live.items():
            at = self.lane[c][rows]
            tokens[c, at] = newest[c].cpu().numpy()[rows]
            positions[c, at] = self.positions[c, at]
            self.positions[c, at] += 1
        logits = self.tape.run(self.policy, tokens, positions, self.capture)
        device = self.policy.device
        return {c: logits[c].index_select(0, torch.from_numpy(self.lane[c]).to(device)) for c in newest}

    def _make_room(self, live: Mapping[int, Indices]) -> None:
        """Fewer lanes where half of them are idle in every cell, more slots where some lane is full."""
        most = max(len(rows) for rows in live.values())
        needed = 1 + max(int(self.positions[c, self.lane[c][rows]].max(initial=0)) for c, rows in live.items())
        old, lanes = self.tape, self.lanes
        while lanes // 2 >= max(most, FEWEST_LANES):
            lanes //= 2
        length = old.length if needed <= old.length else _length(needed, self.policy.context_length)
        if (lanes, length) == (self.lanes, old.length):
            return
        origin, before = np.zeros((len(self.prompts), lanes), dtype=np.int64), self.positions
        origin += np.arange(len(self.prompts))[:, None] * self.lanes
        self.positions = np.zeros((len(self.prompts), lanes), dtype=np.int64)
        for c, rows in live.items():
            at = self.lane[c][rows]
            origin[c, : len(rows)] += at
            self.positions[c, : len(rows)] = before[c, at]
            self.lane[c] = np.zeros_like(self.lane[c])
            self.lane[c][rows] = np.arange(len(rows))
        self.lanes = lanes
        self.tape = self._tape(length)
        index = torch.from_numpy(origin.reshape(-1)).to(self.policy.device)
        for new, held in zip(self.tape.cache, old.cache, strict=True):
            for fixed, earlier in zip(new, held, strict=True):
                fixed[:, :, : old.length] = earlier.index_select(1, index)

    def _tape(self, length: int) -> GraphRunner:
        """The recording of the present shape, its keys and values all zero."""
        kept = _tapes.setdefault(self.policy, OrderedDict())
        key = (self.lanes, length)
        if key not in kept:
            if len(kept) >= SHAPES_KEPT:
                kept.popitem(last=False)
            kept[key] = GraphRunner(self.policy, len(self.prompts), self.lanes, length)
        kept.move_to_end(key)
        kept[key].clear()
        return kept[key]


class GraphRunner:
    """One decoding step of C cells in L lanes of `length` slots each, in memory that stays where it is.

    It is the arrangement of that step. Keys and values: [kv_heads, C·L, length, head_size] of every layer.
    """

    def __init__(self, policy: StackedPolicy, cells: int, lanes: int, length: int) -> None:
        a, device = policy.architecture, policy.device
        self.length = self.limit = length
        self.weights: Weights = policy.weights([range(cells)])[0]
        self.tokens = torch.zeros((cells, lanes), dtype=torch.long, device=device)
        self.positions = torch.zeros((cells * lanes, 1), dtype=torch.long, device=device)
        self.slots = self.places = torch.arange(cells * lanes, device=device)
        self.kept: Tensor | None = None
        shape = (2, a.num_kv_heads, cells * lanes, length, a.head_dim)
        self.cache = [torch.zeros(shape, dtype=policy.dtype, device=device).unbind(0) for _ in range(a.num_layers)]
        self._bias = torch.zeros((1, cells * lanes, 1, length), dtype=policy.dtype, device=device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits = torch.zeros(0)
        self._tables: list[tuple[Tensor, Tensor]] = []

    def clear(self) -> None:
        """What is in a slot that no token has reached must be finite: it is multiplied by 0."""
        for pair in self.cache:
            for fixed in pair:
                fixed.zero_()

    def run(self, policy: StackedPolicy, tokens: Indices, positions: Indices, capture: bool) -> Tensor:
        """Logits [C, L, V] after one more token per lane, [C, L]; the next call overwrites them."""
        self.tokens.copy_(torch.from_numpy(tokens))
        self.positions.copy_(torch.from_numpy(positions).view(-1, 1))
        if not capture:
            return self._step(policy)
        if self._graph is None:
            self._graph = self._record(policy)
        self._graph.replay()
        return self._logits

    def _record(self, policy: StackedPolicy) -> torch.cuda.CUDAGraph:
        """Record a step. Libraries set themselves up in a step before it, which writes the same keys and values."""
        aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            self._step(policy)
        torch.cuda.current_stream().wait_stream(aside)
        self._tables = list(policy.rotary.tables.values())  # a recording reads the memory that it was made with
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._logits = self._step(policy)
        return graph

    def _step(self, policy: StackedPolicy) -> Tensor:
        ahead = torch.arange(self.length, device=self.positions.device) > self.positions
        self._bias.zero_().masked_fill_(ahead[None, :, None], -torch.inf)
        return policy.logits(self.weights, policy.hidden_states(self.weights, self.tokens, self))

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        H, lanes, _, size = queries.shape
        N = len(keys)
        at = self.positions.view(1, -1, 1, 1).expand(N, -1, 1, size)
        held_keys, held_values = self.cache[layer]
        held_keys.scatter_(2, at, keys)
        held_values.scatter_(2, at, values)
        # the heads that share keys are queries of one head
        together = queries.view(N, H // N, lanes, size).transpose(1, 2)
        mixed = functional.scaled_dot_product_attention(together, held_keys, held_values, self._bias)
        return mixed.transpose(1, 2).reshape(H, lanes, 1, size)


class _Reading:
    """Arrangement of the prompts' own pass: a causal lane per prompt, whose keys and values are kept."""

    def __init__(self, lanes: int, width: int, last: Tensor) -> None:
        self.slots = self.places = torch.arange(lanes * width, device=last.device)
        self.positions = torch.arange(width, device=last.device)[None]
        self.limit = width
        self.kept: Tensor | None = torch.arange(lanes, device=last.device) * width + last
        self.cache: list[tuple[Tensor, Tensor]] = []

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        self.cache.append((keys, values))
        return attention(queries, keys, values, None)


def _length(needed: int, context: int) -> int:
    """Slots of a lane that must hold `needed` tokens; more than the context only where these are."""
    return max(needed, min(-(-needed // BLOCK) * BLOCK, context))
