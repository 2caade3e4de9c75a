"""Step-by-step logits of growing trajectories, with cached keys and values.

Each distinct prefix of a group is forwarded once, in the lane of its group, where it sees the prompt and its
ancestors. Where a lane would become too long for that (long completions that share nothing any more), every
trajectory gets a lane of its own. Trajectories that have ended leave. All of this depends on one cell's trajectories
alone, so a cell's shapes, and with them its bits, are the same whatever it is packed with; cells whose shapes agree
in a step are stacked in that step.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from klab.harness.policy.stacked.attention import MAX_EXPLICIT_KEYS, attention
from klab.harness.policy.stacked.packed_layout import AttentionRows, Indices
from klab.harness.policy.stacked.prefix_tree import PrefixTreeBatch, bucket, unshared_tree

if TYPE_CHECKING:
    from klab.harness.policy.stacked.batched_layers import Weights
    from klab.harness.policy.stacked.policy import StackedPolicy

Cache = list[tuple[Tensor, Tensor]]
"""Keys and values of each layer, [kv_heads, lanes, slots, head_size]."""


class KVCacheDecoder:
    """The trajectories of every cell of a policy, growing by one token per step."""

    def __init__(self, policy: StackedPolicy, prompts: Sequence[Sequence[Sequence[int]]], group_size: int) -> None:
        self.policy = policy
        self.cells = [GrowingPrefixTree(listed, group_size) for listed in prompts]
        self.caches: dict[tuple[int, ...], Cache] = {}
        self._weights: dict[tuple[int, ...], Weights] = {}

    def start(self) -> dict[int, Tensor]:
        """Logits [N, V] of the first token of each trajectory, by cell."""
        found: dict[int, Tensor] = {}
        for cells in self.policy.stacks([(len(b.prompts), b.width) for b in self.cells]):
            prefill = _Prefill([self.cells[c] for c in cells], self.policy.device, self.policy.dtype)
            logits = self._logits(cells, prefill.tokens, prefill)
            self.caches[tuple(cells)] = prefill.cache
            for cell, each in zip(cells, logits.unbind(0), strict=True):
                found[cell] = each.repeat_interleave(self.cells[cell].group_size, 0)
        return found

    def step(self, newest: Mapping[int, Tensor], open_rows: Mapping[int, Sequence[bool]]) -> dict[int, Tensor]:
        """Logits [N, V] of the next token of every open trajectory of some cells; rows of ended ones are meaningless.

        Args:
            newest: by cell, the last token [N] of each trajectory.
            open_rows: by cell, which trajectories go on.
        """
        active = list(newest)
        plans = []
        for cell in active:
            going = np.array(open_rows[cell])
            gathered = self.cells[cell].move(going)
            if gathered is not None:
                lanes, slots = (torch.from_numpy(index).to(self.policy.device) for index in gathered)
                self._part(cell)
                self.caches[(cell,)] = [(k[:, lanes, slots], v[:, lanes, slots]) for k, v in self.caches[(cell,)]]
            plans.append(self.cells[cell].grow(newest[cell].cpu().numpy(), going))
        found: dict[int, Tensor] = {}
        caches: dict[tuple[int, ...], Cache] = {}
        for members in self.policy.stacks([plan.shape for plan in plans]):
            cells = tuple(active[m] for m in members)
            step = _Step([plans[m] for m in members], self._cache(cells), self.policy.device, self.policy.dtype)
            logits = self._logits(cells, step.tokens, step)
            caches[cells] = step.cache
            for m, each in zip(members, logits.unbind(0), strict=True):
                found[active[m]] = each.index_select(0, torch.from_numpy(plans[m].rows).to(each.device))
        self.caches = caches
        return found

    def _logits(self, cells: Sequence[int], tokens: Tensor, arrangement: _Prefill | _Step) -> Tensor:
        key = tuple(cells)
        if key not in self._weights:
            self._weights[key] = self.policy.weights([cells])[0]
        weights = self._weights[key]
        return self.policy.logits(weights, self.policy.hidden_states(weights, tokens, arrangement))

    def _cache(self, cells: tuple[int, ...]) -> Cache:
        if cells in self.caches:
            return self.caches[cells]
        for cell in cells:
            self._part(cell)
        parts = [self.caches[(cell,)] for cell in cells]
        if len(parts) == 1:
            return parts[0]
        return [
            (torch.cat([k for k, _ in layer], 1), torch.cat([v for _, v in layer], 1))
            for layer in zip(*parts, strict=True)
        ]

    def _part(self, cell: int) -> None:
        """Take apart the stack whose cache a cell is part of."""
        holder = next(key for key in self.caches if cell in key)
        if len(holder) > 1:
            cache, n = self.caches.pop(holder), len(holder)
            for at, member in enumerate(holder):
                self.caches[(member,)] = [(k.chunk(n, 1)[at], v.chunk(n, 1)[at]) for k, v in cache]


@dataclass(slots=True)
class _Plan:
    """One step of one cell: M new tokens in L lanes of W new slots each, behind S cached ones.

    tokens [M]; slots [L, W], which new token stands there; places [M], the flat slot of each; positions [L, W];
    visible [L, W, S + W]; rows [N], the new token after which each trajectory goes on.
    """

    tokens: Indices
    slots: Indices
    places: Indices
    positions: Indices
    visible: NDArray[np.bool_]
    rows: Indices

    @property
    def shape(self) -> Hashable:
        return (len(self.tokens), *self.visible.shape)

    def lanes(self, dtype: torch.dtype) -> AttentionRows:
        """As one cell of a layout."""
        hidden = torch.from_numpy(~self.visible)
        return AttentionRows(
            tokens=self.tokens,
            positions=self.positions.reshape(-1)[self.places],
            slots=self.slots,
            places=self.places,
            kept=None,
            bias=torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -torch.inf),
        )


class GrowingPrefixTree:
    """The prefix trees of one cell while they grow.

    `lane` [N] and `visible` [N, S]: the lane of each trajectory, and the slots of it that hold its prompt and prefix.
    """

    def __init__(self, prompts: Sequence[Sequence[int]], group_size: int) -> None:
        self.prompts, self.group_size = prompts, group_size
        self.lengths = np.array([len(prompt) for prompt in prompts])
        self.width = int(self.lengths.max())
        self.lane = np.repeat(np.arange(len(prompts)), group_size)
        self.lanes = len(prompts)
        self.visible = (np.arange(self.width)[None, :] < self.lengths[:, None])[self.lane]
        self.prefix = self.lane.copy()
        self.next_position = self.lengths[self.lane]
        self.apart = False

    def start(self, dtype: torch.dtype) -> AttentionRows:
        """A causal lane per prompt."""
        P, S = len(self.prompts), self.width
        places = np.arange(P * S)
        return AttentionRows(
            tokens=np.array([[*prompt, *[0] * (S - len(prompt))] for prompt in self.prompts]).reshape(-1),
            positions=np.tile(np.arange(S), P),
            slots=places.reshape(P, S),
            places=places,
            kept=np.arange(P) * S + self.lengths - 1,
            bias=torch.full((1, S, S), -torch.inf, dtype=dtype).triu_(1),
        )

    def grow(self, tokens: Indices, open_rows: NDArray[np.bool_]) -> _Plan:
        """Append one token to each open trajectory."""
        live = np.flatnonzero(open_rows)
        high = int(tokens.max()) + 1
        if self.apart:
            first, inverse = live, np.arange(len(live))
        else:
            _, first, inverse = np.unique(
                self.prefix[live] * high + tokens[live], return_index=True, return_inverse=True
            )
            first = live[first]
        count, lane = len(first), self.lane[first]  # sorted by lane: prefixes are numbered lane by lane
        per_lane = np.bincount(lane, minlength=self.lanes)
        rank = np.arange(count) - np.repeat(np.cumsum(per_lane) - per_lane, per_lane)
        W = 1 if self.apart else bucket(int(per_lane.max()), 2)
        S = self.visible.shape[1]
        slots = np.zeros((self.lanes, W), dtype=np.int64)
        positions = np.zeros((self.lanes, W), dtype=np.int64)
        visible = np.zeros((self.lanes, W, S + W), dtype=bool)
        visible[:, :, 0] = True  # padding must see something
        slots[lane, rank] = np.arange(count)
        positions[lane, rank] = self.next_position[first]
        visible[lane, rank, :S] = self.visible[first]
        visible[lane, rank, S + rank] = True
        M = bucket(count)
        padded = np.zeros((2, M), dtype=np.int64)
        padded[0, :count], padded[1, :count] = tokens[first], lane * W + rank
        rows = np.zeros(len(self.lane), dtype=np.int64)
        rows[live] = inverse
        grown = np.zeros((len(self.lane), S + W), dtype=bool)
        grown[:, :S] = self.visible
        grown[live, S + rank[inverse]] = True
        self.visible = grown
        self.prefix[live] = inverse
        self.next_position[live] += 1
        return _Plan(padded[0], slots, padded[1], positions, visible, rows)

    def move(self, open_rows: NDArray[np.bool_]) -> tuple[Indices, Indices] | None:
        """Give every open trajectory its own lane once the lanes are too long, and fewer lanes once many have ended.

        Returns:
            lanes [new lanes, 1] and slots [new lanes, new slots] from which to gather the cache; None to leave it.
        """
        live = np.flatnonzero(open_rows)
        lanes = bucket(len(live))
        if not (self.visible.shape[1] > MAX_EXPLICIT_KEYS and (not self.apart or lanes < self.lanes)):
            return None
        lengths = self.visible[live].sum(1)
        S = int(lengths.max())
        slots = np.zeros((lanes, S), dtype=np.int64)
        order = np.argsort(~self.visible[live], axis=1, kind="stable")[:, :S]
        slots[: len(live)] = order
        origin = np.zeros((lanes, 1), dtype=np.int64)
        origin[: len(live), 0] = self.lane[live]
        self.visible = np.zeros((len(self.lane), S), dtype=bool)
        self.visible[live] = np.arange(S)[None, :] < lengths[:, None]
        self.lane = np.zeros(len(self.lane), dtype=np.int64)
        self.lane[live] = np.arange(len(live))
        self.lanes, self.apart = lanes, True
        return origin, slots


class _Prefill:
    """Arrangement of the prompts' own pass: a causal lane per prompt, whose keys and values are kept."""

    def __init__(self, cells: Sequence[GrowingPrefixTree], device: torch.device, dtype: torch.dtype) -> None:
        P, S = len(cells[0].prompts), cells[0].width
        padded = [[*p, *[0] * (S - len(p))] for cell in cells for p in cell.prompts]
        self.tokens = torch.tensor(padded, device=device).view(len(cells), -1)
        self.slots = self.places = torch.arange(self.tokens.numel(), device=device)
        lengths = np.concatenate([cell.lengths for cell in cells])
        self.kept: Tensor | None = torch.from_numpy(np.arange(P * len(cells)) * S + lengths - 1).to(device)
        self.positions = torch.arange(S, device=device)[None]
        self.limit = S
        self.bias = torch.full((S, S), -torch.inf, device=device, dtype=dtype).triu_(1)[None]
        self.cache: Cache = []

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        self.cache.append((keys, values))
        return attention(queries, keys, values, self.bias)


