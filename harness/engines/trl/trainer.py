"""`trl.GRPOTrainer` with klab's prompts, rewards, objective and learning-rate schedule.

What TRL keeps: generation, the buffer of rollouts, gradient accumulation, wrapping by accelerate, the optimizer,
checkpoints. What is klab's: token ids of the prompts, scores of the completions, advantages and loss. Groups are worked
on before TRL shuffles a process's trajectories, when each process still holds the rows that TRL gathers in order.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from trl import GRPOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import use_adapter

from klab.harness.engines.trl.accelerated_group import AcceleratedGroup
from klab.harness.engines.trl.experience import GeneratedRows, joined_experience
from klab.harness.engines.trl.live_policy import LivePolicy
from klab.harness.engines.trl.update import ExtraPass, Update, has_detached_kl, needs_current_policy
from klab.harness.objective import LossCoefficients, detached_kl
from klab.harness.policy.hf.policy import train_padding_token
from klab.harness.policy.pretrained import read_generation_config
from klab.harness.policy.prompt import PromptEncoder
from klab.harness.policy.special_tokens import answer_tokens, eos_token_ids, trailing_special_tokens
from klab.harness.training.data.experience import Experience
from klab.harness.training.data.prompts import chat_template
from klab.harness.training.data.scoring import reward_terms, score_texts
from klab.harness.training.distributed.messages import message_type
from klab.harness.training.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from klab.harness.training.forward import ForwardPass
from klab.harness.training.metrics import Row
from klab.harness.training.optim.kl_controller import adapt_coefficients, initial_coefficients
from klab.harness.training.optim.schedule import learning_rate
from klab.harness.training.packed_cell import PackedCell
from klab.harness.training.runtime.timer import PhaseTimer
from klab.tasks.task import Example, Score

message_type(Score)

EXAMPLE = "example"
"""Column of the dataset: which example of the training split a row is."""

TEXT, TRUNCATED = "klab_text", "klab_truncated"
"""What a rollout function reports of each completion beside its tokens, where they do not say it."""


def task_reward(**_: Any) -> list[float]:
    """Stands for the task's score, which `KlabTrainer` computes itself: TRL insists on a reward function."""
    raise AssertionError("KlabTrainer scores completions itself")


