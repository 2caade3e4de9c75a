"""The trajectories of a rollout as a tree of prefixes: every distinct (prompt, prefix) is one token of a forward pass.

Trajectories of a group share their prompt, identical trajectories share everything, and others share what they have in
common before they differ. Logits after a prefix depend on the prefix alone, so forwarding each once is exact, and
gathering them back to the trajectories sums their gradients exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

Indices = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class PrefixTree:
    """One cell's M distinct tokens and their placement, for attention, in L rows of S slots.

    Attributes:
        tokens: token ids.
        token_of_slot: the token in each slot; padding repeats some token.
        positions: position of each slot in its sequence.
        slot_of_token: a slot (flat index into [L, S]) that holds the token.
        output_index: tokens after which a trajectory goes on: each prompt's last, and every inner prefix.
        logits_index: which of the K output tokens predicts each token of a trajectory; 0 for padding.
        attn_bias: 0 where a slot attends to another and −inf where not; None for causal rows.
    """

    tokens: Int[Tensor, " M"]
    token_of_slot: Int[Tensor, "L S"]
    positions: Int[Tensor, "L S"]
    slot_of_token: Int[Tensor, " M"]
    output_index: Int[Tensor, " K"]
    logits_index: Int[Tensor, "N T"]
    attn_bias: Float[Tensor, "L S S"] | None

    @property
    def shape(self) -> tuple[int, ...]:
        """What must agree for cells to be computed in one batched call; it depends on the cell's trajectories alone."""
        return (len(self.tokens), *self.token_of_slot.shape, len(self.output_index), self.attn_bias is None)


def build_prefix_tree(
    prompts: Sequence[Sequence[int]], groups: Tensor, tokens: Tensor, lengths: Tensor, max_shared_row: int
) -> PrefixTree:
    """The prefix tree of some trajectories.

    Args:
        prompts: P token lists, none empty.
        groups: [N], which prompt each trajectory continues.
        tokens: [N, T], token ids.
        lengths: [N], tokens of each trajectory, at most T.
        max_shared_row: longest row in which a whole group stands. Longer groups get a causal row per distinct
            trajectory: their attention needs no explicit bias.
    """
    tree = _Builder(prompts, groups.numpy(), tokens.numpy(), lengths.numpy())
    return tree.row_per_group() if tree.group_row <= max_shared_row else tree.row_per_trajectory()


def build_unshared(prompts: Sequence[Sequence[int]], groups: Tensor, tokens: Tensor, lengths: Tensor) -> PrefixTree:
    """The same layout with nothing shared: a causal row per trajectory, prompt and completion, padded at the right."""
    N, T = tokens.shape
    starts = np.array([len(prompts[g]) for g in groups.tolist()])
    S = int(starts.max()) + max(T - 1, 0)
    ids = np.zeros((N, S), dtype=np.int64)
    for row, g in enumerate(groups.tolist()):
        ids[row, : starts[row]] = prompts[g]
        tail = min(int(lengths[row]), max(T - 1, 0))
        ids[row, starts[row] : starts[row] + tail] = tokens[row, :tail].numpy()
    output_index = (np.arange(N) * S + starts - 1)[:, None] + np.arange(T)[None, :]
    every = torch.arange(N * S)
    return PrefixTree(
        tokens=torch.from_numpy(ids).view(-1),
        token_of_slot=every.view(N, S),
        positions=torch.arange(S).expand(N, S),
        slot_of_token=every,
        output_index=torch.from_numpy(output_index).reshape(-1),
        logits_index=torch.arange(N * T).view(N, T),
        attn_bias=None,
    )


