"""The tokens of one cell's pass as trees, as the compiled layers read them: every token knows the one before it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from klab.harness.policy.prefix_tree import Prefixes

Indices = NDArray[np.int64]
Rows = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class TokenTrees:
    """M new tokens of one cell, after `start` earlier ones.

    Attributes:
        tokens: token ids [M].
        parents: int32 [start + M], of all tokens so far the row of the token before; -1 where a sequence begins.
        positions: int32 [M], position of each new token in its sequence.
        outputs: [J], ascending, the new tokens (from 0) whose final states are wanted.
        longest: tokens of the longest sequence.
        start: number of earlier tokens.
    """

    tokens: Indices
    parents: Rows
    positions: Rows
    outputs: Indices
    longest: int
    start: int = 0

    @property
    def attended(self) -> int:
        """Sum over the new tokens of the tokens that each attends to."""
        return int(self.positions.sum()) + len(self.positions)

    @property
    def attended_by_outputs(self) -> int:
        """The same of the outputs."""
        return int(self.positions[self.outputs].sum()) + len(self.outputs)


def prompt_trees(prompts: Sequence[Sequence[int]]) -> TokenTrees:
    """Prompts one after the other; wanted are their last tokens."""
    lengths = np.array([len(prompt) for prompt in prompts])
    ends = np.cumsum(lengths)
    positions = np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)
    return TokenTrees(
        tokens=np.concatenate([np.asarray(prompt, dtype=np.int64) for prompt in prompts]),
        parents=np.where(positions > 0, np.arange(ends[-1]) - 1, -1).astype(np.int32),
        positions=positions.astype(np.int32),
        outputs=ends - 1,
        longest=int(lengths.max()),
    )


def rollout_trees(prompts: Sequence[Sequence[int]], prefixes: Prefixes) -> TokenTrees:
    """Prompts, then every distinct prefix of their completions in the order in which `GrowingTrees` meets them; wanted
    are the prompts' last tokens and all prefixes: output number k is prefix number k."""
    start = prompt_trees(prompts)
    total = len(start.tokens)
    row = np.concatenate([start.outputs, total + np.arange(len(prefixes.ids))])
    ends = start.positions[start.outputs[prefixes.group[len(prompts) :]]]
    positions = np.concatenate([start.positions, (ends + 1 + prefixes.depths).astype(np.int32)])
    return TokenTrees(
        tokens=np.concatenate([start.tokens, prefixes.ids]),
        parents=np.concatenate([start.parents, row[prefixes.parents].astype(np.int32)]),
        positions=positions,
        outputs=row,
        longest=int(positions.max()) + 1,
    )


def joined(passes: Sequence[TokenTrees]) -> TokenTrees:
    """The tokens of consecutive passes, the first of which has no earlier ones, as one."""
    return TokenTrees(
        tokens=np.concatenate([each.tokens for each in passes]),
        parents=passes[-1].parents,
        positions=np.concatenate([each.positions for each in passes]),
        outputs=np.concatenate([each.outputs + each.start for each in passes]),
        longest=passes[-1].longest,
    )


class GrowingTrees:
    """The trajectories of one cell, N = P × group_size, while they grow by one token per step.

    Trajectories of a group that agree so far are one: each distinct prefix is a token of one step, computed once.

    Attributes:
        parents: of all tokens so far.
    """

    def __init__(self, prompts: Sequence[Sequence[int]], group_size: int) -> None:
        self.prompts = prompt_trees(prompts)
        self.parents = self.prompts.parents
        self._row = np.repeat(self.prompts.outputs, group_size)
        self._position = self.prompts.positions[self._row]
        self._longest = self.prompts.longest

    def grow(self, tokens: Indices, unfinished: NDArray[np.bool_]) -> tuple[TokenTrees, Indices]:
        """Append one token to each unfinished trajectory.

        Args:
            tokens: token ids [N]; those of finished trajectories are ignored.
            unfinished: bool [N].

        Returns:
            the new tokens, and for each trajectory [N] which of them it ends with; 0 for finished ones.
        """
        live, start = np.flatnonzero(unfinished), len(self.parents)
        keys = self._row[live] * (int(tokens.max()) + 1) + tokens[live]
        order = keys.argsort(kind="stable")
        ordered = keys[order]
        new = np.ones(len(order), dtype=bool)
        np.not_equal(ordered[1:], ordered[:-1], out=new[1:])
        number = np.empty(len(order), dtype=np.int64)
        number[order] = new.cumsum() - 1
        first = live[order[new]]
        self.parents = np.concatenate([self.parents, self._row[first].astype(np.int32)])
        self._row[live] = start + number
        self._position[live] += 1
        found = np.zeros(len(tokens), dtype=np.int64)
        found[live] = number
        positions = self._position[first]
        self._longest = max(self._longest, int(positions.max()) + 1)
        return TokenTrees(tokens[first], self.parents, positions, np.arange(len(first)), self._longest, start), found
