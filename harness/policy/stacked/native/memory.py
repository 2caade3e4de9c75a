"""What the compiled layers are told about a model, its tokens, and where to put what they compute."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from klab.harness.policy.stacked.native.token_trees import Indices, Rows, TokenTrees

if TYPE_CHECKING:
    from klab.harness.policy.stacked.native.engine import NativeLayers

FLOAT = 4
"""Bytes of a number."""

_WORD, _ADDRESS = ctypes.c_int64, ctypes.c_void_p


def address(array: Indices | Rows) -> int:
    """Where an array's first number stands."""
    found: int = array.__array_interface__["data"][0]
    return found


class Model(ctypes.Structure):
    """`model_t`."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("layers", "hidden", "heads", "kv_heads", "head_dim", "intermediate")),
        ("context", ctypes.c_int32),
        ("eps", ctypes.c_float),
        ("cosines", _ADDRESS),
        ("sines", _ADDRESS),
    )


class Tokens(ctypes.Structure):
    """`tokens_t`."""

    _fields_ = (
        *((name, _WORD) for name in ("count", "start", "num_outputs")),
        *((name, _ADDRESS) for name in ("tokens", "outputs", "parents", "positions")),
    )

    @classmethod
    def of(cls, trees: TokenTrees) -> Tokens:
        arrays = (trees.tokens, trees.outputs, trees.parents, trees.positions)
        return cls(len(trees.tokens), trees.start, len(trees.outputs), *[address(array) for array in arrays])


class Memory(ctypes.Structure):
    """`memory_t`."""

    _fields_ = (
        *((name, _ADDRESS) for name in ("qkv", "saved", "last_x", "last_inverse", "hidden")),
        *((name, _WORD) for name in ("qkv_stride", "saved_stride", "capacity", "outputs", "attended")),
        *((name, _WORD) for name in ("attended_outputs", "keep")),
    )


class Pool:
    """Memory that is used again: glibc gives a large piece that was freed to nobody who wants one of the same size at
    an aligned address, so that the system would have to clear new pages for every update."""

    def __init__(self) -> None:
        self._free: list[Tensor] = []

    def __len__(self) -> int:
        """Pieces that nobody uses now."""
        return len(self._free)

    def take(self, numbers: int) -> Tensor:
        """A piece of at least so many numbers."""
        fitting = [each for each in self._free if numbers <= len(each) <= 2 * numbers]
        if not fitting:
            step = 1 << max(numbers.bit_length() - 3, 0)
            return torch.empty(-(-numbers // step) * step)
        found = min(fitting, key=len)
        self._free = [each for each in self._free if each is not found]
        return found

    def give(self, piece: Tensor) -> None:
        """Take back a piece that nobody reads any more."""
        self._free.append(piece)


class Activations:
    """All that the backward pass of a cell needs of its tokens, which come in one pass or in several.

    Args:
        capacity: tokens there is room for; memory that none reaches is never touched.
        attended: the tokens that they attend to altogether, at most.
        hidden: [J, hidden_size], where the states of the only pass go, and which is not kept; None: memory of its own.

    Attributes:
        qkv: queries, keys and values [num_layers, capacity, width]; those of the tokens so far are filled in.
        hidden: final, normalised states [capacity, hidden_size]; those of the outputs so far are filled in.
    """

    def __init__(self, layers: NativeLayers, capacity: int, attended: int, hidden: Tensor | None = None) -> None:
        number, D, qkv = layers.architecture.num_layers, layers.architecture.hidden_size, capacity * layers.width
        saved = layers.layer_numbers(capacity, attended)
        self._pool = layers.pool
        self._kept = self._pool.take(number * (qkv + saved) + capacity * (D + 1))
        self.qkv = self._kept[: number * qkv].view(number, capacity, layers.width)
        self.hidden = torch.empty(capacity, D) if hidden is None else hidden.detach()
        first = self._kept.data_ptr()
        last = first + number * (qkv + saved) * FLOAT
        self.memory = Memory(
            first, first + number * qkv * FLOAT, last, last + capacity * D * FLOAT, self.hidden.data_ptr()
        )
        self.memory.qkv_stride, self.memory.saved_stride, self.memory.capacity = qkv, saved, capacity
        self.memory.keep = 1

    def __del__(self) -> None:
        if hasattr(self, "_kept"):  # there was memory for it
            self._pool.give(self._kept)

    def advance(self, trees: TokenTrees) -> None:
        """Count tokens whose pass has been made."""
        self.memory.outputs += len(trees.outputs)
        self.memory.attended += trees.attended
        self.memory.attended_outputs += trees.attended_by_outputs
