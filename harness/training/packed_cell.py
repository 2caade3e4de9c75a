"""A cell in a pack: its settings, task and initial policy, and the shape by which cells are stacked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from klab.grid.cell import Cell
from klab.grid.kl_settings import keeps_copy
from klab.grid.schema.training import STACKABLE
from klab.harness.objective import axis_functions
from klab.harness.policy.load import is_sharded
from klab.harness.policy.pretrained import GENERATION_CONFIG
from klab.harness.training.data.prompts import PromptLengths, chat_template, prompts_that_fit
from klab.harness.training.optim.schedule import RolloutSchedule
from klab.tasks.task import Example, SplitName, Task


class CellFailure(Exception):
    """One cell of a pack failed; `__cause__` says why. The others are not affected.

    `position` is the cell's place in the pack that raised.
    """

    def __init__(self, position: int, message: str) -> None:
        super().__init__(message)
        self.position = position


@dataclass(frozen=True, slots=True)
class PackedCell:
    """A cell, its task, and the folder of its initial policy, which is also its reference policy.

    Attributes:
        now: the time, in seconds since 1970, that chat templates which print the date are given: the run's creation.
        prompt_lengths: shared by the cells of a call, so that the prompts of a task are measured once.
    """

    cell: Cell
    task: Task
    start: Path
    now: float | None = None
    prompt_lengths: PromptLengths = field(default_factory=PromptLengths, compare=False, repr=False)

    @property
    def id(self) -> str:
        return self.cell.id

    @property
    def max_new_tokens(self) -> int:
        return self.cell.training.max_new_tokens or self.task.max_new_tokens

    @property
    def schedule(self) -> RolloutSchedule:
        return RolloutSchedule.of(self.cell.training)

    @property
    def needs_logits(self) -> bool:
        """Whether the objective reads the logits of the whole vocabulary, not just of the sampled tokens."""
        return "logits" in axis_functions(self.cell.objective).needs

    @property
    def needs_reference_logits(self) -> bool:
        """Whether the objective reads those of the reference policy, too."""
        return "logits_reference" in axis_functions(self.cell.objective).needs

    @property
    def keeps_reference(self) -> bool:
        """Whether the cell holds a reference policy that moves, beside the one that it started from."""
        return keeps_copy(self.cell.training, self.needs_reference_logits)

    @property
    def needs_entropy_gradient(self) -> bool:
        """Whether the loss may have an entropy bonus."""
        return self.cell.objective.entropy_bonus != 0.0 or self.cell.training.entropy_control is not None

    @property
    def needs_greedy(self) -> bool:
        """Whether the objective reads the reward of a greedy completion of each prompt."""
        return "greedy_rewards" in axis_functions(self.cell.objective).needs

    @property
    def reward_weights(self) -> Mapping[str, float] | None:
        """The weight of each term of the reward, where the objective reads the terms and the task has any."""
        if "reward_terms" not in axis_functions(self.cell.objective).needs:
            return None
        return getattr(self.task, "reward_weights", None)

    def split(self, name: SplitName) -> Sequence[Example]:
        """The examples of the task whose prompts are not too long; see `data.prompts.prompts_that_fit`."""
        return prompts_that_fit(
            self.task, name, self.cell, self.start, self.max_new_tokens, self.now, self.prompt_lengths
        )

    @property
    def longest_prompt(self) -> int:
        """Tokens of the longest prompt that is drawn from; where prompts are limited, the limit."""
        limit = self.cell.training.max_prompt_tokens
        if limit is not None:
            return limit
        names: tuple[SplitName, ...] = ("train", "held_out")
        measured = [
            self.prompt_lengths.measure(self.task.split(name), name, self.cell, self.start, self.now) for name in names
        ]
        return max(map(max, measured))

    def shape(self) -> str:
        """Cells with equal shapes can be stacked: same architecture, vocabulary, tensor shapes and phases.

        Objectives, learning rates, clipping and seeds may differ. Adapters are stacked over one starting policy only,
        and a model whose weights are shared out among processes is alone.
        """
        training = self.cell.training.model_dump(mode="json", exclude=set(STACKABLE))
        training["max_new_tokens"] = self.max_new_tokens
        examined = min(len(self.split("held_out")), self.cell.training.evaluation_prompts)
        policy = self.cell.policy
        phases = [
            self.needs_logits,
            self.needs_greedy,
            self.needs_entropy_gradient,
            examined,
            policy.dtype,
            policy.gradient_checkpointing,
        ]
        phases.append(self.keeps_reference)
        engine = [getattr(policy, "engine", "stacked"), chat_template(self.cell)]
        adapters = None if policy.lora is None else [policy.lora.model_dump(mode="json"), str(self.start)]
        alone = self.id if is_sharded(policy) else None
        text = json.dumps([training, phases, engine, adapters, alone, _architecture(self.start)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def _architecture(start: Path) -> str:
    digest = hashlib.sha256()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", GENERATION_CONFIG):
        file = start / name
        digest.update(file.read_bytes() if file.exists() else b"")
    return digest.hexdigest()