class _Step:
    """Arrangement of one decoding step of cells whose plans have equal shapes."""

    def __init__(self, plans: Sequence[_Plan], cache: Cache, device: torch.device, dtype: torch.dtype) -> None:
        M, standing = len(plans[0].tokens), plans[0].slots.size
        self.tokens = torch.from_numpy(np.stack([p.tokens for p in plans])).to(device)
        self.positions = torch.from_numpy(np.concatenate([p.positions for p in plans])).to(device)
        self.limit = int(self.positions.max()) + 1
        slots = np.concatenate([p.slots.reshape(-1) + M * a for a, p in enumerate(plans)])
        places = np.concatenate([p.places + standing * a for a, p in enumerate(plans)])
        self.slots, self.places = torch.from_numpy(slots).to(device), torch.from_numpy(places).to(device)
        self.kept: Tensor | None = None
        hidden = torch.from_numpy(~np.concatenate([p.visible for p in plans])).to(device)
        self.bias = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, -torch.inf)
        self.cache = list(cache)

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        old_keys, old_values = self.cache[layer]
        keys, values = torch.cat((old_keys, keys), 2), torch.cat((old_values, values), 2)
        self.cache[layer] = (keys, values)
        return attention(queries, keys, values, self.bias)


class UncachedDecoder:
    """The reference path: one lane per trajectory, its whole sequence forwarded for every new token."""

    def __init__(self, policy: StackedPolicy, prompts: Sequence[Sequence[Sequence[int]]], group_size: int) -> None:
        self.policy = policy
        self.rows = [[list(prompt) for prompt in listed for _ in range(group_size)] for listed in prompts]

    def start(self) -> dict[int, Tensor]:
        return {cell: self._logits(cell) for cell in range(len(self.rows))}

    def step(self, newest: Mapping[int, Tensor], open_rows: Mapping[int, Sequence[bool]]) -> dict[int, Tensor]:
        for cell, tokens in newest.items():
            for row, token in zip(self.rows[cell], tokens.tolist(), strict=True):
                row.append(token)
        return {cell: self._logits(cell) for cell in newest}

    def _logits(self, cell: int) -> Tensor:
        N = len(self.rows[cell])
        nothing = torch.zeros((N, 1), dtype=torch.long)
        forest = unshared_tree(self.rows[cell], torch.arange(N), nothing, nothing.view(-1))
        grove = PrefixTreeBatch([forest], self.policy.device, self.policy.dtype)
        weights = self.policy.weights([[cell]])[0]
        return self.policy.logits(weights, self.policy.hidden_states(weights, grove.tokens, grove))[0]
