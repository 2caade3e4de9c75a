"""The decoder's layers of float32 models on a CPU, cell by cell in compiled code (`transformer.c`).

A cell's pass is one call, and everything in it works on what the caches hold. Attention goes along the tree of
prefixes, token by token: nothing is padded, masked or gathered. No number of a token depends on what else is computed
with it: a cell has the bits that it has alone, and a token those that it had when it was decoded. `batched_layers.py`
is the reference.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from klab.grid.errors import UserError
from klab.harness.policy.stacked.architecture import Architecture
from klab.harness.policy.stacked.native.library import library
from klab.harness.policy.stacked.native.memory import FLOAT, Activations, Memory, Model, Pool, Tokens, address
from klab.harness.policy.stacked.native.token_trees import TokenTrees
from klab.harness.policy.stacked.rotary_embedding import RotaryEmbedding

LAYER_WEIGHTS = (
    *("input_norm", "qkv", "qkv_bias", "out", "out_bias", "mlp_norm", "gate_up", "gate_up_bias", "down", "down_bias"),
)
"""A layer's parameters in the order of `layer_t`."""

MAX_HEAD_DIM = 256
_WIDTH = 16
_CPU = torch.device("cpu")


def supports_native(a: Architecture) -> bool:
    """Whether the compiled layers compute this architecture: widths of whole vectors, no norms on heads."""
    wide = a.num_heads * a.head_dim
    widths = (a.hidden_size, wide, wide + 2 * a.num_kv_heads * a.head_dim, a.intermediate_size)
    whole = a.head_dim % 8 == 0 and all(width % _WIDTH == 0 for width in widths)
    return whole and a.head_dim <= MAX_HEAD_DIM and not a.qk_norm


def native_layers(architecture: Architecture, rotary: RotaryEmbedding) -> NativeLayers | None:
    """The compiled layers for an architecture; None where they don't compute it, or can't be had."""
    if not supports_native(architecture):
        return None
    found = library()
    return None if found is None else NativeLayers(architecture, rotary, found)


