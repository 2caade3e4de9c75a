"""The stacked decoder: C models of one architecture (Llama, Qwen2, Qwen3) whose weights carry a leading cell axis.

Everything but attention works on single tokens, so tokens stand in one flat axis without padding, `[C, M, hidden]`;
which token sees which is the business of the arrangement that a forward pass is given (`attention.py`).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from klab.grid.errors import UserError
from klab.harness.policy.policy import IncrementalDecoder
from klab.harness.policy.prompt import check_vocabulary, end_tokens, read_generation, write_generation
from klab.harness.policy.rollout import Rollout
from klab.harness.policy.scores import TokenScores, stacked_scores
from klab.harness.policy.stacked.attention import AttentionLayout
from klab.harness.policy.stacked.batched_layers import Weights, equal_shapes, joined, stacked, stacked_states
from klab.harness.policy.stacked.checkpoint import read_config, read_tokenizer, read_weights, write_checkpoint
from klab.harness.policy.stacked.config import Architecture, Rotary
from klab.harness.policy.stacked.cuda_graph_decoding import StaticCacheDecoder, uses_static_cache
from klab.harness.policy.stacked.kv_cache import KVCacheDecoder, UncachedDecoder
from klab.harness.policy.stacked.layer_weights import suits
from klab.harness.policy.stacked.lm_head import float32_linear
from klab.harness.policy.stacked.lora import Adapters, read_adapters, write_adapters
from klab.harness.policy.stacked.packed_decoding import PackedDecoder

JOINED_SIZE = 300_000
"""Up to this many parameters per cell, joining the weights of some cells of a pack costs less than it saves."""


class StackedPolicy:
    """C stacked policies.

    Attributes:
        cells: C.
        config: the transformers configuration they share.
        tokenizer: theirs.
        parameters: name -> [C, …], leaf tensors; matrices are [C, in, out]. With adapters, only these.
        shared: name -> [1, …], frozen weights that all cells have in common; empty without adapters.
        adapters: which they are, None without.
        gradient_checkpointing: keep only the layers' inputs for the backward pass, and compute the layers again.
        origin, revision: folder or hub id of the checkpoint, named as the base of adapters.
        generation: the checkpoint's generation configuration.
    """

    def __init__(
        self,
        config: Any,
        tokenizer: PreTrainedTokenizerFast,
        parameters: Weights,
        shared: Weights | None = None,
        adapters: Adapters | None = None,
        cells: int | None = None,
    ) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.architecture = Architecture.of(config)
        self.rotary = Rotary(config, self.architecture.head_dim)
        self.parameters = parameters
        self.shared = shared or {}
        self.adapters = adapters
        self.cells = len(parameters["embedding"]) if cells is None else cells
        self.gradient_checkpointing = False
        self.origin = str(getattr(config, "_name_or_path", ""))
        self.revision: str | None = None
        self.generation: dict[str, Any] | None = None

    @classmethod
    def random(
        cls,
        config: Any,
        tokenizer: PreTrainedTokenizerFast,
        seeds: Sequence[int],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> StackedPolicy:
        """One freshly initialised cell per seed: normal(0, initializer_range) matrices, unit norms, zero biases."""
        architecture = Architecture.of(config)
        cells = []
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            cell = {}
            for name, shape in architecture.shapes().items():
                if name.endswith("norm"):
                    cell[name] = torch.ones(shape)
                elif name.endswith("bias"):
                    cell[name] = torch.zeros(shape)
                else:
                    cell[name] = torch.randn(shape, generator=generator) * architecture.initializer_range
            cells.append(cell)
        return cls(config, tokenizer, stacked(cells, dtype, device))

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        cells: int = 1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> StackedPolicy:
        """`cells` copies of a Hugging Face checkpoint (a folder or a hub id).

        Raises:
            UserError: no such checkpoint, another architecture, or a tokenizer without an end token.
        """
        config = read_config(folder)
        architecture = Architecture.of(config)
        tokenizer = read_tokenizer(folder)
        generation = read_generation(folder)
        end_tokens(tokenizer, generation, architecture.vocab_size)
        check_vocabulary(tokenizer, architecture.vocab_size)
        cell = read_weights(folder, architecture)
        policy = cls(config, tokenizer, stacked([cell] * cells, dtype, device))
        policy.generation = generation
        return policy

    def with_lora(self, section: Any, seeds: Sequence[int]) -> StackedPolicy:
        """This policy of one cell as the frozen base of new adapters, for one cell per seed; it is not copied.

        Args:
            section: the grid's `policy.lora`.

        Raises:
            UserError: a target that is no linear layer of the decoder.
        """
        if self.cells != 1 or self.shared:
            raise ValueError("adapters need a base of one cell that has none")
        adapters = Adapters.of(section, self.architecture)
        shared = {name: value.detach() for name, value in self.parameters.items()}
        dtype = torch.promote_types(self.dtype, torch.float32)
        parameters = {n: v.to(self.device).requires_grad_() for n, v in adapters.initial(seeds, dtype).items()}
        return self._like(parameters, shared, adapters, len(seeds))

    def _like(self, parameters: Weights, shared: Weights, adapters: Adapters | None, cells: int) -> StackedPolicy:
        other = StackedPolicy(self.config, self.tokenizer, parameters, shared, adapters, cells)
        other.origin, other.revision, other.generation = self.origin, self.revision, self.generation
        other.gradient_checkpointing = self.gradient_checkpointing
        return other

    @property
    def vocab_size(self) -> int:
        return self.architecture.vocab_size

    @property
    def eos_token_ids(self) -> frozenset[int]:
        return end_tokens(self.tokenizer, self.generation, self.vocab_size)

    @property
    def device(self) -> torch.device:
        return self._embedding.device

    @property
    def dtype(self) -> torch.dtype:
        return self._embedding.dtype

    @property
    def _embedding(self) -> Tensor:
        return self.shared["embedding"] if self.shared else self.parameters["embedding"]

    @property
    def hidden_size(self) -> int:
        return self.architecture.hidden_size

    @property
    def context_length(self) -> int:
        return self.architecture.context_length

    def decoder(
        self, prompts: Sequence[Sequence[Sequence[int]]], group_size: int, plain: bool = False
    ) -> IncrementalDecoder:
        if not plain and uses_static_cache(self.device):
            return StaticCacheDecoder(self, prompts, group_size)
        if not plain and self.packable:
            return PackedDecoder(self, prompts, group_size)
        return (UncachedDecoder if plain else KVCacheDecoder)(self, prompts, group_size)

    def score(
        self,
        rollouts: Sequence[Rollout],
        *,
        temperature: float = 1.0,
        logits: bool = False,
        entropy: bool = False,
        states: bool = False,
        plain: bool = False,
    ) -> list[TokenScores]:
        return stacked_scores(
            self, rollouts, temperature=temperature, logits=logits, entropy=entropy, states=states, plain=plain
        )

    def save_pretrained(self, folder: str | Path, cell: int = 0) -> None:
        """One cell as an ordinary Hugging Face checkpoint folder: config.json, model.safetensors, tokenizer.

        Its adapters alone, if it has any: adapter_config.json, adapter_model.safetensors, tokenizer.
        """
        weights = {name: value[cell].detach().cpu() for name, value in self.parameters.items()}
        if self.adapters is not None:
            write_adapters(Path(folder), self.adapters, self.origin, self.revision, weights)
            self.tokenizer.save_pretrained(str(folder))
            return
        write_checkpoint(Path(folder), self.config, self.tokenizer, self.architecture, weights)
        write_generation(Path(folder), self.generation)

    def save(self, path: str | Path, cell: int) -> None:
        """`save_pretrained` under the name of the policy interface."""
        self.save_pretrained(path, cell)

    @torch.no_grad()
    def load(self, path: str | Path, cell: int) -> None:
        """Put a checkpoint's weights, or its adapters where the policy has some, into one cell.

        Raises:
            UserError: the checkpoint has another architecture, or other adapters.
        """
        if self.adapters is not None:
            for name, value in read_adapters(path, self.adapters).items():
                self.parameters[name][cell].copy_(value)
            return
        architecture = Architecture.of(read_config(path))
        if architecture.shapes() != self.architecture.shapes():
            raise UserError("the checkpoint has another architecture than the policy it is loaded into", file=path)
        for name, value in read_weights(path, architecture).items():
            self.parameters[name][cell].copy_(value)

    def frozen_copy(self, dtype: torch.dtype | None = None) -> StackedPolicy:
        """A copy that needs no gradient and shares no trained weights with this policy: the reference, or a sampler.

        Adapters that add nothing yet (B = 0) are left off; weights that all cells have in common are held once.

        Args:
            dtype: of the copy, all of its weights included; None: as they are.
        """
        alike = all(bool((value == value[:1]).all()) for value in self.parameters.values())
        copies = {}
        for name, value in self.parameters.items():
            once = value.detach()[:1] if alike else value.detach()
            copies[name] = once.to(dtype, copy=True).expand_as(value)
        shared = {name: value.to(dtype) for name, value in self.shared.items()}
        if self.adapters is not None and not any(v.any() for n, v in copies.items() if n.endswith(".B")):
            return self._like({}, shared, None, self.cells)
        return self._like(copies, shared, self.adapters, self.cells)

    def select(self, cells: Sequence[int]) -> StackedPolicy:
        """Some of the cells as a policy of their own, to sample from: without gradient."""
        if list(cells) == list(range(self.cells)):
            return self
        chosen = {name: value.detach()[list(cells)] for name, value in self.parameters.items()}
        return self._like(chosen, self.shared, self.adapters, len(cells))

    def weights(self, stacks: Sequence[Sequence[int]]) -> list[Weights]:
        """Weights of several stacks of cells: the parameters themselves where one stack is all, else joined slices."""
        if len(stacks) == 1 and list(stacks[0]) == list(range(self.cells)):
            own = [self.parameters]
        else:
            slices = {name: value.unbind(0) for name, value in self.parameters.items()}
            own = [{name: joined([each[c] for c in stack]) for name, each in slices.items()} for stack in stacks]
        return [self._completed(weights, len(stack)) for weights, stack in zip(own, stacks, strict=True)]

    def _completed(self, own: Weights, cells: int) -> Weights:
        if not self.shared:
            return own
        return {**{name: value.expand(cells, *value.shape[1:]) for name, value in self.shared.items()}, **own}

    def stacks(self, shapes: Sequence[Hashable]) -> list[list[int]]:
        """Cells to compute together: those with equal shapes, unless joining their slices costs more than it saves."""
        together = equal_shapes(shapes)
        if len(together) == 1 or self.shared or self.size <= JOINED_SIZE:
            return together
        return [[cell] for cells in together for cell in cells]

    @property
    def size(self) -> int:
        """Number of trained parameters of one cell."""
        return sum(value[0].numel() for value in self.parameters.values())

    @property
    def packable(self) -> bool:
        """Whether cells of unequal sizes are computed together (`packed_layers.py`): in full fine-tuning on a CPU,
        with plain multi-head attention."""
        full = not self.shared and self.adapters is None and not self.gradient_checkpointing
        wide = self.device.type == "cpu" and self.dtype in (torch.float32, torch.float64)
        return full and wide and suits(self.architecture)

    def hidden_states(self, weights: Weights, tokens: Tensor, arrangement: AttentionLayout) -> Tensor:
        """Final, normalised hidden states [A, K, hidden] of the kept tokens.

        Args:
            weights: of A cells.
            tokens: ids [A, M].
            arrangement: who sees whom; also which tokens' states are kept after the last layer (K ≤ M).
        """
        return stacked_states(self, weights, tokens, arrangement)

    def logits(self, weights: Weights, hidden: Tensor) -> Tensor:
        """[A, K, V] of hidden states [A, K, hidden], at least in float32."""
        return float32_linear(hidden, self.head(weights))

    def head(self, weights: Weights) -> Tensor:
        """[A, hidden, V], the output layer."""
        return weights["embedding"].transpose(1, 2) if self.architecture.tied else weights["head"]
