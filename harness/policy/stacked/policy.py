"""Policies of the Llama, Qwen2 and Qwen3 families: C cells as one stacked model with a tokenizer and checkpoints."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from klab.grid.errors import UserError
from klab.harness.policy.categorical import Draw
from klab.harness.policy.policy import BlockDecoder, IncrementalDecoder, Policy
from klab.harness.policy.pretrained import (
    check_vocabulary,
    checkpoint_config,
    checkpoint_tokenizer,
    read_generation_config,
    write_generation_config,
)
from klab.harness.policy.prompt import PromptEncoder
from klab.harness.policy.rollout import Rollout
from klab.harness.policy.scores import ScoreOptions, TokenScores
from klab.harness.policy.special_tokens import eos_token_ids
from klab.harness.policy.stacked.architecture import Architecture
from klab.harness.policy.stacked.block_decoding import StaticBlockDecoder, uses_static_cache
from klab.harness.policy.stacked.checkpoint import named_tensors, read_weights, write_checkpoint
from klab.harness.policy.stacked.kv_cache import KVCacheDecoder
from klab.harness.policy.stacked.lora import Adapters, read_adapters, write_adapters
from klab.harness.policy.stacked.model import StackedModel, Weights, stack_cells
from klab.harness.policy.stacked.native_decoding import NativeDecoder
from klab.harness.policy.stacked.recorded_steps import RecordedSteps
from klab.harness.policy.stacked.scoring import score_rollouts
from klab.harness.policy.stacked.uncached_decoding import UncachedDecoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class StackedPolicy(StackedModel):
    """C policies of one architecture; see `StackedModel` for the weights and `Policy` for what they can do.

    Attributes:
        tokenizer, encode_prompt: that all cells have.
        origin, revision: folder or hub id of the checkpoint, written as the base model of adapters.
        generation_config: the checkpoint's, None without.
        steps: recorded decoding steps and their memory, on GPUs.
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
        super().__init__(config, parameters, shared, adapters, cells)
        self.tokenizer = tokenizer
        self.origin = str(config.name_or_path or "")
        self.revision: str | None = None
        self.generation_config: dict[str, Any] | None = None
        self.encode_prompt = PromptEncoder(tokenizer, self.vocab_size)
        self.steps = RecordedSteps()
        self._selected_from: tuple[StackedPolicy, list[int]] | None = None

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
        architecture = Architecture.from_config(config)
        cells = []
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            cell = {}
            for name, shape in architecture.parameter_shapes().items():
                if name.endswith("norm"):
                    cell[name] = torch.ones(shape)
                elif name.endswith("bias"):
                    cell[name] = torch.zeros(shape)
                else:
                    cell[name] = torch.randn(shape, generator=generator) * architecture.initializer_range
            cells.append(cell)
        return cls(config, tokenizer, stack_cells(cells, dtype, device))

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
            UserError: no such checkpoint, another architecture, or a tokenizer without an end-of-sequence token.
        """
        config = checkpoint_config(folder)
        architecture = Architecture.from_config(config)
        tokenizer = checkpoint_tokenizer(folder)
        generation_config = read_generation_config(folder)
        eos_token_ids(tokenizer, generation_config, architecture.vocab_size)
        check_vocabulary(tokenizer, architecture.vocab_size)
        cell = read_weights(folder, architecture)
        policy = cls(config, tokenizer, stack_cells([cell] * cells, dtype, device))
        policy.generation_config = generation_config
        return policy

    def with_lora(self, section: Any, seeds: Sequence[int]) -> StackedPolicy:
        """New adapters, one cell per seed, over this policy of one cell, which is frozen and not copied.

        Args:
            section: the grid's `policy.lora`.

        Raises:
            UserError: a target that is no linear layer of the model.
        """
        if self.cells != 1 or self.shared:
            raise ValueError("adapters need a base of one cell that has none")
        adapters = Adapters.from_section(section, self.architecture)
        shared = {name: value.detach() for name, value in self.parameters.items()}
        dtype = torch.promote_types(self.dtype, torch.float32)
        parameters = {n: v.to(self.device).requires_grad_() for n, v in adapters.initial_weights(seeds, dtype).items()}
        return self._like(parameters, shared, adapters, len(seeds))

    def _like(self, parameters: Weights, shared: Weights, adapters: Adapters | None, cells: int) -> StackedPolicy:
        other = StackedPolicy(self.config, self.tokenizer, parameters, shared, adapters, cells)
        other.origin, other.revision, other.generation_config = self.origin, self.revision, self.generation_config
        other.gradient_checkpointing = self.gradient_checkpointing
        return other

    @cached_property
    def eos_token_ids(self) -> frozenset[int]:
        return eos_token_ids(self.tokenizer, self.generation_config, self.vocab_size)

    def decoder(
        self,
        prompts: Sequence[Sequence[Sequence[int]]],
        group_size: int,
        plain: bool = False,
        kept_tokens: int = 0,
    ) -> IncrementalDecoder:
        if plain:
            return UncachedDecoder(self, prompts, group_size)
        if self.native is not None:
            return NativeDecoder(self, self.native, prompts, group_size, kept_tokens)
        return KVCacheDecoder(self, prompts, group_size)

    def block_decoder(
        self, prompts: Sequence[Sequence[Sequence[int]]], group_size: int, max_new_tokens: int, draw: Draw
    ) -> BlockDecoder | None:
        if not uses_static_cache(self.device):
            return None
        # some cells of a policy are decoded in its memory, with the steps that it has recorded
        owner, cells = self._selected_from or (self, list(range(self.cells)))
        given = (prompts, group_size, max_new_tokens, draw, owner.steps, self.eos_token_ids)
        return StaticBlockDecoder(owner, cells, *given)

    def score(self, rollouts: Sequence[Rollout], options: ScoreOptions) -> list[TokenScores]:
        return score_rollouts(self, rollouts, options)

    def save(self, path: str | Path, cell: int = 0) -> None:
        """Write one cell as an ordinary Hugging Face checkpoint folder: config.json, model.safetensors, tokenizer.

        Only its adapters, if it has any: adapter_config.json, adapter_model.safetensors, tokenizer.
        """
        folder = Path(path)
        weights = {name: value[cell].detach().cpu() for name, value in self.parameters.items()}
        if self.adapters is not None:
            write_adapters(folder, self.adapters, self.origin, self.revision, weights)
            self.tokenizer.save_pretrained(str(folder))
            return
        write_checkpoint(folder, self.config, self.tokenizer, self.architecture, weights)
        write_generation_config(folder, self.generation_config)

    @torch.no_grad()
    def named_weights(self, cell: int) -> Iterator[tuple[str, Tensor]]:
        own = {name: value[cell].detach() for name, value in self.parameters.items()}
        base = own if self.adapters is None and own else {name: value[0] for name, value in self.shared.items()}
        for name, value in base.items():
            merged = value if self.adapters is None else self.adapters.merge_into(name, value, own)
            yield from named_tensors({name: merged}, self.architecture)

    @torch.no_grad()
    def load(self, path: str | Path, cell: int) -> None:
        """Put a checkpoint's weights into one cell, or its adapters if the policy has some.

        Raises:
            UserError: the checkpoint has another architecture, or other adapters.
        """
        if self.adapters is not None:
            for name, value in read_adapters(path, self.adapters).items():
                self.parameters[name][cell].copy_(value)
            return
        architecture = Architecture.from_config(checkpoint_config(path))
        if architecture.parameter_shapes() != self.architecture.parameter_shapes():
            raise UserError("the checkpoint has another architecture than the policy it is loaded into", file=path)
        for name, value in read_weights(path, architecture).items():
            self.parameters[name][cell].copy_(value)

    def frozen_copy(self, dtype: torch.dtype | None = None) -> StackedPolicy:
        """See `Policy`.

        Adapters that add nothing yet (B = 0) are left off; weights that are the same in all cells are held once.

        Args:
            dtype: of all its weights; None: as they are.
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

    def trailing_copy(self) -> StackedPolicy:
        copies = {name: value.detach().clone() for name, value in self.parameters.items()}
        return self._like(copies, self.shared, self.adapters, self.cells)

    @torch.no_grad()
    def sampling_copy(self, dtype: torch.dtype, earlier: Policy | None) -> StackedPolicy:
        """See `Policy`. Weights are copied to where they stood, so that recorded decoding steps stay valid."""
        if isinstance(earlier, StackedPolicy):
            for name, value in earlier.parameters.items():
                value.copy_(self.parameters[name])
            return earlier
        copies = {name: value.detach().to(dtype, copy=True) for name, value in self.parameters.items()}
        shared = {name: value.to(dtype) for name, value in self.shared.items()}
        return self._like(copies, shared, self.adapters, self.cells)

    def select(self, cells: Sequence[int]) -> StackedPolicy:
        """Some of the cells as a policy of their own, to sample from: without gradient."""
        if list(cells) == list(range(self.cells)):
            return self
        chosen = {name: value.detach()[list(cells)] for name, value in self.parameters.items()}
        selected = self._like(chosen, self.shared, self.adapters, len(cells))
        owner, own = self._selected_from or (self, list(range(self.cells)))
        selected._selected_from = (owner, [own[c] for c in cells])
        return selected

    def release_memory(self) -> None:
        self.steps.clear()
