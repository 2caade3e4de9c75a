"""What a task says of trajectories: scores, their terms, and how they become tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from klab.harness.policy.rollout import Rollout
from klab.harness.training.packed_cell import CellFailure, PackedCell
from klab.harness.training.runtime.timeout import time_limit
from klab.tasks.task import Example, Score, Task


def score_completions(
    members: Sequence[PackedCell], position: int, examples: Sequence[Example], rollout: Rollout
) -> list[Score]:
    """The task's score of every trajectory; see `score_texts`."""
    answered = [examples[row // rollout.group_size] for row in range(len(rollout.texts))]
    return score_texts(members[position], answered, rollout.texts, position)


def score_texts(
    member: PackedCell, answered: Sequence[Example], texts: Sequence[str], position: int = 0
) -> list[Score]:
    """The task's score of each text as the completion of its example. Rewards may be NaN or infinite: the update they
    spoil is recorded so.

    Raises:
        CellFailure: where the task raises, takes longer than `training.reward_seconds` for the next score, or returns
            something else than a `Score`; the message shows the example.
    """
    task, limit = member.task, member.cell.training.reward_seconds
    found: list[Score] = []
    with time_limit(limit) as restart:
        values = _scores(task, answered, texts)
        for example, completion in zip(answered, texts, strict=True):
            try:
                restart()
                value = next(values)
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


def _scores(task: Task, examples: Sequence[Example], completions: Sequence[str]) -> Iterator[Score]:
    score_all = getattr(task, "score_all", None)
    if score_all is not None:
        yield from score_all(examples, completions)
    else:
        yield from map(task.score, examples, completions)


def reward_column(rollout: Rollout, values: list[float]) -> Tensor:
    """One number for each trajectory of a rollout, [N], in the type and place of its log-probabilities."""
    return torch.tensor(values, dtype=rollout.logp.dtype).to(rollout.logp.device, non_blocking=True)


def reward_terms(member: PackedCell, scores: Sequence[Score], like: Tensor) -> Tensor | None:
    """float [N, K], the terms of the reward that a cell's objective reads, in the type and place of `like`; None where
    it reads none."""
    if not member.reward_weights:
        return None
    rows = [[score.parts.get(name, math.nan) for name in member.reward_weights] for score in scores]
    terms = torch.tensor(rows, dtype=like.dtype).view(len(scores), len(member.reward_weights))
    return terms.to(like.device, non_blocking=True)


def has_timeouts(member: PackedCell) -> bool:
    """Whether a cell's rewards may run into limits of time, which are then counted."""
    return bool(getattr(member.task, "has_reward_timeouts", False))
