"""TRL's trainer with klab's token ids, texts and log-probabilities: what the policy and its reference say of sequences.

Prompts are encoded, and completions read, as klab's own engine does. Log-probabilities are TRL's; of a float64 policy,
and where an objective reads whole distributions, they are computed from the model's logits.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor
from trl import GRPOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import use_adapter

from klab.grid import UserError
from klab.harness.engines.trl.accelerated_group import AcceleratedGroup
from klab.harness.engines.trl.live_policy import LivePolicy
from klab.harness.policy.hf.functional_model import FunctionalModel
from klab.harness.policy.hf.policy import train_padding_token
from klab.harness.policy.pretrained import read_generation_config
from klab.harness.policy.prompt import PromptEncoder
from klab.harness.policy.scores import entropy_of
from klab.harness.policy.special_tokens import answer_tokens, eos_token_ids, trailing_special_tokens
from klab.harness.training.data.prompts import chat_template
from klab.harness.training.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from klab.harness.training.forward import ForwardPass
from klab.harness.training.packed_cell import PackedCell


class ScoringTrainer(GRPOTrainer):  # type: ignore[misc]
    """A cell's model on TRL.

    Args:
        member: the cell, its task, and the folder that its policy starts from.
        arguments: of `GRPOTrainer`, without the model.

    Attributes:
        group: the processes that train together.
    """

    generation_config: Any
    generation_kwargs: dict[str, Any]

    def __init__(self, member: PackedCell, **arguments: Any) -> None:
        self.member = member
        self.group: ProcessGroup = SINGLE_PROCESS
        self._generation_config = read_generation_config(member.start)
        self._exact = member.cell.policy.dtype == "float64"
        super().__init__(model=str(member.start), **arguments)
        self.group = AcceleratedGroup(self.accelerator)
        self._set_end_tokens()
        train_padding_token(self.model)
        _without_dropout(self.model)
        self._trailing = trailing_special_tokens(self._tokenizer)
        self._start_weights = self._weights_before_moves()
        for model in (self.model, self.ref_model):
            if model is not None and not _is_rotary(model):
                model.register_forward_pre_hook(_with_positions, with_kwargs=True)

    @property
    def moves_reference(self) -> bool:
        """Whether TRL moves its reference model (`sync_ref_model`)."""
        reference = self.member.cell.training.reference
        return reference is not None and reference.follows == "policy"

    def _weights_before_moves(self) -> dict[str, Tensor] | None:
        """A copy of the weights of a reference that moves: what the cell starts from; None where it stays."""
        if not self.moves_reference:
            return None
        if self.is_sharded or self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            raise UserError(
                "with training.engine: trl a reference moves where each process has the whole model",
                key="training.reference",
                hint="Leave FSDP or DeepSpeed out of resources.launcher, or the reference fixed.",
            )
        return {name: value.clone() for name, value in self.reference_weights().items()}

    def reference_weights(self) -> dict[str, Tensor]:
        """The weights of the reference model by name, as they lie there."""
        found = FunctionalModel(self.accelerator.unwrap_model(self.ref_model)).parameters()
        return {name: value.detach() for name, value in found.items()}

    def _set_end_tokens(self) -> None:
        """Let the tokens that end a turn for klab end a completion."""
        vocabulary = int(self.model.config.get_text_config().vocab_size)
        self._encode = PromptEncoder(self._tokenizer, vocabulary)
        self.eos_token_ids = sorted(eos_token_ids(self._tokenizer, self._generation_config, vocabulary))
        if not self.use_vllm:
            self.generation_config.eos_token_id = self.eos_token_ids
            self.generation_kwargs["eos_token_id"] = self.eos_token_ids

    @property
    def is_sharded(self) -> bool:
        """Whether each process holds a part of the weights only, so that all must go through the model together."""
        return bool(self.is_fsdp_enabled or self._dist.is_zero3)

    def _tokenize_prompts(self, prompts: list[str]) -> tuple[list[list[int]], None, dict[str, Any]]:
        return [self.prompt_ids(prompt) for prompt in prompts], None, {}

    def prompt_ids(self, prompt: str) -> list[int]:
        """Token ids of a prompt, as klab's own engine has them."""
        return list(self._encode(prompt, chat_template(self.member.cell), self.member.now))

    def text_of(self, tokens: Sequence[int]) -> str:
        """The text of a completion, as klab's own engine gives it to the task."""
        shown = answer_tokens(tokens, self.eos_token_ids, self._trailing)
        return str(self._tokenizer.decode(list(shown), skip_special_tokens=False))

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        **more: Any,
    ) -> Any:
        """TRL's, whose head works in float32; of a float64 policy they are computed from its logits."""
        if not self._exact:
            return super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, batch_size=batch_size, **more
            )
        pieces = [torch.split(each, batch_size or len(each)) for each in (input_ids, attention_mask)]
        parts = [self._scores_from_logits(model, ids, mask, logits_to_keep) for ids, mask in zip(*pieces, strict=True)]
        return torch.cat([each.logp for each in parts]), torch.cat([each.entropy for each in parts]), None

    def _scores_from_logits(self, model: Any, ids: Tensor, attention: Tensor, keep: int) -> ForwardPass:
        """Log-probabilities, entropies and logits of the last `keep` tokens, from the model's logits."""
        only = {"logits_to_keep": keep + 1} if "logits_to_keep" in _arguments(self.model) else {}
        with self.accelerator.autocast():
            logits = model(input_ids=ids, attention_mask=attention, use_cache=False, **only).logits[:, -keep - 1 : -1]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / self.temperature
        logp = logits.log_softmax(-1)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.member.needs_entropy_gradient):
            entropy = entropy_of(logp)
        return ForwardPass(logp.gather(-1, ids[:, -keep:, None]).squeeze(-1), entropy, logits)

    def scores_without_gradient(self, output: dict[str, Any]) -> Tensor:
        """Log-probabilities [n, T] of what was generated, under the policy as it is."""
        ids, attention, keep = _sequences(output)
        rows = self.args.per_device_train_batch_size
        with torch.no_grad(), disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
            logp: Tensor = self._get_per_token_logps_and_entropies(self.model, ids, attention, keep, batch_size=rows)[0]
        return logp

    def forward_pass(self, model: Any, inputs: dict[str, Any]) -> ForwardPass:
        """The policy's scores of a micro-batch, with logits of policy and reference where the objective reads them."""
        ids, attention, keep = _sequences(inputs)
        if not self.member.needs_logits:
            logp, entropy, _ = self._get_per_token_logps_and_entropies(
                model, ids, attention, keep, compute_entropy=True
            )
            return ForwardPass(logp, entropy)
        own = self._scores_from_logits(model, ids, attention, keep)
        with torch.no_grad(), self._reference_model() as reference:
            other = self._scores_from_logits(reference, ids, attention, keep).logits
        return ForwardPass(own.logp, own.entropy, own.logits, other)

    @contextmanager
    def _reference_model(self) -> Iterator[Any]:
        """The reference policy: a model of its own, or the one in training with its adapters off."""
        if self.ref_model is not None:
            yield self.ref_model
        else:
            with use_adapter(self.accelerator.unwrap_model(self.model), adapter_name=None):
                yield self.model

    def policies(self) -> tuple[LivePolicy, LivePolicy, LivePolicy | None]:
        """The policy in training, the one that it started from, and a reference that moves, to evaluate."""
        policy = self.accelerator.unwrap_model(self.model_wrapped) if self.is_sharded else self.model
        reference = policy if self.ref_model is None else self.accelerator.unwrap_model(self.ref_model)
        given = (self._tokenizer, self._generation_config)
        return (
            LivePolicy(policy, *given),
            LivePolicy(reference, *given, adapters=self.ref_model is not None, weights=self._start_weights),
            LivePolicy(reference, *given) if self.moves_reference else None,
        )

    def sampling_view(self) -> LivePolicy:
        """The policy in training, for whoever builds its trajectories turn by turn."""
        view = LivePolicy(self.model, self._tokenizer, self._generation_config)
        self.model.train()
        return view


