"""Micro-batches: parts of a rollout that fit in memory, and that processes can share out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from klab.harness.policy.footprint import SAMPLING_FACTOR
from klab.harness.policy.rollout import Rollout
from klab.harness.training.distributed.process_group import SINGLE_PROCESS, ProcessGroup

MicroBatch = tuple[Rollout, slice]
"""Some rows of a cell's rollout, and which ones."""

PackMicroBatch = tuple[MicroBatch, ...]
"""One micro-batch of every cell of a pack: what goes through the stacked policies together."""


@dataclass(frozen=True, slots=True)
class MemoryBudget:
    """What may go through a policy at once. It changes memory and time, no gradient.

    Attributes:
        rows: trajectories.
        tokens: of completions (environment tokens included) and of one prompt per group; None: any number.
        parts: in how many parts at least a rollout is sampled.
    """

    rows: int | None = None
    tokens: int | None = None
    parts: int = 1

    def halved(self, rows: int) -> MemoryBudget:
        """Half of this budget for rollouts of `rows` trajectories."""
        tokens = None if self.tokens is None else max(1, self.tokens // 2)
        return MemoryBudget(min(rows, self.rows or rows) // 2, tokens, 2 * self.parts)

    def sampling_slices(self, lengths: Sequence[int], group_size: int, max_new_tokens: int) -> list[slice]:
        """Prompts to sample together, given their lengths: as many as fit if every completion takes `max_new_tokens`,
        in about equal parts."""
        count = -(-len(lengths) // self.parts)
        if self.tokens is not None:
            group = group_size * (max(lengths) + max_new_tokens)
            count = min(count, max(1, SAMPLING_FACTOR * self.tokens // group))
        count = -(-len(lengths) // -(-len(lengths) // count))
        return [slice(start, min(start + count, len(lengths))) for start in range(0, len(lengths), count)]


UNLIMITED = MemoryBudget()


def micro_batches(rollout: Rollout, budget: MemoryBudget) -> list[MicroBatch]:
    """Cut a rollout into parts within the budget: whole groups where they fit, else parts of one, at least one row."""
    rows, size = rollout.tokens.shape[0], rollout.group_size
    most, most_tokens = budget.rows or rows, budget.tokens or math.inf
    if rows <= most and budget.tokens is None:
        return [(rollout, slice(0, rows))]
    own = rollout.on_host.lengths.tolist()
    bounds: list[tuple[int, int]] = []
    first, spent = 0, 0  # of the piece that is being filled with whole groups
    for group, prompt in enumerate(rollout.prompts):
        start, end = group * size, (group + 1) * size
        cost = len(prompt) + sum(own[start:end])
        if start > first and (end - first > most or spent + cost > most_tokens):
            bounds.append((first, start))
            first, spent = start, 0
        spent += cost
        if end - first > most or spent > most_tokens:
            bounds += _parts(len(prompt), own, start, end, most, most_tokens)
            first, spent = end, 0
    if first < rows:
        bounds.append((first, rows))
    if len(bounds) == 1:
        return [(rollout, slice(0, rows))]
    return [(rollout.slice_rows(first, last), slice(first, last)) for first, last in bounds]


def _parts(
    prompt: int, own: Sequence[int], start: int, end: int, most: int, most_tokens: float
) -> list[tuple[int, int]]:
    """Cut one group that exceeds the budget; `prompt` is the length of its prompt."""
    bounds, first, spent = [], start, prompt
    for row in range(start, end):
        if row > first and (row - first >= most or spent + own[row] > most_tokens):
            bounds.append((first, row))
            first, spent = row, prompt
        spent += own[row]
    return [*bounds, (first, end)]


def align_micro_batches(pieces: Sequence[Sequence[MicroBatch]]) -> list[PackMicroBatch]:
    """Transpose micro-batches [cell][index] to [index][cell].

    A cell that has fewer than others is padded with its first micro-batch, marked as having no rows: it takes part in
    the stacked forward pass, and its result is not used.
    """
    most = max(len(listed) for listed in pieces)
    padded = [[*listed, *[(listed[0][0], slice(0, 0))] * (most - len(listed))] for listed in pieces]
    return list(zip(*padded, strict=True))


def is_padding(piece: MicroBatch) -> bool:
    """Whether a micro-batch stands for none of the cell's rows."""
    return bool(piece[1].start == piece[1].stop)


def idle_micro_batch(like: PackMicroBatch) -> PackMicroBatch:
    """The first row of each cell's micro-batch, marked as having no rows."""
    return tuple((rollout.slice_rows(0, 1), slice(0, 0)) for rollout, _ in like)


def pack_micro_batches(
    rollouts: Sequence[Rollout], budget: MemoryBudget, process_group: ProcessGroup = SINGLE_PROCESS
) -> list[PackMicroBatch]:
    """Micro-batches of a pack within the budget; at least one per process where a cell has as many rows."""
    return align_micro_batches(
        [micro_batches(rollout, _at_most_a_share(budget, rollout, process_group)) for rollout in rollouts]
    )


def map_micro_batches(
    rollouts: Sequence[Rollout],
    budget: MemoryBudget,
    work: Callable[[list[Rollout]], list[Tensor]],
    process_group: ProcessGroup = SINGLE_PROCESS,
) -> list[Tensor]:
    """Apply `work` to all rows of every cell, one micro-batch at a time, shared out among the processes."""
    every = pack_micro_batches(rollouts, budget, process_group)
    found = {index: work([piece for piece, _ in every[index]]) for index in process_group.assigned(len(every))}
    passes: dict[int, list[Tensor]] = {}
    for part in process_group.all_gather_object("rows", lambda: found, rollouts[0].tokens.device):
        passes |= part
    return [
        torch.cat([passes[index][c] for index, pieces in enumerate(every) if not is_padding(pieces[c])])
        for c in range(len(rollouts))
    ]


def _at_most_a_share(budget: MemoryBudget, rollout: Rollout, process_group: ProcessGroup) -> MemoryBudget:
    if process_group.size == 1:
        return budget
    groups, size = len(rollout.prompts), rollout.group_size
    part = (
        -(-groups // process_group.size) * size
        if groups >= process_group.size
        else -(-groups * size // process_group.size)
    )
    return replace(budget, rows=min(budget.rows or part, part))
