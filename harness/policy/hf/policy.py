"""Every causal language model that the stacked decoder does not know, through `transformers`, cell by cell."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from klab.grid.errors import UserError
from klab.harness.policy.hf import peft as peft_adapters
from klab.harness.policy.hf.decoding import CachedDecoder, UncachedDecoder, padded
from klab.harness.policy.hf.functional_model import FunctionalModel
from klab.harness.policy.policy import IncrementalDecoder
from klab.harness.policy.prompt import check_vocabulary, end_tokens, read_generation, write_generation
from klab.harness.policy.rollout import Rollout
from klab.harness.policy.scores import TokenScores, gather_scores
from klab.harness.policy.stacked.checkpoint import read_config, read_tokenizer

_ALIGNMENT = 64

BOUNDLESS = 2**31
"""The context of a model whose configuration names none."""


class TransformersPolicy:
    """C policies of one architecture that share one module.

    Attributes:
        cells: C.
        parameters: name (as transformers or PEFT has it) -> [C, …], leaf tensors; with adapters, only these.
        shared: name -> frozen weights that all cells have in common; empty without adapters.
        adapted: whether the module's adapters are on.
        origin, revision: folder or hub id of the checkpoint, named as the base of adapters.
        generation: the checkpoint's generation configuration.
    """

    def __init__(
        self,
        model: FunctionalModel,
        config: Any,
        tokenizer: PreTrainedTokenizerFast,
        parameters: dict[str, Tensor],
        shared: dict[str, Tensor],
        cells: int,
    ) -> None:
        self.model, self.config, self.tokenizer = model, config, tokenizer
        self.parameters, self.shared, self.cells = parameters, shared, cells
        self.lora_enabled = bool(parameters and shared)
        self.trusted = False
        self.origin = str(getattr(config, "_name_or_path", ""))
        self.revision: str | None = None
        self.generation: dict[str, Any] | None = None

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        seeds: Sequence[int] = (0,),
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        lora: Any = None,
        gradient_checkpointing: bool = False,
        trusted: bool = False,
    ) -> TransformersPolicy:
        """One copy of a checkpoint per seed.

        Args:
            folder: a folder or a hub id.
            seeds: new adapters are drawn from them; nothing else.
            lora: the grid's `policy.lora`.
            trusted: whether the checkpoint's own Python code may run.

        Raises:
            UserError: the checkpoint or its tokenizer cannot be read or used, or PEFT is not installed.
        """
        config = read_config(folder, trusted)
        tokenizer = read_tokenizer(folder, trusted)
        generation = read_generation(folder)
        model = read_model(folder, config, dtype, trusted)
        if lora is not None:
            model = peft_adapters.attach(model, lora)
        model = FunctionalModel(model.to(device))
        end_tokens(tokenizer, generation, model.vocab_size)
        check_vocabulary(tokenizer, model.vocab_size)
        own = model.emptied()
        if gradient_checkpointing:
            model.checkpoint_gradients()
        names = [name for name in own if lora is None or peft_adapters.is_part(name)]
        trained = {name: _aligned(own.pop(name).detach()) for name in names}
        shared = {name: _aligned(own.pop(name).detach()) for name in list(own)}
        if lora is not None:
            stacked = peft_adapters.initial(trained, seeds)
        else:
            stacked = {name: _copies(value, len(seeds)) for name, value in trained.items()}
        parameters = {name: value.requires_grad_() for name, value in stacked.items()}
        policy = cls(model, config, tokenizer, parameters, shared, len(seeds))
        policy.generation, policy.trusted = generation, trusted
        return policy

    def _like(self, parameters: dict[str, Tensor], shared: dict[str, Tensor], cells: int) -> TransformersPolicy:
        other = copy.copy(self)
        other.parameters, other.shared, other.cells = parameters, shared, cells
        other.lora_enabled = bool(parameters and shared)
        return other

    @property
    def vocab_size(self) -> int:
        return self.model.vocab_size

    @property
    def hidden_size(self) -> int:
        return self.model.hidden_size

    @property
    def context_length(self) -> int:
        text = self.config.get_text_config()
        return int(getattr(text, "max_position_embeddings", None) or BOUNDLESS)

    @property
    def eos_token_ids(self) -> frozenset[int]:
        return end_tokens(self.tokenizer, self.generation, self.vocab_size)

    @property
    def device(self) -> torch.device:
        return self._any.device

    @property
    def dtype(self) -> torch.dtype:
        return self._any.dtype

    @property
    def _any(self) -> Tensor:
        return next(iter((self.shared or self.parameters).values()))

    def weights(self) -> list[dict[str, Tensor]]:
        """What the module is lent for each cell; carries gradients to the stacked parameters where they are enabled.

        Elsewhere nothing may look as if it did: how a product is computed depends on that.
        """
        own = self.parameters
        if not torch.is_grad_enabled():
            own = {name: value.detach() for name, value in own.items()}
        if self.cells == 1:
            return [{**self.shared, **{name: value.squeeze(0) for name, value in own.items()}}]
        slices = {name: value.unbind(0) for name, value in own.items()}
        return [{**self.shared, **{name: each[c] for name, each in slices.items()}} for c in range(self.cells)]

    def logits(
        self, weights: Mapping[str, Tensor], tokens: Tensor, present: Tensor, keep: int, cache: Any = None
    ) -> tuple[Tensor, Tensor]:
        """See `Skeleton.logits`. Raises UserError where a sequence exceeds the context."""
        longest = int(present.sum(1).max())
        if longest > self.context_length:
            raise UserError(f"sequences of {longest} tokens exceed the model's context", value=self.context_length)
        return self.model.logits(weights, tokens, present, keep, cache, self.lora_enabled)

    def decoder(
        self, prompts: Sequence[Sequence[Sequence[int]]], group_size: int, plain: bool = False
    ) -> IncrementalDecoder:
        if plain or not self.model.cached:
            return UncachedDecoder(self, prompts, group_size)
        return CachedDecoder(self, prompts, group_size)

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
        """Every trajectory forwarded in full, padded at the right; `plain` is no different."""
        pairs = zip(self.weights(), rollouts, strict=True)
        return [self._scored(weights, each, temperature, logits, entropy, states) for weights, each in pairs]

    def _scored(
        self,
        weights: Mapping[str, Tensor],
        rollout: Rollout,
        temperature: float,
        logits: bool,
        entropy: bool,
        states: bool,
    ) -> TokenScores:
        mask, prompts, groups = rollout.mask, rollout.prompts, rollout.groups.tolist()
        lengths = rollout.present.sum(1).tolist()
        own = rollout.tokens.tolist()
        rows = [[*prompts[g], *own[i][: max(lengths[i] - 1, 0)]] for i, g in enumerate(groups)]
        tokens, present = padded(rows, self.device)
        first = min(len(prompts[g]) for g in groups) - 1
        keep = tokens.shape[1] - first
        values, hidden = self.logits(weights, tokens, present, keep)
        starts = torch.tensor([len(prompts[g]) for g in groups], device=self.device) - 1 - first
        columns = starts[:, None] + torch.arange(mask.shape[1], device=self.device)
        wanted = (columns + keep * torch.arange(len(rows), device=self.device)[:, None])[mask]
        source = torch.zeros_like(columns).masked_scatter(mask, torch.arange(len(wanted), device=self.device))
        chosen = values.reshape(-1, values.shape[-1]).index_select(0, wanted)
        if chosen.dtype in (torch.float16, torch.bfloat16):
            chosen = chosen.float()
        tempered = chosen if temperature == 1.0 else chosen / temperature
        kept = hidden.reshape(-1, hidden.shape[-1]).index_select(0, wanted) if states else None
        return gather_scores(rollout, source, tempered, kept, logits, entropy)

    def frozen_copy(self, dtype: torch.dtype | None = None) -> TransformersPolicy:
        """Adapters that add nothing yet (B = 0) are left off, and the weights they are added to are not copied."""
        copies = {name: value.detach().to(dtype or value.dtype, copy=True) for name, value in self.parameters.items()}
        shared = {name: value.to(dtype or value.dtype) for name, value in self.shared.items()}
        if self.lora_enabled and not any(copies[name].any() for name in copies if peft_adapters.is_second(name)):
            return self._like({}, shared, self.cells)
        return self._like(copies, shared, self.cells)

    def select(self, cells: Sequence[int]) -> TransformersPolicy:
        """Some of the cells as a policy of their own, without gradient."""
        chosen = {name: value.detach() for name, value in self.parameters.items()}
        if list(cells) != list(range(self.cells)):
            chosen = {name: value[list(cells)] for name, value in chosen.items()}
        return self._like(chosen, self.shared, len(cells))

    def save(self, path: str | Path, cell: int) -> None:
        """One cell as an ordinary checkpoint folder with its tokenizer; its adapters alone, if it has any."""
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: value[cell].detach().cpu().clone() for name, value in self.parameters.items()}
        self.tokenizer.save_pretrained(str(folder))
        if self.lora_enabled:
            peft_adapters.write(folder, self.model.model, self.origin, self.revision, weights)
            return
        with self.model.lending(weights):
            self.model.base.save_pretrained(folder)
        config = copy.deepcopy(self.config)
        config.dtype, config.architectures = self.dtype, [type(self.model.base).__name__]
        config.save_pretrained(folder)
        (folder / "generation_config.json").unlink(missing_ok=True)
        write_generation(folder, self.generation)

    @torch.no_grad()
    def load(self, path: str | Path, cell: int) -> None:
        if self.lora_enabled:
            found = peft_adapters.read(path)
        else:
            model = read_model(path, read_config(path, self.trusted), self.dtype, self.trusted)
            found = dict(FunctionalModel(model).emptied())
        if {n: v.shape for n, v in found.items()} != {n: v.shape[1:] for n, v in self.parameters.items()}:
            raise UserError("the checkpoint has another architecture than the policy it is loaded into", file=path)
        for name, value in found.items():
            self.parameters[name][cell].copy_(value)


def read_model(folder: str | Path, config: Any, dtype: torch.dtype, trusted: bool = False) -> Any:
    """The module of a checkpoint, on the CPU, without dropout.

    Raises:
        UserError: it cannot be read, is no causal language model, or lacks weights.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig
    from transformers.utils import logging

    quiet = _without_dropout(copy.deepcopy(config))
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    model: Any
    report: Any
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            str(folder), config=quiet, dtype=dtype, trust_remote_code=trusted, output_loading_info=True
        )  # type: ignore[misc]
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise UserError(f"no readable causal language model: {lines[0].strip()}", file=folder) from error
    absent = sorted(report["missing_keys"])
    if absent:
        raise UserError(f"the checkpoint has no tensor {absent[0]!r}", file=folder)
    if config.is_encoder_decoder:
        raise UserError("an encoder and decoder, not a causal language model", file=folder, key="policy.model")
    model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]  # the checkpoint's own may be one that cannot be saved
    return model


def _without_dropout(config: Any) -> Any:
    for part in {id(each): each for each in (config, config.get_text_config())}.values():
        for name, value in vars(part).items():
            if "drop" in name and isinstance(value, float):
                setattr(part, name, 0.0)
    return config


def _aligned(value: Tensor) -> Tensor:
    """The tensor, allocated; in a mapped file it begins anywhere, and the bits of products depend on where."""
    return value if value.data_ptr() % _ALIGNMENT == 0 else value.clone()


def _copies(value: Tensor, cells: int) -> Tensor:
    """[C, …]; of one cell it is the tensor itself."""
    return value.unsqueeze(0) if cells == 1 else value.expand(cells, *value.shape).clone()
