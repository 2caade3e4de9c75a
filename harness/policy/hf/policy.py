"""Policies of every causal language model that transformers knows, cell by cell over one module."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from klab.grid.errors import UserError
from klab.harness.policy.categorical import Draw
from klab.harness.policy.hf import peft
from klab.harness.policy.hf.decoding import CachedDecoder, UncachedDecoder, pad_rows
from klab.harness.policy.hf.functional_model import FunctionalModel
from klab.harness.policy.hf.output_layer import chunked_log_softmax
from klab.harness.policy.ordered_gather import take_rows
from klab.harness.policy.policy import BlockDecoder, IncrementalDecoder, Policy
from klab.harness.policy.pretrained import (
    GENERATION_CONFIG,
    check_vocabulary,
    first_line,
    read_config,
    read_generation_config,
    read_tokenizer,
    write_generation_config,
)
from klab.harness.policy.prompt import PromptEncoder
from klab.harness.policy.rollout import Rollout
from klab.harness.policy.scores import ScoreOptions, TokenScores, gather_rows, gather_scores, max_logits
from klab.harness.policy.special_tokens import eos_token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_ALIGNMENT = 64
"""Bytes; see `_aligned`."""

UNLIMITED_CONTEXT = 2**31
"""The context of a model whose configuration names none."""


class TransformersPolicy:
    """C policies of one architecture that share one module; see `Policy`.

    Attributes:
        cells: C.
        parameters: name (as transformers or PEFT has it) -> [C, …], leaf tensors; with adapters, only these.
        shared: name -> frozen weights that all cells have in common; empty without adapters.
        lora_enabled: whether the module's adapters take part.
        origin, revision: folder or hub id of the checkpoint, written as the base model of adapters.
        generation_config: the checkpoint's, None without.
        trust_remote_code: whether Python code of the checkpoint may run.
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
        self.trust_remote_code = False
        self.origin = str(config.name_or_path or "")
        self.revision: str | None = None
        self.generation_config: dict[str, Any] | None = None
        self.encode_prompt = PromptEncoder(tokenizer, model.vocab_size)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        seeds: Sequence[int] = (0,),
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        lora: Any = None,
        gradient_checkpointing: bool = False,
        trust_remote_code: bool = False,
    ) -> TransformersPolicy:
        """One copy of a checkpoint per seed.

        Args:
            folder: a folder or a hub id.
            seeds: new adapters are drawn from them; nothing else.
            lora: the grid's `policy.lora`.
            trust_remote_code: whether Python code of the checkpoint may run.

        Raises:
            UserError: the checkpoint or its tokenizer cannot be read or used, or PEFT is not installed.
        """
        config = read_config(folder, trust_remote_code)
        tokenizer = read_tokenizer(folder, trust_remote_code)
        generation_config = read_generation_config(folder)
        module = read_model(folder, config, dtype, trust_remote_code)
        if lora is not None:
            module = peft.attach(module, lora)
        model = FunctionalModel(module.to(device))
        if model.finish is None:
            print(
                f"klab: {folder}: the model changes its logits in a way of its own, so that all those of a micro-batch "
                "are held at once; training.token_budget limits them",
                file=sys.stderr,
            )
        eos_token_ids(tokenizer, generation_config, model.vocab_size)
        check_vocabulary(tokenizer, model.vocab_size)
        own = model.take_parameters()
        if gradient_checkpointing:
            model.enable_gradient_checkpointing()
        names = [name for name in own if lora is None or peft.is_adapter(name)]
        trained = {name: _aligned(own.pop(name).detach()) for name in names}
        shared = {name: _aligned(own.pop(name).detach()) for name in list(own)}
        if lora is not None:
            stacked = peft.initial_weights(trained, seeds)
        else:
            stacked = {name: _copies(value, len(seeds)) for name, value in trained.items()}
        parameters = {name: value.requires_grad_() for name, value in stacked.items()}
        policy = cls(model, config, tokenizer, parameters, shared, len(seeds))
        policy.generation_config, policy.trust_remote_code = generation_config, trust_remote_code
        return policy

    def with_weights(self, parameters: dict[str, Tensor], shared: dict[str, Tensor], cells: int) -> TransformersPolicy:
        """The same model with other tensors as its weights."""
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
        return int(getattr(text, "max_position_embeddings", None) or UNLIMITED_CONTEXT)

    @cached_property
    def eos_token_ids(self) -> frozenset[int]:
        return eos_token_ids(self.tokenizer, self.generation_config, self.vocab_size)

    @property
    def device(self) -> torch.device:
        return self._some_weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self._some_weight.dtype

    @property
    def _some_weight(self) -> Tensor:
        return next(iter((self.shared or self.parameters).values()))

    def weights(self) -> list[dict[str, Tensor]]:
        """Each cell's parameters by name, which carry gradients to the stacked ones where gradients are enabled.

        Elsewhere they are detached: torch may choose another kernel for a tensor that requires a gradient.
        """
        own = self.parameters
        if not torch.is_grad_enabled():
            own = {name: value.detach() for name, value in own.items()}
        if self.cells == 1:
            return [{**self.shared, **{name: value.squeeze(0) for name, value in own.items()}}]
        slices = {name: value.unbind(0) for name, value in own.items()}
        return [{**self.shared, **{name: each[c] for name, each in slices.items()}} for c in range(self.cells)]

    def logits(
        self,
        weights: Mapping[str, Tensor],
        tokens: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        cache: Any = None,
    ) -> tuple[Tensor, Tensor]:
        """Logits and final hidden states, see `FunctionalModel`.

        Raises:
            UserError: a sequence exceeds the model's context.
        """
        self._check_length(int(attention_mask.sum(1).max()))
        return self.model(weights, tokens, attention_mask, logits_to_keep, cache, self.lora_enabled)

    def _check_length(self, longest: int) -> None:
        if longest > self.context_length:
            raise UserError(f"sequences of {longest} tokens exceed the model's context", value=self.context_length)

    def decoder(
        self,
        prompts: Sequence[Sequence[Sequence[int]]],
        group_size: int,
        plain: bool = False,
        kept_tokens: int = 0,
    ) -> IncrementalDecoder:
        if plain or not self.model.has_kv_cache:
            return UncachedDecoder(self, prompts, group_size)
        return CachedDecoder(self, prompts, group_size)

    def block_decoder(
        self, prompts: Sequence[Sequence[Sequence[int]]], group_size: int, max_new_tokens: int, draw: Draw
    ) -> BlockDecoder | None:
        """None: transformers' cache grows."""
        return None

    def score(self, rollouts: Sequence[Rollout], options: ScoreOptions) -> list[TokenScores]:
        """Every trajectory forwarded in full, padded at the right, with or without `options.plain`."""
        pairs = zip(self.weights(), rollouts, strict=True)
        return [self._score_cell(weights, rollout, options) for weights, rollout in pairs]

    def scores_of_model(
        self, model: FunctionalModel, rollouts: Sequence[Rollout], options: ScoreOptions
    ) -> list[TokenScores]:
        """Score one cell's rollout with the parameters that a copy of the model has of its own."""
        other = copy.copy(self)
        other.model = model
        return [other._score_cell({}, rollout, options) for rollout in rollouts]

    def _score_cell(self, weights: Mapping[str, Tensor], rollout: Rollout, options: ScoreOptions) -> TokenScores:
        mask, prompts, host = rollout.mask, rollout.prompts, rollout.on_host
        device = mask.device
        groups = [row // rollout.group_size for row in range(len(mask))]
        lengths, completions = host.lengths.tolist(), host.tokens.tolist()
        sequences = [[*prompts[g], *completions[i][: max(lengths[i] - 1, 0)]] for i, g in enumerate(groups)]
        tokens, attention_mask = pad_rows(sequences, device)
        first = min(len(prompts[g]) for g in groups) - 1
        keep = tokens.shape[1] - first
        in_chunks = self._needs_chunks(sum(lengths), options, device)
        self._check_length(tokens.shape[1])
        if in_chunks:
            hidden = self.model.final_states(weights, tokens, attention_mask, keep, self.lora_enabled)
        else:
            values, hidden = self.model(weights, tokens, attention_mask, keep, None, self.lora_enabled)
        starts = torch.tensor([len(prompts[g]) for g in groups]) - 1 - first
        columns = starts[:, None] + torch.arange(mask.shape[1])
        wanted = (columns + keep * torch.arange(len(sequences))[:, None])[host.mask]
        logits_index = torch.zeros_like(columns).masked_scatter(host.mask, torch.arange(len(wanted)))
        wanted, logits_index = (index.to(device, non_blocking=True) for index in (wanted, logits_index))
        if in_chunks:
            chosen = take_rows(hidden.reshape(-1, hidden.shape[-1]), wanted)
            return self._score_in_chunks(weights, rollout, chosen, logits_index, options)
        logits = take_rows(values.reshape(-1, values.shape[-1]), wanted)
        if logits.dtype in (torch.float16, torch.bfloat16):
            logits = logits.float()
        states = take_rows(hidden.reshape(-1, hidden.shape[-1]), wanted) if options.states else None
        return gather_scores(rollout, logits_index, logits, states, options)

    def _needs_chunks(self, rows: int, options: ScoreOptions, device: torch.device) -> bool:
        """Whether so many rows' logits are too many to hold at once. They are held if the caller wants them, and where
        it is not known what the model makes of them."""
        too_many = rows * self.vocab_size > max_logits(device)
        return too_many and self.model.finish is not None and not options.logits

    def _score_in_chunks(
        self,
        weights: Mapping[str, Tensor],
        rollout: Rollout,
        states: Tensor,
        index: Tensor,
        options: ScoreOptions,
    ) -> TokenScores:
        """What `gather_scores` gives, from the hidden states [K, hidden_size] that predict a rollout's K own tokens.

        Args:
            index: the row of `states` that predicts each token [N, T].
        """
        mask, finish = rollout.mask, self.model.finish
        assert finish is not None
        weight, bias = self.model.output_embedding(weights)
        logp, entropy = chunked_log_softmax(
            states,
            weight,
            bias,
            finish,
            rollout.tokens[mask],
            options.temperature,
            options.entropy,
            options.entropy_gradient,
        )
        scores = TokenScores(logp.new_zeros(mask.shape).masked_scatter(mask, logp))
        if options.entropy:
            scores.entropy = logp.new_zeros(mask.shape).masked_scatter(mask, entropy)
        if options.states:
            scores.states = gather_rows(states, index, mask)
        return scores

    def frozen_copy(self, dtype: torch.dtype | None = None) -> TransformersPolicy:
        """See `Policy`. Adapters that add nothing yet (B = 0) are left off; frozen weights are not copied."""
        copies = {name: value.detach().to(dtype or value.dtype, copy=True) for name, value in self.parameters.items()}
        shared = {name: value.to(dtype or value.dtype) for name, value in self.shared.items()}
        if self.lora_enabled and not any(copies[name].any() for name in copies if peft.is_lora_b(name)):
            return self.with_weights({}, shared, self.cells)
        return self.with_weights(copies, shared, self.cells)

    def trailing_copy(self) -> TransformersPolicy:
        copies = {name: value.detach().clone() for name, value in self.parameters.items()}
        return self.with_weights(copies, self.shared, self.cells)

    def sampling_copy(self, dtype: torch.dtype, earlier: Policy | None) -> TransformersPolicy:
        """See `Policy`; a new one."""
        return self.frozen_copy(dtype)

    def select(self, cells: Sequence[int]) -> TransformersPolicy:
        """Some of the cells as a policy of their own, without gradient."""
        chosen = {name: value.detach() for name, value in self.parameters.items()}
        if list(cells) != list(range(self.cells)):
            chosen = {name: value[list(cells)] for name, value in chosen.items()}
        return self.with_weights(chosen, self.shared, len(cells))

    def save(self, path: str | Path, cell: int) -> None:
        """One cell as an ordinary checkpoint folder with its tokenizer; only its adapters, if it has any."""
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: value[cell].detach().cpu().clone() for name, value in self.parameters.items()}
        self.tokenizer.save_pretrained(str(folder))
        if self.lora_enabled:
            peft.write_adapters(folder, self.model.model, self.origin, self.revision, weights)
            return
        with self.model.swap_parameters(weights):
            self.model.base.save_pretrained(folder)
        config = copy.deepcopy(self.config)
        config.dtype, config.architectures = self.dtype, [type(self.model.base).__name__]
        config.save_pretrained(folder)
        (folder / GENERATION_CONFIG).unlink(missing_ok=True)
        write_generation_config(folder, self.generation_config)

    @torch.no_grad()
    def named_weights(self, cell: int) -> Iterator[tuple[str, Tensor]]:
        own = {name: value[cell].detach() for name, value in self.parameters.items()}
        for name, value in ({**self.shared, **own}).items():
            if not peft.is_adapter(name):
                merged = peft.merged(self.model, name, value, own) if self.lora_enabled else value
                yield peft.name_in_base(name), merged

    @torch.no_grad()
    def load(self, path: str | Path, cell: int) -> None:
        if self.lora_enabled:
            found = peft.read_adapters(path)
        else:
            model = read_model(path, read_config(path, self.trust_remote_code), self.dtype, self.trust_remote_code)
            found = dict(FunctionalModel(model).take_parameters())
        if {n: v.shape for n, v in found.items()} != {n: v.shape[1:] for n, v in self.parameters.items()}:
            raise UserError("the checkpoint has another architecture than the policy it is loaded into", file=path)
        for name, value in found.items():
            self.parameters[name][cell].copy_(value)

    def release_memory(self) -> None:
        """Nothing is kept between calls."""


