"""The prefix trees of one cell while its trajectories grow by one token per step.

Each distinct prefix of a group is forwarded once, in the row of its group, where it attends to the prompt and its
ancestors. Once a row would become too long for that (long completions that share nothing any more), every trajectory
gets a row of its own. Trajectories that have ended are dropped. All of this depends on the cell's own trajectories
alone, so the cell's shapes, and with them the bits of its results, are the same whatever it is packed with.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from klab.harness.policy.prefix_tree import Indices, bucket
from klab.harness.policy.stacked.attention import MAX_EXPLICIT_KEYS


@dataclass(slots=True)
class DecodingStep:
    """One step of one cell: M new tokens in L rows of W new slots each, after S cached slots.

    Attributes:
        tokens: token ids [M].
        token_of_slot: [L, W], the new token in each slot.
        slot_of_token: [M], the slot (flat index into [L, W]) of each new token.
        positions: [L, W].
        attends: bool [L, W, S + W], which slots of its row each new slot attends to.
        token_of_trajectory: [N], the new token that each trajectory ends with.
    """

    tokens: Indices
    token_of_slot: Indices
    slot_of_token: Indices
    positions: Indices
    attends: NDArray[np.bool_]
    token_of_trajectory: Indices

    @property
    def shape(self) -> Hashable:
        """What must agree for cells to be computed in one batched call."""
        return (len(self.tokens), *self.attends.shape)


class GrowingPrefixTree:
    """N = P × group_size trajectories of one cell.

    Attributes:
        width: length of the longest prompt.
        row: [N], the row of each trajectory.
        num_rows: L.
        attends: bool [N, S], which slots of its row hold the prompt and the tokens of each trajectory.
    """

    def __init__(self, prompts: Sequence[Sequence[int]], group_size: int) -> None:
        self.prompts, self.group_size = prompts, group_size
        self.prompt_lengths = np.array([len(prompt) for prompt in prompts])
        self.width = int(self.prompt_lengths.max())
        self.row = np.repeat(np.arange(len(prompts)), group_size)
        self.num_rows = len(prompts)
        self.attends = (np.arange(self.width)[None, :] < self.prompt_lengths[:, None])[self.row]
        self._prefix = self.row.copy()
        self._next_position = self.prompt_lengths[self.row]
        self._row_per_trajectory = False

    def grow(self, tokens: Indices, unfinished: NDArray[np.bool_]) -> DecodingStep:
        """Append one token to each unfinished trajectory.

        Args:
            tokens: token ids [N]; those of finished trajectories are ignored.
            unfinished: bool [N].
        """
        live = np.flatnonzero(unfinished)
        high = int(tokens.max()) + 1
        if self._row_per_trajectory:
            first, inverse = live, np.arange(len(live))
        else:
            _, first, inverse = np.unique(
                self._prefix[live] * high + tokens[live], return_index=True, return_inverse=True
            )
            first = live[first]
        count, row = len(first), self.row[first]  # sorted by row: prefixes are numbered row by row
        per_row = np.bincount(row, minlength=self.num_rows)
        rank = np.arange(count) - np.repeat(np.cumsum(per_row) - per_row, per_row)
        W = 1 if self._row_per_trajectory else bucket(int(per_row.max()), 2)
        S = self.attends.shape[1]
        token_of_slot = np.zeros((self.num_rows, W), dtype=np.int64)
        positions = np.zeros((self.num_rows, W), dtype=np.int64)
        attends = np.zeros((self.num_rows, W, S + W), dtype=bool)
        attends[:, :, 0] = True  # a softmax over nothing would be NaN, so padding attends to something
        token_of_slot[row, rank] = np.arange(count)
        positions[row, rank] = self._next_position[first]
        attends[row, rank, :S] = self.attends[first]
        attends[row, rank, S + rank] = True
        M = bucket(count)
        padded = np.zeros((2, M), dtype=np.int64)
        padded[0, :count], padded[1, :count] = tokens[first], row * W + rank
        token_of_trajectory = np.zeros(len(self.row), dtype=np.int64)
        token_of_trajectory[live] = inverse
        grown = np.zeros((len(self.row), S + W), dtype=bool)
        grown[:, :S] = self.attends
        grown[live, S + rank[inverse]] = True
        self.attends = grown
        self._prefix[live] = inverse
        self._next_position[live] += 1
        return DecodingStep(padded[0], token_of_slot, padded[1], positions, attends, token_of_trajectory)

    def rearrange(self, unfinished: NDArray[np.bool_]) -> tuple[Indices, Indices] | None:
        """Give every unfinished trajectory a row of its own once rows are too long, fewer rows once many have ended.

        Returns:
            old rows [new rows, 1] and old slots [new rows, new slots] from which to gather what is cached by slot;
            None: everything stays where it is.
        """
        live = np.flatnonzero(unfinished)
        num_rows = bucket(len(live))
        too_long = self.attends.shape[1] > MAX_EXPLICIT_KEYS
        if not (too_long and (not self._row_per_trajectory or num_rows < self.num_rows)):
            return None
        lengths = self.attends[live].sum(1)
        S = int(lengths.max())
        slots = np.zeros((num_rows, S), dtype=np.int64)
        order = np.argsort(~self.attends[live], axis=1, kind="stable")[:, :S]
        slots[: len(live)] = order
        old_rows = np.zeros((num_rows, 1), dtype=np.int64)
        old_rows[: len(live), 0] = self.row[live]
        self.attends = np.zeros((len(self.row), S), dtype=bool)
        self.attends[live] = np.arange(S)[None, :] < lengths[:, None]
        self.row = np.zeros(len(self.row), dtype=np.int64)
        self.row[live] = np.arange(len(live))
        self.num_rows, self._row_per_trajectory = num_rows, True
        return old_rows, slots