class NativeLayers:
    """The layers of one architecture; weights are given with every call.

    Attributes:
        names: the parameters that layers read, in the order of `weights_t`; biases that there are not, too.
        given: those of them that the architecture has.
        width: of a token's queries, keys and values.
        pool: memory of activations.
    """

    def __init__(self, architecture: Architecture, rotary: RotaryEmbedding, functions: ctypes.CDLL) -> None:
        self.architecture, self._rotary, self._functions = architecture, rotary, functions
        a = architecture
        self.names = ["embedding", "norm"]
        self.names += [f"layers.{layer}.{name}" for layer in range(a.num_layers) for name in LAYER_WEIGHTS]
        shapes = a.parameter_shapes()
        self.given = [name for name in self.names if name in shapes]
        self.width = (a.num_heads + 2 * a.num_kv_heads) * a.head_dim
        sizes = (a.num_layers, a.hidden_size, a.num_heads, a.num_kv_heads, a.head_dim, a.intermediate_size)
        self._model = Model(*sizes, 0, a.norm_eps)
        self._at = ctypes.addressof(self._model)
        self._scratch: dict[str, Tensor] = {}
        self.pool = Pool()

    def layer_numbers(self, count: int, attended: int) -> int:
        """Numbers that the backward pass needs of a layer, of so many tokens that attend to so many altogether."""
        found: int = self._functions.layer_numbers(self._at, count, attended)
        return found

    def addresses(self, parameters: Mapping[str, Tensor], cells: int) -> NDArray[np.int64]:
        """Of every cell's parameters [C, …], those of `names`: int64 [C, names], 0 for those that there are not."""
        first = np.zeros(len(self.names), dtype=np.int64)
        stride = np.zeros(len(self.names), dtype=np.int64)
        for column, name in enumerate(self.names):
            value = parameters.get(name)
            if value is not None:
                assert value[0].is_contiguous()
                assert value.dtype == torch.float32
                first[column], stride[column] = value.data_ptr(), value.stride(0) * FLOAT
        return first + np.arange(cells)[:, None] * stride

    def states(
        self,
        parameters: Mapping[str, Tensor],
        trees: Sequence[TokenTrees],
        known: Sequence[Activations | None] | None = None,
    ) -> tuple[Tensor, ...]:
        """Final, normalised states [J, hidden_size] of every cell's output tokens.

        Args:
            parameters: [C, …], by name; the states carry their gradients where gradients are enabled.
            trees: one for each of the C cells, without earlier tokens.
            known: with gradients, activations of cells that need not be computed again.

        Raises:
            UserError: a sequence exceeds the model's context.
        """
        if torch.is_grad_enabled():
            given = [parameters[name] for name in self.given]
            earlier = list(known or [None] * len(trees))
            states: Tensor = _Layers.apply(self, list(trees), earlier, *given)  # type: ignore[no-untyped-call]
            return states.split_with_sizes([len(each.outputs) for each in trees])
        addresses = self.addresses(parameters, len(trees))
        found = []
        for cell, each in enumerate(trees):
            qkv = self._memory("qkv", len(each.tokens) * self.width).view(1, -1, self.width)
            found.append(self.decode(addresses[cell], each, qkv))
        return tuple(found)

    def decode(self, addresses: NDArray[np.int64], trees: TokenTrees, qkv: Tensor) -> Tensor:
        """Final, normalised states [J, hidden_size] of a cell's new tokens, without gradient.

        Args:
            addresses: the cell's row of what `addresses` gave.
            qkv: [num_layers or 1, capacity, width], queries, keys and values of all tokens so far, to which the new
                ones are added in place; one layer's memory is used for all where no later pass reads it.
        """
        count, J, D = len(trees.tokens), len(trees.outputs), self.architecture.hidden_size
        saved = self._memory("saved", self.layer_numbers(count, trees.longest))
        last = self._memory("last", J * (D + 1)).data_ptr()
        hidden = torch.empty(J, D)
        memory = Memory(qkv.data_ptr(), saved.data_ptr(), last, last + J * D * FLOAT, hidden.data_ptr())
        memory.qkv_stride, memory.capacity = (qkv.stride(0) if len(qkv) > 1 else 0), count
        self._forward(addresses, trees, memory)
        return hidden

    def extend(self, addresses: NDArray[np.int64], trees: TokenTrees, activations: Activations) -> Tensor:
        """What `decode` gives, where all that the backward pass needs is kept."""
        first = activations.memory.outputs
        self._forward(addresses, trees, activations.memory)
        activations.advance(trees)
        return activations.hidden[first : first + len(trees.outputs)]

    def _forward(self, addresses: NDArray[np.int64], trees: TokenTrees, memory: Memory) -> None:
        tokens = Tokens.of(trees)
        self._functions.forward(
            *(self._at, address(addresses), ctypes.addressof(tokens), ctypes.addressof(memory)),
            self._chain(trees),
        )

    def backward(
        self,
        addresses: NDArray[np.int64],
        trees: TokenTrees,
        activations: Activations,
        d_hidden: Tensor,
        gradients: NDArray[np.int64],
    ) -> None:
        """Write the gradients of a cell's weights, whose addresses are `gradients`; the embedding's are added."""
        chain = self._chain(trees)
        scratch = self._memory("backward", self._functions.backward_numbers(self._at, len(trees.tokens)))
        tokens = Tokens.of(trees)
        self._functions.backward(
            *(self._at, address(addresses), ctypes.addressof(tokens), ctypes.addressof(activations.memory)),
            *(chain, d_hidden.data_ptr(), scratch.data_ptr(), address(gradients)),
        )

    def _chain(self, trees: TokenTrees) -> int:
        """Tell the compiled model how long sequences are; the address of integers for its passes.

        Raises:
            UserError: a sequence exceeds the model's context.
            IndexError: a token outside the vocabulary.
        """
        if not 0 <= trees.tokens.min() <= trees.tokens.max() < self.architecture.vocab_size:
            raise IndexError(f"a token outside the vocabulary of {self.architecture.vocab_size}")
        longest, most = trees.longest, self.architecture.context_length
        if longest > most:
            raise UserError(f"sequences of {longest} tokens exceed the model's context", value=most)
        if longest > self._model.context:
            cosines, sines = self._rotary.table(torch.float32, _CPU, longest)
            self._tables = cosines, sines
            self._model.context, self._model.cosines, self._model.sines = longest, cosines.data_ptr(), sines.data_ptr()
        return self._memory("integers", self._functions.integers(self._at, len(trees.tokens))).data_ptr()

    def _memory(self, purpose: str, numbers: int) -> Tensor:
        """Memory that stays, of so many numbers; of no meaning after a call."""
        found = self._scratch.get(purpose)
        if found is None or len(found) < numbers:
            found = self._scratch[purpose] = torch.empty(numbers + numbers // 4)
        return found[:numbers]


class _Layers(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, layers: NativeLayers, trees: list[TokenTrees], known: list[Activations | None], *given: Tensor
    ) -> Tensor:
        hidden = given[0].new_empty(sum(len(each.outputs) for each in trees), layers.architecture.hidden_size)
        addresses = layers.addresses(dict(zip(layers.given, given, strict=True)), len(trees))
        parts = hidden.split_with_sizes([len(each.outputs) for each in trees])
        ctx.activations = []
        for at, each, earlier, part in zip(addresses, trees, known, parts, strict=True):
            activations = earlier or Activations(layers, len(each.tokens), each.attended, part)
            if earlier is None:
                layers.extend(at, each, activations)
                del activations.hidden  # the node's own output: to keep it would be a cycle that nobody frees
            else:
                part.copy_(earlier.hidden[: len(part)])
            ctx.activations.append(activations)
        ctx.save_for_backward(*given)
        ctx.layers, ctx.trees = layers, trees
        return hidden

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        layers, trees, given = ctx.layers, ctx.trees, ctx.saved_tensors
        gradients = [torch.zeros_like(given[0]), *(torch.empty_like(value) for value in given[1:])]
        named = (dict(zip(layers.given, values, strict=True)) for values in (given, gradients))
        at, into = (layers.addresses(each, len(trees)) for each in named)
        parts = grad.contiguous().split_with_sizes([len(each.outputs) for each in trees])
        for cell in reversed(range(len(trees))):  # what the last cells read is still in the cache
            layers.backward(at[cell], trees[cell], ctx.activations[cell], parts[cell], into[cell])
        return None, None, None, *gradients