def read_model(folder: str | Path, config: Any, dtype: torch.dtype, trust_remote_code: bool = False) -> Any:
    """The module of a checkpoint, on the CPU, without dropout.

    Raises:
        UserError: it cannot be read, is no causal language model, or lacks weights.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig
    from transformers.utils import logging

    without_dropout = _without_dropout(copy.deepcopy(config))
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    model: Any
    report: Any
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            str(folder),
            config=without_dropout,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )  # type: ignore[misc]
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        raise UserError(f"no readable causal language model: {first_line(error)}", file=folder) from error
    absent = sorted(report["missing_keys"])
    if absent:
        raise UserError(f"the checkpoint has no tensor {absent[0]!r}", file=folder)
    if config.is_encoder_decoder:
        raise UserError("an encoder and decoder, not a causal language model", file=folder, key="policy.model")
    train_padding_token(model)
    model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]  # the checkpoint's own may be one that cannot be saved
    return model


def train_padding_token(model: Any) -> None:
    """Let the embedding of the padding token have its gradient: a policy may generate that token as any other, and
    transformers would leave it out."""
    embedding = model.get_input_embeddings()
    if getattr(embedding, "padding_idx", None) is not None:
        embedding.padding_idx = None


def _without_dropout(config: Any) -> Any:
    for part in (config, config.get_text_config()):
        for name, value in vars(part).items():
            if "drop" in name and isinstance(value, float):
                setattr(part, name, 0.0)
    return config


def _aligned(value: Tensor) -> Tensor:
    """The tensor at an aligned address, on which the bits of products depend: a mapped file puts it anywhere."""
    return value if value.data_ptr() % _ALIGNMENT == 0 else value.clone()


def _copies(value: Tensor, cells: int) -> Tensor:
    """[C, …]; of one cell it is the tensor itself."""
    return value.unsqueeze(0) if cells == 1 else value.expand(cells, *value.shape).clone()
