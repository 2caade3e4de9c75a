"""Decoding steps as CUDA graphs over memory at fixed addresses: recorded once for every size, replayed ever after.

A step of a small model is hundreds of kernels that run for less time than they take to launch. Two graphs make a step:
the layers, recorded for every number of rows and of slots, and the drawing of the next tokens, recorded for every
number of rows and way of drawing. They share one pool of memory. Weights change in place, so that graphs stay valid.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from klab.harness.policy.categorical import Draw
from klab.harness.policy.stacked.batched_layers import batched_forward
from klab.harness.policy.stacked.decoding_memory import DecodingMemory, halvings
from klab.harness.policy.stacked.model import StackedModel, Weights

MIN_ROWS = 8
MIN_LENGTH = 128
"""Fewest rows per cell and fewest slots that a step is recorded for."""

MAX_DRAWN_LOGITS = 2**26
"""Logits that are held at once while tokens are drawn, each in three or four tensors of 4 or 8 bytes."""

KEPT_SHARE = 1 / 8
"""Share of a device's memory up to which decoding keeps its own between rollouts."""


class RecordedSteps:
    """The decoding memory of one model and the steps recorded over it. It does not hold the model, which holds it.

    Attributes:
        memory: None before the first use and after `clear`.
        recorded: by what they compute and for how many rows.
    """

    def __init__(self) -> None:
        self.memory: DecodingMemory | None = None
        self.recorded: dict[tuple[str, int, int | Draw], Any] = {}
        self._layouts: dict[tuple[int, int], _FixedRows] = {}
        self._weights: Weights = {}
        self._rotary_tables: list[tuple[Tensor, Tensor]] = []
        self._pool: Any = None

    def clear(self) -> None:
        """Drop all recordings and the memory that they hold."""
        self.recorded.clear()
        self._layouts.clear()
        self._rotary_tables.clear()
        self._weights, self._pool, self.memory = {}, None, None

    def reserve(self, model: StackedModel, rows: int, length: int, eos_token_ids: Iterable[int]) -> DecodingMemory:
        """Memory for at least so many rows per cell and slots; other memory, without recordings, if there is less."""
        memory = self.memory
        if memory is None or memory.rows < rows or memory.length < length:
            if memory is not None:
                rows, length = max(rows, memory.rows), max(length, memory.length)
            self.clear()
            del memory
            self.memory = DecodingMemory(model, rows, length, eos_token_ids)
            self._weights = model.weights([range(model.cells)])[0]
        assert self.memory is not None
        return self.memory

    def record(self, model: StackedModel, rows: int, draw: Draw) -> None:
        """Record the steps of up to `rows` rows of every length that are not recorded yet.

        What stands in the memory is lost.
        """
        memory = self.memory
        assert memory is not None
        wanted: dict[tuple[str, int, int | Draw], Callable[[], None]] = {}
        for size in halvings(rows, MIN_ROWS):
            wanted["draw", size, draw] = partial(self._draw, model, size, draw)
            for length in halvings(memory.length, MIN_LENGTH):
                wanted["layers", size, length] = partial(self._layers, model, size, length)
        missing = {key: step for key, step in wanted.items() if key not in self.recorded}
        if missing:
            memory.integers.zero_()
            memory.step.zero_()
            model.rotary(memory.integers[1, :1], model.dtype, min(memory.length, model.context_length))
            # graphs read the tables they were recorded with, also when the model has longer ones
            self._rotary_tables += model.rotary.tables.values()
        for key, step in missing.items():
            memory.step.zero_()
            self.recorded[key] = self._recorded(model.device, step)

    def layers(self, model: StackedModel, rows: int, length: int) -> None:
        """Forward one token of each row: its keys, values and final hidden state."""
        graph = self.recorded.get(("layers", rows, length))
        self._layers(model, rows, length) if graph is None else graph.replay()

    def draw(self, model: StackedModel, rows: int, draw: Draw) -> None:
        """Draw each row's next token from its hidden state."""
        graph = self.recorded.get(("draw", rows, draw))
        self._draw(model, rows, draw) if graph is None else graph.replay()

    def release_if_large(self, device: torch.device) -> None:
        """Drop everything where it would take more than `KEPT_SHARE` of the device from the update."""
        if self.memory is not None and device.type != "cpu":
            _, total = torch.get_device_module(device).mem_get_info(device)
            if self.memory.size > KEPT_SHARE * total:
                self.clear()

    def _recorded(self, device: torch.device, step: Callable[[], None]) -> Any:
        """A graph of a step. Libraries initialise themselves in a step before it."""
        backend = torch.get_device_module(device)
        aside = backend.Stream()
        aside.wait_stream(backend.current_stream())
        with backend.stream(aside):
            step()
        backend.current_stream().wait_stream(aside)
        self._pool = self._pool or backend.graph_pool_handle()
        graph = backend.CUDAGraph()
        with backend.graph(graph, pool=self._pool):
            step()
        return graph

    def _layers(self, model: StackedModel, rows: int, length: int) -> None:
        assert self.memory is not None
        if (rows, length) not in self._layouts:
            self._layouts[rows, length] = _FixedRows(model, self.memory, rows, length)
        layout, places = self._layouts[rows, length], rows * model.cells
        tokens = self.memory.integers[0, :places].view(rows, model.cells).t().contiguous()
        with layout:
            hidden = batched_forward(model, self._weights, tokens, layout)
        self.memory.hidden[:rows].copy_(hidden.transpose(0, 1))

    def _draw(self, model: StackedModel, rows: int, draw: Draw) -> None:
        assert self.memory is not None
        memory, C, places = self.memory, model.cells, rows * model.cells
        uniforms = memory.uniforms.index_select(0, memory.step)[0, :places].view(rows, C)
        at_once = max(1, MAX_DRAWN_LOGITS // (C * model.vocab_size))
        parts = []
        for first in range(0, rows, at_once):
            some = slice(first, min(first + at_once, rows))
            # rows of tokens are numbered cell by cell for the output layer, places row by row
            logits = model.logits(self._weights, memory.hidden[some].transpose(0, 1)).flatten(0, 1)
            found = draw(logits, uniforms[some].t().reshape(-1, 1))
            parts.append([each.view(C, -1).t().reshape(-1) for each in found])
        drawn, logp = (torch.cat(each) for each in zip(*parts, strict=True))
        tokens, positions, going = memory.integers[:3, :places].unbind(0)
        given = memory.integers[3:].index_select(0, memory.step)[0, :places]
        forced = given >= 0
        chosen = torch.where(forced, given, drawn)
        memory.drawn[:, :, :places].index_copy_(1, memory.step, torch.stack((chosen.double(), logp.double()))[:, None])
        ends = memory.ends_turn.index_select(0, chosen) & ~forced
        tokens.copy_(torch.where(going > 0, chosen, tokens))
        positions.add_(going)
        going.mul_(~ends)
        memory.step.add_(1)


class _FixedRows:
    """The rows of a step as an `AttentionLayout`: the token at position p stands in slot p."""

    def __init__(self, model: StackedModel, memory: DecodingMemory, rows: int, length: int) -> None:
        self.memory, self.places, self.length = memory, rows * model.cells, length
        numbers = torch.arange(self.places)
        # tokens are numbered cell by cell, places row by row
        token_of_slot = numbers.view(model.cells, rows).t().reshape(-1)
        slot_of_token = numbers.view(rows, model.cells).t().reshape(-1)
        self.token_of_slot, self.slot_of_token = (each.to(model.device) for each in (token_of_slot, slot_of_token))
        self.positions = memory.integers[1, : self.places].view(-1, 1)
        self.position_limit = min(length, model.context_length)
        self.output_index: Tensor | None = None
        self._attn_bias = torch.zeros(0)

    def __enter__(self) -> None:
        later = torch.arange(self.length, device=self.positions.device) > self.positions
        bias = torch.zeros(later.shape, dtype=self.memory.kv.dtype, device=later.device)
        self._attn_bias = bias.masked_fill_(later, -torch.inf)[None, :, None]

    def __exit__(self, *error: object) -> None:
        self._attn_bias = torch.zeros(0)

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        heads, places, _, head_dim = queries.shape
        kv_heads = len(keys)
        index = self.positions.view(1, -1, 1, 1).expand(kv_heads, -1, 1, head_dim)
        cached_keys, cached_values = self.memory.keys_values(layer, places, self.length)
        cached_keys.scatter_(2, index, keys)
        cached_values.scatter_(2, index, values)
        # the query heads that share a key-value head become queries of that one head
        grouped = queries.view(kv_heads, heads // kv_heads, places, head_dim).transpose(1, 2)
        out = functional.scaled_dot_product_attention(grouped, cached_keys, cached_values, self._attn_bias)
        return out.transpose(1, 2).reshape(heads, places, 1, head_dim)
