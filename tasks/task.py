"""A task: where prompts and rewards come from."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

from klab.grid import user_code
from klab.grid.errors import UserError

SplitName = Literal["train", "held_out"]
TURN_END = "\x04"
"""Joins the turns of a reference solution; never a character of a turn."""

TASKS = {
    "addition": "klab.tasks.addition:Addition",
    "countdown": "klab.tasks.countdown:Countdown",
    "calculator": "klab.tasks.calculator:Calculator",
    "word_problems": "klab.tasks.word_problems:WordProblems",
    "bandit": "klab.tasks.bandit:Bandit",
    "tabular": "klab.tasks.tabular:Tabular",
    "strings": "klab.tasks.strings:Strings",
    "proxy": "klab.tasks.proxy:Proxy",
    "gsm8k": "klab.tasks.gsm8k:Gsm8k",
    "math": "klab.tasks.mathematics:Mathematics",
    "file": "klab.tasks.file:File",
    "trl_environment": "klab.tasks.trl_environment:TrlEnvironment",
    "reasoning_gym": "klab.tasks.reasoning:Reasoning",
    "verifiers": "klab.tasks.verifiers_environment:VerifiersEnvironment",
}
"""Where the tasks are that a grid may name."""


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt with its ground truth.

    Attributes:
        prompt: what the policy reads.
        answer: the ground truth that `Task.score` compares with.
        solution: a reference completion (without the end token), for supervised warm-up; empty where there is none.
            Where the environment answers, the policy's turns, joined by `TURN_END`.
        columns: everything that the dataset has of it, for reward functions; no part of what it is equal to.
    """

    prompt: str
    answer: str
    solution: str = ""
    columns: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Score:
    """The reward of a completion.

    Attributes:
        reward: what the policy learns from.
        correct: whether the completion is right.
        parts: named parts of the reward for the record, those that this completion has.
        timeouts: how many limits of time decided the reward: what ran into one counted as wrong.
    """

    reward: float
    correct: bool
    parts: Mapping[str, float] = field(default_factory=dict)
    timeouts: int = 0


@runtime_checkable
class Task(Protocol):
    """Prompts, rewards and, optionally, an environment that answers the policy.

    Attributes:
        name: the task's name in messages and reports.
        alphabet: the characters that a character tokenizer must cover; None where a pretrained tokenizer is needed.
        max_new_tokens: default budget of own tokens per trajectory, including the end token.

    A task whose scores may have `timeouts` sets `has_reward_timeouts = True`, and they are counted in the records. One
    whose reward is a weighted sum of parts of its scores says so with `reward_weights`, the weight of each such part by
    its name: advantages like `term_norm` look at the parts.

    A task that has an alphabet only where its texts are small says why it has none with `no_alphabet`, for the message.

    A task with an alphabet is taken to make prompts without end, unless it sets `lists_prompts = True`: they are then
    measured, all of them, where a pretrained policy reads them.

    A task with an environment scores what the policy wrote, without the environment's answers, unless it sets
    `scores_transcripts = True`: it then scores what both sides wrote, as `respond` has it.

    A task may also set `interactive = False`: `respond` is then never called, which saves decoding text in between. And
    it may have `score_all(examples, completions)`, which yields the scores of many completions in order and may compute
    several at once, as a reward model does; they must be what `score` gives, up to rounding.
    """

    name: str
    alphabet: str | None
    max_new_tokens: int

    def split(self, name: SplitName) -> Sequence[Example]:
        """Examples in an order that never changes. No held-out prompt occurs in `train`."""
        ...

    def score(self, example: Example, completion: str) -> Score:
        """The score of a completion given without its end token. Never raises on what a policy may write."""
        ...

    def respond(self, example: Example, transcript: str) -> str | None:
        """The environment's turn after the policy has ended one; None ends the episode.

        Args:
            example: the prompt's example.
            transcript: everything after the prompt so far, both sides' turns, without end tokens.
        """
        ...


def lists_prompts(task: Task) -> bool:
    """Whether all prompts of a task may be gone through and measured."""
    return bool(getattr(task, "lists_prompts", task.alphabet is None))


def scores_transcripts(task: Task) -> bool:
    """Whether a task scores what both sides wrote, rather than what the policy wrote."""
    return bool(getattr(task, "scores_transcripts", False))


def alphabet_of(task: Task) -> str:
    """The alphabet of a tiny policy.

    Raises:
        UserError: the task has none, or no reference solutions.
    """
    if task.alphabet is None:
        why = getattr(task, "no_alphabet", None)
        raise UserError(
            f"a tiny policy needs an alphabet, which task {task.name!r} does not have{f': {why}' if why else ''}",
            key="policy.name",
            value="tiny",
            hint="Take a pretrained model: policy: {name: hf, model: …}.",
        )
    require_solutions(task)
    return task.alphabet


def require_solutions(task: Task) -> None:
    """Raises UserError for a task without reference solutions, on which tiny and small policies are trained."""
    if not task.split("train")[0].solution:
        raise UserError(
            "a tiny or small policy needs reference solutions to warm up on", key="task.name", value=task.name
        )


def load_task(section: Any) -> Task:
    """The task that a grid's task section describes.

    Args:
        section: has `name` and the task's parameters; a pydantic model (`model_dump`) or any object with attributes. A
            name `package.module:Class` or `./file.py:Class` is imported and called with the parameters.

    Raises:
        UserError: unknown task, or one that cannot be imported or constructed with these parameters.
    """
    parameters = _parameters(section)
    name = str(parameters.pop("name"))
    parameters.pop("label", None)  # for reports
    if user_code.names_user_code(name):
        return _users_task(name, parameters)
    if name not in TASKS:
        raise UserError("unknown task", key="task.name", value=name, allowed=TASKS)
    module, attribute = TASKS[name].split(":")
    return _constructed(getattr(importlib.import_module(module), attribute), name, parameters)


def _parameters(section: Any) -> dict[str, Any]:
    if hasattr(section, "model_dump"):
        return dict(section.model_dump())
    if isinstance(section, Mapping):
        return dict(section)
    return dict(vars(section))


def _users_task(name: str, parameters: dict[str, Any]) -> Task:
    task = _constructed(user_code.load(name, "task.name"), name, parameters)
    missing = [n for n in ("name", "alphabet", "max_new_tokens", "split", "score", "respond") if not hasattr(task, n)]
    if missing:
        raise UserError(f"is not a task: it lacks {', '.join(missing)}", key="task.name", value=name)
    return task


def _constructed(factory: Any, name: str, parameters: dict[str, Any]) -> Task:
    try:
        task: Task = factory(**parameters)
    except TypeError as error:
        raise UserError(f"cannot be made from {parameters}: {error}", key="task.name", value=name) from error
    return task