class KlabTrainer(GRPOTrainer):  # type: ignore[misc]
    """A cell's trainer.

    Args:
        member: the cell, its task, and the folder that its policy starts from.
        arguments: of `GRPOTrainer`, without the model and the rewards.

    Attributes:
        group: the processes that train together.
        answered: the examples whose completions are being generated, one per trajectory.
        is_greedy: whether the most likely completions are being generated.
        experience: the rollout in use, of all processes.
        coefficients: of the next update.
        timer: where the time goes.
        pending_row: of the update whose step is being taken.
    """

    generation_config: Any
    generation_kwargs: dict[str, Any]
    lr_scheduler: Any

    def __init__(self, member: PackedCell, **arguments: Any) -> None:
        self.member = member
        self.group: ProcessGroup = SINGLE_PROCESS
        self.coefficients: LossCoefficients = initial_coefficients(member.cell)
        self.timer = PhaseTimer()
        self.answered: list[Example] = []
        self.is_greedy = False
        self.experience: Experience | None = None
        self.pending_row: Row | None = None
        self._examples = member.split("train")
        self._generation_config = read_generation_config(member.start)
        self._exact = member.cell.policy.dtype == "float64"
        self._update: Update | None = None
        self._gradient_norm = 0.0
        self._backward_since: float | None = None
        super().__init__(model=str(member.start), reward_funcs=[task_reward], **arguments)
        self.group = AcceleratedGroup(self.accelerator)
        self._set_end_tokens()
        train_padding_token(self.model)
        _without_dropout(self.model)
        self._trailing = trailing_special_tokens(self._tokenizer)
        for model in (self.model, self.ref_model):
            if model is not None and not _is_rotary(model):
                model.register_forward_pre_hook(_with_positions, with_kwargs=True)

    def _set_end_tokens(self) -> None:
        """Let the tokens that end a turn for klab end a completion."""
        vocabulary = int(self.model.config.get_text_config().vocab_size)
        self._encode = PromptEncoder(self._tokenizer, vocabulary)
        self.eos_token_ids = sorted(eos_token_ids(self._tokenizer, self._generation_config, vocabulary))
        if not self.use_vllm:
            self.generation_config.eos_token_id = self.eos_token_ids
            self.generation_kwargs["eos_token_id"] = self.eos_token_ids

    # -- what the cell says about training ----------------------------------------------------------------------------

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The cell's schedule: the rate of update n is `learning_rate(training, n)`, warm-up included."""
        if self.lr_scheduler is None:
            training = self.member.cell.training
            self.lr_scheduler = LambdaLR(
                optimizer or self.optimizer, lambda done: learning_rate(training, done + 1, peak=1.0)
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """None is written into checkpoints."""

    @property
    def is_sharded(self) -> bool:
        """Whether each process holds a part of the weights only, so that all must go through the model together."""
        return bool(self.is_fsdp_enabled or self._dist.is_zero3)

    @property
    def update_number(self) -> int:
        """The update that is being made, from 1."""
        return int(self.state.global_step) + 1

    # -- rollouts -----------------------------------------------------------------------------------------------------

    def _tokenize_prompts(self, prompts: list[str]) -> tuple[list[list[int]], None, dict[str, Any]]:
        return [self.prompt_ids(prompt) for prompt in prompts], None, {}

    def prompt_ids(self, prompt: str) -> list[int]:
        """Token ids of a prompt, as klab's own engine has them."""
        return list(self._encode(prompt, chat_template(self.member.cell), self.member.now))

    def _generate(self, prompts: list[Any]) -> Any:
        with self.timer("rollout"):
            return super()._generate(prompts)

    def _calculate_rewards(
        self, inputs: Sequence[dict[str, Any]], prompts: Any, completions: Any, completion_ids_list: Sequence[list[int]]
    ) -> Tensor:
        """The task's rewards of all processes, [N, 1]."""
        with self.timer("reward"):
            examples = [self._examples[each[EXAMPLE]] for each in inputs]
            texts = [
                each[TEXT] if TEXT in each else self.text_of(ids)
                for each, ids in zip(inputs, completion_ids_list, strict=True)
            ]
            scored = self.group.all_gather_object("scores", lambda: score_texts(self.member, examples, texts))
        self._scores = scored[self.group.rank]
        self._truncated = [
            bool(each[TRUNCATED]) if TRUNCATED in each else ids[-1] not in self.eos_token_ids
            for each, ids in zip(inputs, completion_ids_list, strict=True)
        ]
        rewards = [float(score.reward) for part in scored for score in part]
        return torch.tensor(rewards, device=self.accelerator.device)[:, None]

    def text_of(self, tokens: Sequence[int]) -> str:
        """The text of a completion, as klab's own engine gives it to the task."""
        shown = answer_tokens(tokens, self.eos_token_ids, self._trailing)
        return str(self._tokenizer.decode(list(shown), skip_special_tokens=False))

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        started, before = time.perf_counter(), self.timer.total
        self.answered = [self._examples[each[EXAMPLE]] for each in inputs]
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        greedy = self._greedy_rewards(inputs) if self.member.needs_greedy else None
        own = self._generated_rows(output, greedy)
        parts = self.group.all_gather_object("a rollout", lambda: own, self.accelerator.device)
        training = self.member.cell.training
        number = self.state.global_step // training.optimizer_steps_per_rollout
        self.experience = joined_experience(parts, training.group_size, number)
        first = self.group.rank * len(own.prompts)
        output["klab_rows"] = torch.arange(first, first + len(own.prompts), device=self.accelerator.device)
        self.timer.add("reference", time.perf_counter() - started - (self.timer.total - before))
        return output

    def _generated_rows(self, output: dict[str, Any], greedy: Tensor | None) -> GeneratedRows:
        tokens, present = output["completion_ids"], output["completion_mask"].bool()
        mask = present & output["tool_mask"].bool() if "tool_mask" in output else present
        old, reference = output.get("old_per_token_logps"), output["ref_per_token_logps"]
        sampled = output.get("sampling_per_token_logps") if self.use_vllm else None
        if old is None:
            old = self._scores_without_gradient(output) if has_detached_kl(self.member) else torch.zeros_like(reference)
        if sampled is not None:
            sampled = torch.where(
                sampled.isnan(), old, sampled
            )  # what vllm could not score counts as drawn by the trainer
        dtype = torch.float64 if self._exact else torch.float32
        reference, old = reference.to(dtype), old.to(dtype)
        device = tokens.device
        timeouts = [float(score.timeouts) for score in self._scores]
        prompts = zip(output["prompt_ids"].tolist(), output["prompt_mask"].tolist(), strict=True)
        return GeneratedRows(
            prompts=[[token for token, inside in zip(*each, strict=True) if inside] for each in prompts],
            tokens=torch.where(present, tokens, 0),
            mask=mask,
            present=present,
            truncated=torch.tensor(self._truncated, device=device),
            sampled=torch.where(mask, old if sampled is None else sampled.to(dtype), 0.0),
            old=None if sampled is None else torch.where(mask, old, 0.0),
            reference=torch.where(mask, reference, 0.0),
            rewards=torch.tensor([float(score.reward) for score in self._scores], dtype=dtype, device=device),
            correct=torch.tensor([float(score.correct) for score in self._scores], dtype=dtype, device=device),
            timeouts=torch.tensor(timeouts, dtype=dtype, device=device)
            if getattr(self.member.task, "has_reward_timeouts", False)
            else None,
            greedy=None if greedy is None else greedy.to(dtype),
            reward_terms=reward_terms(self.member, self._scores, reference),
        )

    def _scores_without_gradient(self, output: dict[str, Any]) -> Tensor:
        """Log-probabilities [n, T] of what was generated, under the policy as it is."""
        ids, attention, keep = _sequences(output)
        rows = self.args.per_device_train_batch_size
        with torch.no_grad(), disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
            logp: Tensor = self._get_per_token_logps_and_entropies(self.model, ids, attention, keep, batch_size=rows)[0]
        return logp

    def _greedy_rewards(self, inputs: Sequence[dict[str, Any]]) -> Tensor:
        """The reward [n] of the policy's greedy completion of each trajectory's prompt; one completion per prompt."""
        indices = list(dict.fromkeys(each[EXAMPLE] for each in inputs))
        examples: list[Example] = [self._examples[index] for index in indices]
        self.answered = examples
        with self.timer("rollout"), self._greedy_generation():
            if self.rollout_func is None:
                prompts = [self.prompt_ids(example.prompt) for example in examples]
                texts = [self.text_of(ids) for ids in self._generate_single_turn(prompts, None, {}, 1)[0]]
            else:
                texts = self.rollout_func([example.prompt for example in examples], self)[TEXT]
        with self.timer("reward"):
            scores = self.group.all_gather_object("greedy", lambda: score_texts(self.member, examples, texts))
        found = {index: score for index, score in zip(indices, scores[self.group.rank], strict=True)}
        return torch.tensor([float(found[each[EXAMPLE]].reward) for each in inputs], device=self.accelerator.device)

    @contextmanager
    def _greedy_generation(self) -> Iterator[None]:
        """Generation takes the most likely tokens inside."""
        config, settings = self.generation_config, self.generation_kwargs
        greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, "min_p": None}
        self.generation_config, self.generation_kwargs = deepcopy(config), {**settings, **greedy}
        self.generation_config.update(**greedy)
        self.is_greedy = True
        try:
            yield
        finally:
            self.is_greedy = False
            self.generation_config, self.generation_kwargs = config, settings

    # -- updates ------------------------------------------------------------------------------------------------------

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
        with torch.no_grad():
            entropy = -(logp.exp() * logp).nan_to_num(0.0).sum(-1)
        return ForwardPass(logp.gather(-1, ids[:, -keep:, None]).squeeze(-1), entropy, logits)

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

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        if self._step % self.current_gradient_accumulation_steps == 0:
            self._update = self._begin_update()
        assert self._update is not None
        with self.timer("forward"):
            loss = self._update.loss(inputs["klab_rows"], self.forward_pass(model, inputs))
        self._backward_since = time.perf_counter()
        # the processes' gradients are averaged, and the parts of klab's loss add up
        return loss * self.group.size

    def _begin_update(self) -> Update:
        assert self.experience is not None
        rows = None
        if self.member.cell.training.minibatches > 1:
            count = self.current_gradient_accumulation_steps
            at = self._step % self.args.steps_per_generation // count * count
            own = torch.cat([piece["klab_rows"] for piece in self._buffered_inputs[at : at + count]])
            parts = self.group.all_gather_object("rows", lambda: own, self.accelerator.device)
            rows = torch.cat(parts).sort().values
        update = Update(self.member, self.experience, self.coefficients, self.update_number, rows)
        if needs_current_policy(self.member):
            update.extra = self._extra_pass(update)
        return update

    @torch.no_grad()
    def _extra_pass(self, update: Update) -> ExtraPass:
        """One more pass over the whole rollout, with the policy as it is before the update."""
        with self.timer("forward"), disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
            computed = [(piece["klab_rows"], self.forward_pass(self.model, piece)) for piece in self._buffered_inputs]
        values: list[tuple[Tensor, ...]] = []
        for rows, scores in computed:
            batch = update.batch(rows, scores)
            phi = detached_kl(self.member.cell.objective, batch) if self.member.needs_logits else None
            values.append((rows, batch.logp, *(() if phi is None else (phi,))))
        parts = self.group.all_gather_object("an extra pass", lambda: values, self.accelerator.device)
        columns = [torch.cat(column) for column in zip(*(each for part in parts for each in part), strict=True)]
        order = columns[0].argsort()
        return ExtraPass(*(column[order] for column in columns[1:]))

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        self.note_backward()
        found = super()._get_grad_norm(model, grad_norm=grad_norm)
        self._gradient_norm = float(found)
        return found

    def note_backward(self) -> None:
        """The backward pass that followed the last loss is over."""
        if self._backward_since is not None:
            self.timer.add("backward", time.perf_counter() - self._backward_since)
        self._backward_since = None

    def finish_update(self) -> bool:
        """Compute the update's row from what all processes measured; whether its step is to be taken."""
        assert self._update is not None
        self.pending_row, take = self._update.finish(self.group, self._gradient_norm, self.accelerator.device)
        self._update = None
        return take

    def close_update(self) -> Row:
        """The row of the update that was made, with the seconds spent; coefficients are those of the next one."""
        assert self.pending_row is not None
        row, self.pending_row = self.pending_row, None
        if row.get("loss_tokens") != 0:
            self.coefficients = adapt_coefficients(self.member.cell, self.coefficients, row)
        self._metrics["train"].clear()  # TRL's own, which nobody reads
        return {**row, **self.timer.take([1.0])[0]}

    # -- views --------------------------------------------------------------------------------------------------------

    def policies(self) -> tuple[LivePolicy, LivePolicy]:
        """The policy in training and the reference, to evaluate."""
        policy = self.accelerator.unwrap_model(self.model_wrapped) if self.is_sharded else self.model
        reference = policy if self.ref_model is None else self.accelerator.unwrap_model(self.ref_model)
        return (
            LivePolicy(policy, self._tokenizer, self._generation_config),
            LivePolicy(reference, self._tokenizer, self._generation_config, adapters=self.ref_model is not None),
        )

    def sampling_view(self) -> LivePolicy:
        """The policy in training, for whoever builds its trajectories turn by turn."""
        view = LivePolicy(self.model, self._tokenizer, self._generation_config)
        self.model.train()
        return view

    def takes_steps_by_itself(self) -> bool:
        """Whether the optimizer steps inside of the backward pass (DeepSpeed), where no step can be left out."""
        return bool(self.accelerator.distributed_type == DistributedType.DEEPSPEED)


RolloutFunction = Callable[[list[str], KlabTrainer], dict[str, Any]]


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
