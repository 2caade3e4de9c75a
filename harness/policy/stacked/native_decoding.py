"""Incremental decoding with compiled layers: one cell at a time, from its prompts to its last token.

So the weights of a cell stay in the processor's cache from one token to the next, which those of a whole pack do not.
What an update from the same weights needs of these tokens can be kept, so that it does not compute them again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from klab.harness.policy.stacked.model import StackedModel
from klab.harness.policy.stacked.native.engine import NativeLayers
from klab.harness.policy.stacked.native.memory import Activations
from klab.harness.policy.stacked.native.token_trees import GrowingTrees, TokenTrees, joined

MAX_KEPT_NUMBERS = 2**27
"""Address space for what is kept of a cell, at most; memory is taken for the tokens that there are."""


@dataclass(frozen=True, slots=True)
class KnownStates:
    """What a model has computed of the tokens of a rollout, with the weights that it had then.

    Attributes:
        versions: how often each parameter had been changed.
    """

    model: StackedModel
    versions: tuple[int, ...]
    trees: TokenTrees
    activations: Activations

    def holds_for(self, model: StackedModel) -> bool:
        """Whether this model would compute the same now."""
        return model is self.model and versions(model) == self.versions


def versions(model: StackedModel) -> tuple[int, ...]:
    """How often each parameter has been changed in place."""
    return tuple(value._version for value in model.parameters.values())


class NativeDecoder:
    """An `IncrementalDecoder` over compiled layers.

    Args:
        kept_tokens: of every trajectory, for a backward pass; 0: nothing is kept.

    Attributes:
        caches: by cell, queries, keys and values [num_layers, capacity, width] of all its tokens so far.
    """

    one_by_one = True

    def __init__(
        self,
        model: StackedModel,
        layers: NativeLayers,
        prompts: Sequence[Sequence[Sequence[int]]],
        group_size: int,
        kept_tokens: int = 0,
    ) -> None:
        self.model, self.layers, self.prompts, self.group_size = model, layers, prompts, group_size
        self._kept_tokens, self._versions = kept_tokens, versions(model)
        self._addresses = layers.addresses(model.parameters, model.cells)
        self._heads = model.lm_head(model.parameters).unbind(0)
        self._trees: dict[int, GrowingTrees] = {}
        self._activations: dict[int, Activations] = {}
        self._passes: dict[int, list[TokenTrees]] = {}
        self.caches: dict[int, Tensor] = {}

    def start(self, cells: Sequence[int]) -> dict[int, Tensor]:
        found = {}
        for cell in cells:
            tree = self._trees[cell] = GrowingTrees(self.prompts[cell], self.group_size)
            N = len(self.prompts[cell]) * self.group_size
            activations = self._room(tree, N * self._kept_tokens) if self._kept_tokens else None
            if activations is not None:
                self._activations[cell], self._passes[cell] = activations, []
                self.caches[cell] = activations.qkv
            else:
                layers = self.model.architecture.num_layers
                self.caches[cell] = torch.empty(layers, 2 * (len(tree.parents) + N), self.layers.width)
            found[cell] = self._logits(cell, tree.prompts).repeat_interleave(self.group_size, 0)
        return found

    def step(self, last_tokens: Mapping[int, Tensor], unfinished: Mapping[int, Sequence[bool]]) -> dict[int, Tensor]:
        found = {}
        for cell, tokens in last_tokens.items():
            trees, index = self._trees[cell].grow(tokens.numpy(), np.array(unfinished[cell]))
            found[cell] = self._logits(cell, trees).index_select(0, torch.from_numpy(index))
        return found

    def known_states(self, cell: int) -> KnownStates | None:
        if cell not in self._activations:
            return None
        return KnownStates(self.model, self._versions, joined(self._passes[cell]), self._activations[cell])

    def _room(self, tree: GrowingTrees, new_tokens: int) -> Activations | None:
        """Room for so many tokens after the prompts; None where that is too much."""
        capacity = len(tree.parents) + new_tokens
        attended = capacity * (tree.prompts.longest + self._kept_tokens)
        layers = self.model.architecture.num_layers
        numbers = layers * (self.layers.layer_numbers(capacity, attended) + capacity * self.layers.width)
        return Activations(self.layers, capacity, attended) if numbers <= MAX_KEPT_NUMBERS else None

    def _logits(self, cell: int, trees: TokenTrees) -> Tensor:
        """Logits [J, vocab_size] of a cell's new output tokens, whose queries, keys and values are cached."""
        cache, total = self.caches[cell], len(trees.parents)
        if total > cache.shape[1]:  # an environment wrote more than was expected, or nothing is kept
            self._activations.pop(cell, None)
            grown = cache.new_empty(len(cache), 2 * total, cache.shape[2])
            grown[:, : trees.start] = cache[:, : trees.start]
            self.caches[cell] = cache = grown
        if cell in self._activations:
            self._passes[cell].append(trees)
            states = self.layers.extend(self._addresses[cell], trees, self._activations[cell])
        else:
            states = self.layers.decode(self._addresses[cell], trees, cache)
        return torch.mm(states, self._heads[cell])
