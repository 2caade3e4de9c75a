"""Decoding in memory at fixed addresses, where whole blocks of steps run without the host.

Every trajectory has a row of its own. Tokens are drawn on the device and stay there for the steps of a block; a
trajectory that ends its turn within one stands still until the host has seen it. The number of rows is halved when half
of the trajectories have ended, and rows are as short as their tokens allow.

The numbers are those of `KVCacheDecoder` up to rounding. Which of the two decodes is part of what determines the bits:
on GPUs this one, on CPUs the growing one, where sharing prefixes saves more; KLAB_DECODING overrules that.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from klab.grid.errors import UserError
from klab.harness.policy.categorical import Draw
from klab.harness.policy.policy import Continuation, DrawnBlock
from klab.harness.policy.prefix_tree import Indices
from klab.harness.policy.stacked.batched_layers import batched_forward
from klab.harness.policy.stacked.decoding_memory import BLOCK, bucket, halvings
from klab.harness.policy.stacked.model import StackedModel
from klab.harness.policy.stacked.prefill import Prefill
from klab.harness.policy.stacked.recorded_steps import MIN_LENGTH, MIN_ROWS, RecordedSteps

VARIABLE = "KLAB_DECODING"
KINDS = ("growing", "static")


def uses_static_cache(device: torch.device) -> bool:
    """Whether models on this device decode in fixed memory: on GPUs, unless KLAB_DECODING says `growing`.

    Raises:
        UserError: KLAB_DECODING is neither `growing` nor `static`.
    """
    chosen = os.environ.get(VARIABLE, "")
    if chosen and chosen not in KINDS:
        raise UserError("no such way of decoding", key=VARIABLE, value=chosen, allowed=KINDS)
    return chosen == "static" if chosen else device.type != "cpu"


class StaticBlockDecoder:
    """A `BlockDecoder` over recorded steps; on a CPU, which has no graphs, the same steps one by one.

    Args:
        cells: which cells of the model are decoded; the rows of others stand idle.
        prompts: token ids of those cells [cells][P][length].
        max_new_tokens: that a trajectory is expected to take at most.
        steps: the model's.
    """

    max_steps = BLOCK

    def __init__(
        self,
        model: StackedModel,
        cells: Sequence[int],
        prompts: Sequence[Sequence[Sequence[int]]],
        group_size: int,
        max_new_tokens: int,
        draw: Draw,
        steps: RecordedSteps,
        eos_token_ids: Iterable[int],
    ) -> None:
        self.model, self.cells, self.group_size, self.steps = model, list(cells), group_size, steps
        self._draw, self._eos_token_ids = draw, list(eos_token_ids)
        self._prompts: list[Sequence[Sequence[int]]] = [[] for _ in range(model.cells)]
        for cell, listed in zip(cells, prompts, strict=True):
            self._prompts[cell] = listed
        self._start_lengths = [np.repeat([len(prompt) for prompt in listed], group_size) for listed in prompts]
        self._row = [np.arange(len(listed) * group_size) for listed in prompts]
        """By decoded cell, the row of each trajectory."""
        self.rows = bucket(max(len(row) for row in self._row), MIN_ROWS)
        self._expected = min(
            max(int(each.max()) for each in self._start_lengths) + max_new_tokens, model.context_length
        )
        self.started = False

    def draw(self, continuations: Mapping[int, Continuation]) -> dict[int, DrawnBlock]:
        live = {c: np.flatnonzero(np.array(each.unfinished)) for c, each in continuations.items()}
        position = {c: self._start_lengths[c] + np.array(each.num_tokens) - 1 for c, each in continuations.items()}
        last = max(int(position[c][trajectories].max()) for c, trajectories in live.items())
        context = self.model.context_length
        if last >= context:
            raise UserError(f"sequences of {last + 1} tokens exceed the model's context", value=context)
        count = min(BLOCK, max(each.most for each in continuations.values()), context - last)
        if not self.started:
            self._prefill()
        self._fit(live, last + count)
        self._send(continuations, live, position)
        memory = self.steps.memory
        assert memory is not None
        length = next(size for size in halvings(memory.length, MIN_LENGTH) if size >= last + count)
        for step in range(count):
            if self.started or step > 0:
                self.steps.layers(self.model, self.rows, length)
            self.steps.draw(self.model, self.rows, self._draw)
        self.started = True
        places = self.rows * self.model.cells
        drawn = memory.drawn[:, :count, :places].cpu().numpy().reshape(2, count, self.rows, self.model.cells)
        found = {c: drawn[:, :, self._row[c], self.cells[c]] for c in continuations}
        return {c: DrawnBlock(each[0].astype(np.int64), each[1]) for c, each in found.items()}

    def close(self) -> None:
        self.steps.release_if_large(self.model.device)

    def _reserve(self, length: int) -> None:
        """Memory for so many slots per row, and recordings of every step that may come."""
        self.steps.reserve(self.model, self.rows, bucket(length, MIN_LENGTH), self._eos_token_ids)
        if self.model.device.type != "cpu":
            self.steps.record(self.model, self.rows, self._draw)

    def _prefill(self) -> None:
        """Forward the prompts: keys and values of every row, and the hidden state that predicts its first token."""
        model, G, device = self.model, self.group_size, self.model.device
        self._reserve(self._expected)
        memory = self.steps.memory
        assert memory is not None
        memory.kv.zero_()  # a slot that no token has reached is multiplied by 0, so it must be finite
        width = max(len(prompt) for listed in self._prompts for prompt in listed)
        P = max(len(listed) for listed in self._prompts)
        prefill = Prefill(self._prompts, P, width, device)
        weights = model.weights([range(model.cells)])[0]
        hidden = batched_forward(model, weights, prefill.tokens, prefill)
        memory.hidden[: P * G].copy_(hidden.transpose(0, 1).repeat_interleave(G, 0))
        places = P * G * model.cells
        prompt_row = torch.arange(model.cells * P, device=device).view(model.cells, P).t().repeat_interleave(G, 0)
        for layer, computed in enumerate(prefill.cache):
            for fixed, each in zip(memory.keys_values(layer, places, width), computed, strict=True):
                fixed.copy_(each.index_select(1, prompt_row.reshape(-1)))

    def _fit(self, live: Mapping[int, Indices], length: int) -> None:
        """Halve the rows where half of them are idle in every cell; move to longer rows where these are too short."""
        memory, rows = self.steps.memory, self.rows
        assert memory is not None
        if length > memory.length:
            # the environment wrote more than was expected: everything moves
            earlier = memory.kv[: rows * self.model.cells]
            hidden = memory.hidden[:rows].clone()
            before = memory.length
            del memory
            self._reserve(length)
            assert self.steps.memory is not None
            self.steps.memory.kv.zero_()
            self.steps.memory.kv[: len(earlier), :, :, :, :before].copy_(earlier)
            self.steps.memory.hidden[:rows].copy_(hidden)
            memory = self.steps.memory
        most = max(len(trajectories) for trajectories in live.values())
        sizes = [size for size in halvings(rows, MIN_ROWS) if size >= most]
        if not self.started or sizes[0] == rows:
            return
        self.rows = sizes[0]
        source, target = [], []
        for c, trajectories in live.items():
            taken = set(self._row[c][trajectories].tolist())
            free = (row for row in range(self.rows) if row not in taken)
            for trajectory in trajectories:
                row = int(self._row[c][trajectory])
                if row >= self.rows:
                    self._row[c][trajectory] = next(free)
                    source.append(row * self.model.cells + self.cells[c])
                    target.append(int(self._row[c][trajectory]) * self.model.cells + self.cells[c])
            ended = np.ones(len(self._row[c]), dtype=bool)
            ended[trajectories] = False
            self._row[c][ended] = 0  # of no meaning
        if source:
            memory.move(self._index(source), self._index(target), length)

    def _index(self, places: Sequence[int]) -> Tensor:
        return torch.tensor(places).to(self.model.device, non_blocking=True)

    def _send(
        self,
        continuations: Mapping[int, Continuation],
        live: Mapping[int, Indices],
        position: Mapping[int, Indices],
    ) -> None:
        """Tell the device where the rows stand and what they are to take."""
        memory = self.steps.memory
        assert memory is not None
        shape = (self.rows, self.model.cells)
        integers = np.zeros((3 + BLOCK, *shape), dtype=np.int64)
        integers[3:] = -1
        uniforms: NDArray[np.float64] = np.zeros((BLOCK, *shape))
        for c, each in continuations.items():
            at = (self._row[c][live[c]], self.cells[c])
            integers[(0, *at)] = np.array(each.last_tokens)[live[c]]
            integers[(1, *at)] = position[c][live[c]]
            integers[(2, *at)] = 1
            for trajectory in live[c]:
                tokens = each.forced[trajectory][:BLOCK]
                integers[3 : 3 + len(tokens), self._row[c][trajectory], self.cells[c]] = tokens
            if each.uniforms is not None:
                uniforms[(slice(None), *at)] = each.uniforms[:, live[c]]
        places = self.rows * self.model.cells
        for fixed, sent in ((memory.integers, integers), (memory.uniforms, uniforms)):
            fixed[:, :places].copy_(torch.from_numpy(sent).view(-1, places), non_blocking=True)
        memory.step.zero_()
