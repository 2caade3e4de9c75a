"""TRL's rollouts with klab's rewards, gathered from all processes as klab's `Experience`.

Groups are worked on before TRL shuffles a process's trajectories, when each process still holds the rows that TRL
gathers in order.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from klab.harness.engines.trl.experience import GeneratedRows, joined_experience
from klab.harness.engines.trl.scoring_trainer import ScoringTrainer
from klab.harness.engines.trl.update import has_detached_kl
from klab.harness.training.data.experience import Experience
from klab.harness.training.data.scoring import reward_terms, score_texts
from klab.harness.training.distributed.messages import message_type
from klab.harness.training.packed_cell import PackedCell
from klab.harness.training.runtime.timer import PhaseTimer
from klab.tasks.task import Example, Score

message_type(Score)

EXAMPLE = "example"
"""Column of the dataset: which example of the training split a row is."""

TEXT, TRUNCATED = "klab_text", "klab_truncated"
"""What a rollout function reports of each completion beside its tokens, where they do not say it."""


def task_reward(**_: Any) -> list[float]:
    """Stands for the task's score, which `RolloutTrainer` computes itself: TRL insists on a reward function."""
    raise AssertionError("RolloutTrainer scores completions itself")


class RolloutTrainer(ScoringTrainer):
    """A cell's rollouts on TRL.

    Args:
        member: see `ScoringTrainer`.
        arguments: of `GRPOTrainer`, without the model and the rewards.

    Attributes:
        answered: the examples whose completions are being generated, one per trajectory.
        is_greedy: whether the most likely completions are being generated.
        experience: the rollout in use, of all processes.
        timer: where the time goes.
    """

    def __init__(self, member: PackedCell, **arguments: Any) -> None:
        self.timer = PhaseTimer()
        self.answered: list[Example] = []
        self.is_greedy = False
        self.experience: Experience | None = None
        self._examples = member.split("train")
        super().__init__(member, reward_funcs=[task_reward], **arguments)

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
            old = self.scores_without_gradient(output) if has_detached_kl(self.member) else torch.zeros_like(reference)
        if sampled is not None:
            sampled = torch.where(
                sampled.isnan(), old, sampled
            )  # what vllm could not score counts as drawn by the trainer
        training = self.member.cell.training
        if training.reference is not None and training.reference.follows == "rollout":
            to_sampler = sampled is not None and training.sampler is not None and training.sampler.correction == "ratio"
            reference = sampled if to_sampler else old
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


RolloutFunction = Callable[[list[str], Any], dict[str, Any]]
"""Draws completions instead of TRL: of prompts, for a `RolloutTrainer`."""