def bucket(count: int, least: int = 4) -> int:
    """`count` rounded up by at most a quarter, to a multiple of at least `least`: sizes of cells agree more often."""
    step = max(least, 1 << max(count.bit_length() - 4, 0))
    return -(-count // step) * step


class Prefixes:
    """Distinct prefixes by number: 0..P-1 are the prompts (their last tokens), then those of completions, by depth.

    Attributes:
        logits_index: [N, T], the prefix that predicts each token of a trajectory; 0 for padding.
        bounds: where each depth begins; the last entry is the number of prefixes.
        ids: token ids of the completions' prefixes, those from number P on; `parents` and `depths` likewise.
        group: of every prefix, the prompt that it continues.
    """

    def __init__(self, num_prompts: int, groups: Indices, tokens: Indices, lengths: Indices) -> None:
        P, (N, T) = num_prompts, tokens.shape
        vocabulary = int(max(tokens.max(initial=0), 0)) + 1
        ids, parents = [], []
        self.logits_index = np.zeros((N, T), dtype=np.int64)
        self.bounds = [P]
        current = groups.copy()
        for t in range(T):
            self.logits_index[:, t] = np.where(lengths > t, current, 0)
            rows = np.flatnonzero(lengths > t + 1)
            if not len(rows):
                continue
            keys, inverse = np.unique(current[rows] * vocabulary + tokens[rows, t], return_inverse=True)
            current[rows] = self.bounds[-1] + inverse
            ids.append(keys % vocabulary)
            parents.append(keys // vocabulary)
            self.bounds.append(self.bounds[-1] + len(keys))
        self.ids = np.concatenate([np.zeros(0, dtype=np.int64), *ids])
        self.parents = np.concatenate([np.zeros(0, dtype=np.int64), *parents])
        self.depths = np.repeat(np.arange(len(self.bounds) - 1), np.diff(self.bounds))
        self.group = np.concatenate([np.arange(P), np.zeros(len(self.ids), dtype=np.int64)])
        for low, high in zip(self.bounds, self.bounds[1:], strict=False):
            self.group[low:high] = self.group[self.parents[low - P : high - P]]


class _Builder(Prefixes):
    """Prefixes and their places in rows of slots."""

    def __init__(self, prompts: Sequence[Sequence[int]], groups: Indices, tokens: Indices, lengths: Indices) -> None:
        super().__init__(len(prompts), groups, tokens, lengths)
        P = len(prompts)
        self.starts = np.array([len(prompt) for prompt in prompts])
        self.offsets = np.concatenate(([0], np.cumsum(self.starts)[:-1]))
        self.prompt_tokens = np.concatenate([np.asarray(prompt, dtype=np.int64) for prompt in prompts])
        self.longest_prompt = int(self.starts.max())
        order = np.argsort(self.group[P:], kind="stable")
        counts = np.bincount(self.group[P:], minlength=P)
        self.rank = np.empty(len(self.ids), dtype=np.int64)
        self.rank[order] = np.arange(len(self.ids)) - np.repeat(np.cumsum(counts) - counts, counts)
        self.group_row = self.longest_prompt + bucket(int(counts.max(initial=0)))

    def row_per_group(self) -> PrefixTree:
        """A row per group: its prompt, then its prefixes; each attends to the prompt, its ancestors and itself."""
        P, n = len(self.starts), len(self.ids)
        L, S = self.longest_prompt, self.group_row
        token_of_slot = np.repeat(self.offsets[:, None], S, 1)
        positions = np.zeros((P, S), dtype=np.int64)
        inside = np.arange(L)[None, :] < self.starts[:, None]
        token_of_slot[:, :L] += np.where(inside, np.arange(L)[None, :], 0)
        positions[:, :L] = np.where(inside, np.arange(L)[None, :], 0)
        group, at = self.group[P:], L + self.rank
        token_of_slot[group, at] = len(self.prompt_tokens) + np.arange(n)
        positions[group, at] = self.starts[group] + self.depths
        attends = np.zeros((n, S), dtype=bool)
        attends[:, :L] = inside[group]
        # a prefix's own slot, and those of its ancestors by inheritance, level by level
        for low, high in zip(self.bounds, self.bounds[1:], strict=False):
            level = slice(low - P, high - P)
            if low > P:
                attends[level] |= attends[self.parents[level] - P]
            attends[np.arange(low - P, high - P), at[level]] = True
        attends_to = np.zeros((P, S, S), dtype=bool)
        attends_to[:, np.arange(S), np.arange(S)] = True
        attends_to[:, :L, :L] = np.tril(np.ones((L, L), dtype=bool))
        attends_to[group, at] = attends
        slot_of_token = np.concatenate([np.flatnonzero(inside) // L * S + np.flatnonzero(inside) % L, group * S + at])
        return self._tree(token_of_slot, positions, slot_of_token, attends_to)

    def row_per_trajectory(self) -> PrefixTree:
        """A causal row per distinct trajectory; a token that rows share stands in each, but is computed once."""
        P = len(self.starts)
        inner = np.zeros(P + len(self.ids), dtype=bool)
        inner[self.parents] = True
        leaves = np.flatnonzero(~inner)
        paths = [self._path(int(leaf)) for leaf in leaves]
        S = max(len(path) for path in paths)
        rows = bucket(len(paths))
        token_of_slot = np.zeros((rows, S), dtype=np.int64)
        for row, path in enumerate(paths):
            token_of_slot[row, : len(path)] = path
            token_of_slot[row, len(path) :] = path[-1]
        flat = np.concatenate([row * S + np.arange(len(path)) for row, path in enumerate(paths)])
        members = np.concatenate(paths)
        slot_of_token = np.zeros(len(self.prompt_tokens) + len(self.ids), dtype=np.int64)
        slot_of_token[members[::-1]] = flat[::-1]  # the first row that holds a token wins
        return self._tree(token_of_slot, np.broadcast_to(np.arange(S), (rows, S)).copy(), slot_of_token, None)

    def _path(self, prefix: int) -> Indices:
        P, total = len(self.starts), len(self.prompt_tokens)
        steps = []
        while prefix >= P:
            steps.append(total + prefix - P)
            prefix = int(self.parents[prefix - P])
        prompt = self.offsets[prefix] + np.arange(self.starts[prefix])
        return np.concatenate([prompt, np.array(steps[::-1], dtype=np.int64)])

    def _tree(
        self, token_of_slot: Indices, positions: Indices, slot_of_token: Indices, attends_to: NDArray[np.bool_] | None
    ) -> PrefixTree:
        P, n, total = len(self.starts), len(self.ids), len(self.prompt_tokens)
        M, K = bucket(total + n), bucket(P + n)
        tokens = np.zeros(M, dtype=np.int64)
        tokens[: total + n] = np.concatenate([self.prompt_tokens, self.ids])
        output_index = np.zeros(K, dtype=np.int64)
        output_index[: P + n] = np.concatenate([self.offsets + self.starts - 1, total + np.arange(n)])
        attn_bias = None
        if attends_to is not None:
            attn_bias = torch.zeros(attends_to.shape).masked_fill_(torch.from_numpy(~attends_to), -torch.inf)
        return PrefixTree(
            tokens=torch.from_numpy(tokens),
            token_of_slot=torch.from_numpy(token_of_slot),
            positions=torch.from_numpy(positions),
            slot_of_token=torch.from_numpy(np.concatenate([slot_of_token, np.zeros(M - total - n, dtype=np.int64)])),
            output_index=torch.from_numpy(output_index),
            logits_index=torch.from_numpy(self.logits_index),
            attn_bias=attn_bias,
        )
