"""One cell's trajectories as a forest of prefixes: every distinct (prompt, prefix) is one token of the forward pass.

Trajectories of a group share their prompt, identical trajectories share everything, and others share as long as they
agree. Logits after a prefix depend on the prefix alone, so forwarding each once is exact, and gathering them back to
the trajectories sums their gradients exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from klab.harness.policy.stacked.attention import MAX_EXPLICIT_KEYS, attention
from klab.harness.policy.stacked.packed_layout import AttentionRows, Indices


@dataclass(frozen=True, slots=True)
class PrefixTree:
    """Where one cell's tokens stand: M tokens, L lanes of S slots, K kept tokens (whose logits some trajectory needs).

    Attributes:
        tokens: ids [M].
        slots: [L, S], the token in each slot; padding repeats some token.
        positions: [L, S].
        places: [M], a slot (flat) in which each token stands.
        kept: [K], the tokens after which a token was drawn: each prompt's last, and every prefix that goes on.
        source: [N, T], the kept token before each token of a trajectory; 0 where there is none.
        bias: [L, S, S], or None for causal lanes.
    """

    tokens: Tensor
    slots: Tensor
    positions: Tensor
    places: Tensor
    kept: Tensor
    source: Tensor
    bias: Tensor | None

    @property
    def shape(self) -> tuple[int, ...]:
        """What must agree for cells to be stacked. A function of the one cell's trajectories."""
        return (len(self.tokens), *self.slots.shape, len(self.kept), self.bias is None)

    def lanes(self, dtype: torch.dtype) -> AttentionRows:
        """As one cell of a layout."""
        bias = _causal(self.slots.shape[1]) if self.bias is None else self.bias
        places = self.places.numpy()
        return AttentionRows(
            tokens=self.tokens.numpy(),
            positions=self.positions.numpy().reshape(-1)[places],
            slots=self.slots.numpy(),
            places=places,
            kept=self.kept.numpy(),
            bias=bias.to(dtype),
            unique=self.bias is not None,
        )


class PrefixTreeBatch:
    """Forests of A cells with equal shapes: the arrangement of a forward pass that scores trajectories."""

    def __init__(self, forests: Sequence[PrefixTree], device: torch.device, dtype: torch.dtype) -> None:
        first = forests[0]
        M, standing = len(first.tokens), first.slots.numel()
        self.tokens = torch.stack([f.tokens for f in forests]).to(device)
        self.positions = torch.cat([f.positions for f in forests]).to(device)
        self.limit = int(self.positions.max()) + 1
        self.slots = _offset([f.slots.reshape(-1) for f in forests], M).to(device)
        self.places = _offset([f.places for f in forests], standing).to(device)
        self.kept: Tensor | None = _offset([f.kept for f in forests], M).to(device)
        self.bias = None
        if first.bias is not None:
            self.bias = torch.cat([f.bias for f in forests if f.bias is not None]).to(device, dtype)

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return attention(queries, keys, values, self.bias)


def _causal(slots: int) -> Tensor:
    return torch.full((1, slots, slots), -torch.inf).triu_(1)


def _offset(indices: list[Tensor], size: int) -> Tensor:
    return torch.cat([index + size * cell for cell, index in enumerate(indices)])