def _without_dropout(model: Any) -> None:
    """Set the rates of dropout that modules hold as numbers to 0: `disable_dropout` knows modules of dropout only, and
    OPT, say, has none."""
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def _sequences(output: dict[str, Any]) -> tuple[Tensor, Tensor, int]:
    """Token ids [n, P + T], attention mask, and T."""
    ids = torch.cat([output["prompt_ids"], output["completion_ids"]], 1)
    attention = torch.cat([output["prompt_mask"], output["completion_mask"]], 1)
    return ids, attention, output["completion_ids"].shape[1]


def _is_rotary(model: Any) -> bool:
    """Whether a model's positions are relative, so that padding at the left does not shift them."""
    config = model.config.get_text_config()
    return any(getattr(config, name, None) is not None for name in ("rope_parameters", "rope_theta", "rope_scaling"))


def _with_positions(model: Any, positional: Any, given: dict[str, Any]) -> Any:
    """Position ids that do not count the padding at the left: TRL passes none, and models with learned positions would
    count it."""
    mask = given.get("attention_mask")
    absent = given.get("position_ids") is None and given.get("past_key_values") is None
    if absent and mask is not None and mask.dim() == 2 and "input_ids" in given and "position_ids" in _arguments(model):
        given = {**given, "position_ids": (mask.long().cumsum(1) - 1).clamp(min=0)}
    return positional, given


def _arguments(model: Any) -> Collection[str]:
    """What the forward pass of a causal language model takes, its adapters aside."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return inspect.signature(type(base).forward).parameters
