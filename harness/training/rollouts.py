"""A rollout: choose prompts, sample a group of completions for each, score them, and look up the reference policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from harness.policy.logprobs import token_scores
from harness.policy.policy import Policy
from harness.policy.rollout import Environment, Rollout, sample
from harness.training.deadline import deadline
from harness.training.member import CellFailure, Member
from harness.training.microbatch import micro_batches
from harness.training.randomness import choose, generator
from harness.training.stopwatch import Stopwatch
from tasks.task import Example, Score


@dataclass(slots=True)
class Experience:
    """ONE cell's rollout with all that its updates need; N = prompts × group_size trajectories, T the longest.

    Attributes:
        number: which rollout of the cell, from 0.
        rollout: tokens, masks and the behaviour policy's log-probabilities as the sampler kept them.
        rewards, correct: float [N].
        reference: float [N, T], log-probabilities of the sampled tokens under the reference policy.
        greedy: float [N], reward of the greedy completion of the same prompt (advantage `greedy_baseline`), else
        None.
    """

    number: int
    rollout: Rollout
    rewards: Tensor
    correct: Tensor
    reference: Tensor
    greedy: Tensor | None = None


def collect(
    members: Sequence[Member],
    behaviour: Policy,
    reference: Policy,
    number: int,
    watch: Stopwatch,
    micro_batch: int | None = None,
) -> list[Experience]:
    """Rollout `number` of every cell of a pack, drawn from the policies `behaviour`.

    The reference policy looks at `micro_batch` rows at a time, None is all of them.

    Raises:
        CellFailure: where a reward function raises or does not return a `Score`.
    """
    training = members[0].cell.training
    size = training.group_size
    examples = [training_examples(member, number) for member in members]
    with watch("rollout"):
        rollouts = draw(behaviour, members, examples, size, ("rollout", number), training.temperature, training.top_p)
        greedy = draw(behaviour, members, examples, 1, None) if members[0].needs_greedy else None
    with watch("reward"):
        scores = [score(members, c, examples[c], rollout) for c, rollout in enumerate(rollouts)]
        baselines = None if greedy is None else [score(members, c, examples[c], one) for c, one in enumerate(greedy)]
    with watch("reference"):
        looked_up = log_probabilities(reference, rollouts, training.temperature, micro_batch)
    found = []
    for c, rollout in enumerate(rollouts):
        rewards = _column(rollout, [s.reward for s in scores[c]])
        correct = _column(rollout, [float(s.correct) for s in scores[c]])
        baseline = None
        if baselines is not None:
            baseline = _column(rollout, [s.reward for s in baselines[c]]).repeat_interleave(size)
        found.append(Experience(number, rollout, rewards, correct, looked_up[c], baseline))
    return found


@torch.no_grad()
def log_probabilities(
    policy: Policy, rollouts: Sequence[Rollout], temperature: float, limit: int | None
) -> list[Tensor]:
    """Per cell, log-probabilities [N, T] of its trajectories, at most `limit` rows at a time."""
    turns = zip(*(micro_batches(rollout, limit) for rollout in rollouts), strict=True)
    passes = [token_scores(policy, [piece for piece, _ in turn], temperature=temperature) for turn in turns]
    return [torch.cat([scores[c].logp for scores in passes]) for c in range(len(rollouts))]


def training_examples(member: Member, number: int) -> list[Example]:
    """The prompts of a rollout: a function of the seed and the rollout's number alone."""
    split = member.task.split("train")
    chosen = choose(len(split), member.cell.training.prompts, "prompts", member.cell.seed, number)
    return [split[index] for index in chosen]


def draw(
    policy: Policy,
    members: Sequence[Member],
    examples: Sequence[Sequence[Example]],
    group_size: int,
    purpose: tuple[int | str, ...] | None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seeded: bool = True,
) -> list[Rollout]:
    """Completions of each cell's examples.

    `purpose` names the random draw, None is greedy decoding. An unseeded draw is the same for all seeds.
    """
    draws = [(*(purpose or ("greedy",)), member.cell.seed if seeded else "every seed") for member in members]
    return sample(
        policy,
        [encode(policy, chosen) for chosen in examples],
        group_size=group_size,
        max_new_tokens=members[0].max_new_tokens,
        generators=[generator(policy.device, *parts) for parts in draws],
        temperature=temperature,
        top_p=top_p,
        greedy=purpose is None,
        environment=_environment(members, examples, group_size),
    )


def _environment(
    members: Sequence[Member], examples: Sequence[Sequence[Example]], group_size: int
) -> Environment | None:
    """The tasks' answers to what the policies write; None where no task ever answers, which spares much asking."""
    if not any(getattr(member.task, "interactive", True) for member in members):
        return None

    def answer(cell: int, trajectory: int, transcript: str) -> str | None:
        example = examples[cell][trajectory // group_size]
        try:
            return members[cell].task.respond(example, transcript)
        except Exception as error:
            name = members[cell].task.name
            raise CellFailure(
                cell,
                f"the environment of task {name!r} raised {type(error).__name__}: {error} "
                f"(prompt {example.prompt!r}, transcript {transcript!r})",
            ) from error

    return answer


def encode(policy: Policy, examples: Sequence[Example]) -> list[list[int]]:
    """Token ids of the examples' prompts."""
    return [list(_ids(policy.tokenizer, example.prompt)) for example in examples]


@lru_cache(maxsize=16384)
def _ids(tokenizer: PreTrainedTokenizerFast, prompt: str) -> tuple[int, ...]:
    return tuple(tokenizer(prompt, add_special_tokens=False)["input_ids"])


def score(members: Sequence[Member], position: int, examples: Sequence[Example], rollout: Rollout) -> list[Score]:
    """The task's score of every trajectory. Rewards may be NaN or infinite: the update they spoil is recorded so.

    Raises:
        CellFailure: where the task raises, takes longer than `training.reward_seconds`, or returns something else than
            a `Score`; the message shows the example.
    """
    task, limit = members[position].task, members[position].cell.training.reward_seconds
    found: list[Score] = []
    with deadline(limit) as restart:
        for row, completion in enumerate(rollout.texts):
            example = examples[row // rollout.group_size]
            try:
                restart()
                value = task.score(example, completion)
                if not isinstance(value, Score):
                    raise TypeError(f"a task's score is a tasks.Score, not {type(value).__name__}")
                float(value.reward)
            except Exception as error:
                raise CellFailure(
                    position,
                    f"the reward of task {task.name!r} raised {type(error).__name__}: {error} "
                    f"(prompt {example.prompt!r}, answer {example.answer!r}, completion {completion!r})",
                ) from error
            found.append(value)
    return found


def _column(rollout: Rollout, values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=rollout.logp.dtype, device=rollout.logp.device)