def bucket(count: int, least: int = 4) -> int:
    """`count` rounded up by at most a quarter (to a multiple of `least` at least): cells of a pack agree more often."""
    step = max(least, 1 << max(count.bit_length() - 4, 0))
    return -(-count // step) * step


def build_prefix_tree(prompts: Sequence[Sequence[int]], groups: Tensor, tokens: Tensor, lengths: Tensor) -> PrefixTree:
    """The forest of trajectories with every shared prefix merged.

    Args:
        prompts: P token lists, none empty.
        groups: [N], which prompt each trajectory continues.
        tokens: [N, T].
        lengths: [N], tokens of each trajectory, at most T.
    """
    tree = _Tree(prompts, groups.numpy(), tokens.numpy(), lengths.numpy())
    return tree.by_group() if tree.width + tree.group_width <= MAX_EXPLICIT_KEYS else tree.by_trajectory()


def unshared_tree(prompts: Sequence[Sequence[int]], groups: Tensor, tokens: Tensor, lengths: Tensor) -> PrefixTree:
    """The same with nothing shared: a causal lane per trajectory, prompt and completion, padded at the right."""
    N, T = tokens.shape
    starts = np.array([len(prompts[g]) for g in groups.tolist()])
    S = int(starts.max()) + max(T - 1, 0)
    ids = np.zeros((N, S), dtype=np.int64)
    for row, g in enumerate(groups.tolist()):
        ids[row, : starts[row]] = prompts[g]
        tail = min(int(lengths[row]), max(T - 1, 0))
        ids[row, starts[row] : starts[row] + tail] = tokens[row, :tail].numpy()
    kept = (np.arange(N) * S + starts - 1)[:, None] + np.arange(T)[None, :]
    everything = torch.arange(N * S)
    return PrefixTree(
        tokens=torch.from_numpy(ids).view(-1),
        slots=everything.view(N, S),
        positions=torch.arange(S).expand(N, S),
        places=everything,
        kept=torch.from_numpy(kept).reshape(-1),
        source=torch.arange(N * T).view(N, T),
        bias=None,
    )


class _Tree:
    """Prefixes numbered: 0..P-1 stand for the prompts (their last tokens), then the completions' prefixes by depth."""

    def __init__(self, prompts: Sequence[Sequence[int]], groups: Indices, tokens: Indices, lengths: Indices) -> None:
        self.groups = groups
        self.starts = np.array([len(prompt) for prompt in prompts])
        self.offsets = np.concatenate(([0], np.cumsum(self.starts)[:-1]))
        self.prompt_tokens = np.concatenate([np.asarray(prompt, dtype=np.int64) for prompt in prompts])
        self.width = int(self.starts.max())
        P, (N, T) = len(prompts), tokens.shape
        vocabulary = int(max(tokens.max(initial=0), 0)) + 1
        ids, parents = [], []
        self.source = np.zeros((N, T), dtype=np.int64)
        self.bounds = [P]
        current = groups.copy()
        for t in range(T):
            self.source[:, t] = np.where(lengths > t, current, 0)
            rows = np.flatnonzero(lengths > t + 1)
            if not len(rows):
                continue
            keys, inverse = np.unique(current[rows] * vocabulary + tokens[rows, t], return_inverse=True)
            current[rows] = self.bounds[-1] + inverse
            ids.append(keys % vocabulary)
            parents.append(keys // vocabulary)
            self.bounds.append(self.bounds[-1] + len(keys))
        self.ends = current
        self.lengths = lengths
        self.ids = np.concatenate([np.zeros(0, dtype=np.int64), *ids])
        self.parents = np.concatenate([np.zeros(0, dtype=np.int64), *parents])
        self.depths = np.repeat(np.arange(len(self.bounds) - 1), np.diff(self.bounds))
        self.group = np.concatenate([np.arange(P), np.zeros(len(self.ids), dtype=np.int64)])
        for low, high in zip(self.bounds, self.bounds[1:], strict=False):
            self.group[low:high] = self.group[self.parents[low - P : high - P]]
        order = np.argsort(self.group[P:], kind="stable")
        counts = np.bincount(self.group[P:], minlength=P)
        self.rank = np.empty(len(self.ids), dtype=np.int64)
        self.rank[order] = np.arange(len(self.ids)) - np.repeat(np.cumsum(counts) - counts, counts)
        self.group_width = bucket(int(counts.max(initial=0)))

    def by_group(self) -> PrefixTree:
        """A lane per group: its prompt, then all its prefixes; a prefix sees the prompt, its ancestors and itself."""
        P, n = len(self.starts), len(self.ids)
        L, S = self.width, self.width + self.group_width
        slots = np.repeat(self.offsets[:, None], S, 1)
        positions = np.zeros((P, S), dtype=np.int64)
        inside = np.arange(L)[None, :] < self.starts[:, None]
        slots[:, :L] += np.where(inside, np.arange(L)[None, :], 0)
        positions[:, :L] = np.where(inside, np.arange(L)[None, :], 0)
        group, at = self.group[P:], L + self.rank
        slots[group, at] = len(self.prompt_tokens) + np.arange(n)
        positions[group, at] = self.starts[group] + self.depths
        sees = np.zeros((n, S), dtype=bool)
        sees[:, :L] = inside[group]
        # a prefix's own slot, and those of its ancestors by inheritance, level by level
        for low, high in zip(self.bounds, self.bounds[1:], strict=False):
            level = slice(low - P, high - P)
            if low > P:
                sees[level] |= sees[self.parents[level] - P]
            sees[np.arange(low - P, high - P), at[level]] = True
        visible = np.zeros((P, S, S), dtype=bool)
        visible[:, np.arange(S), np.arange(S)] = True
        visible[:, :L, :L] = np.tril(np.ones((L, L), dtype=bool))
        visible[group, at] = sees
        places = np.concatenate([np.flatnonzero(inside) // L * S + np.flatnonzero(inside) % L, group * S + at])
        return self._forest(slots, positions, places, visible)

    def by_trajectory(self) -> PrefixTree:
        """A causal lane per distinct trajectory; a token that lanes share stands in each, and is computed once."""
        P = len(self.starts)
        inner = np.zeros(P + len(self.ids), dtype=bool)
        inner[self.parents] = True
        leaves = np.flatnonzero(~inner)
        paths = [self._path(int(leaf)) for leaf in leaves]
        S = max(len(path) for path in paths)
        lanes = bucket(len(paths))
        slots = np.zeros((lanes, S), dtype=np.int64)
        for lane, path in enumerate(paths):
            slots[lane, : len(path)] = path
            slots[lane, len(path) :] = path[-1]
        flat = np.concatenate([lane * S + np.arange(len(path)) for lane, path in enumerate(paths)])
        members = np.concatenate(paths)
        places = np.zeros(len(self.prompt_tokens) + len(self.ids), dtype=np.int64)
        places[members[::-1]] = flat[::-1]  # the first lane that holds a token wins
        return self._forest(slots, np.broadcast_to(np.arange(S), (lanes, S)).copy(), places, None)

    def _path(self, prefix: int) -> Indices:
        P, total = len(self.starts), len(self.prompt_tokens)
        steps = []
        while prefix >= P:
            steps.append(total + prefix - P)
            prefix = int(self.parents[prefix - P])
        prompt = self.offsets[prefix] + np.arange(self.starts[prefix])
        return np.concatenate([prompt, np.array(steps[::-1], dtype=np.int64)])

    def _forest(
        self, slots: Indices, positions: Indices, places: Indices, visible: NDArray[np.bool_] | None
    ) -> PrefixTree:
        P, n, total = len(self.starts), len(self.ids), len(self.prompt_tokens)
        M, K = bucket(total + n), bucket(P + n)
        tokens = np.zeros(M, dtype=np.int64)
        tokens[: total + n] = np.concatenate([self.prompt_tokens, self.ids])
        kept = np.zeros(K, dtype=np.int64)
        kept[: P + n] = np.concatenate([self.offsets + self.starts - 1, total + np.arange(n)])
        bias = None
        if visible is not None:
            bias = torch.zeros(visible.shape).masked_fill_(torch.from_numpy(~visible), -torch.inf)
        return PrefixTree(
            tokens=torch.from_numpy(tokens),
            slots=torch.from_numpy(slots),
            positions=torch.from_numpy(positions),
            places=torch.from_numpy(np.concatenate([places, np.zeros(M - total - n, dtype=np.int64)])),
            kept=torch.from_numpy(kept),
            source=torch.from_numpy(self.source),
            bias=bias,
        )
