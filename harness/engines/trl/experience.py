"""What TRL generated, in all processes, as klab's `Experience`: tokens, masks, log-probabilities and rewards by row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from klab.harness.policy.rollout import Rollout
from klab.harness.training.data.experience import Experience
from klab.harness.training.distributed.messages import message_type


@message_type
@dataclass(frozen=True, slots=True)
class GeneratedRows:
    """The trajectories of one process, n of them, in the order in which TRL generated them.

    Attributes:
        prompts: token ids of each trajectory's prompt.
        tokens, mask, present, truncated: see `Rollout`.
        sampled: log-probabilities [n, T] under the behaviour policy, as whoever sampled computed them.
        old: those of another sampler as the trainer computes them; None where the trainer itself samples.
        reference: under the reference policy.
        rewards, correct, timeouts, greedy, reward_terms: see `Experience`.
    """

    prompts: list[list[int]]
    tokens: Tensor
    mask: Tensor
    present: Tensor
    truncated: Tensor
    sampled: Tensor
    old: Tensor | None
    reference: Tensor
    rewards: Tensor
    correct: Tensor
    timeouts: Tensor | None
    greedy: Tensor | None
    reward_terms: Tensor | None = None


def joined_experience(parts: Sequence[GeneratedRows], group_size: int, number: int) -> Experience:
    """The rollout `number` of all processes: their rows one after the other, which makes whole groups."""
    longest = max(part.tokens.shape[1] for part in parts)

    def padded(name: str) -> Tensor:
        return torch.cat([pad(getattr(part, name), (0, longest - part.tokens.shape[1])) for part in parts])

    def listed(name: str) -> Tensor:
        return torch.cat([getattr(part, name) for part in parts])

    first = parts[0]
    rollout = Rollout(
        prompts=[prompt for part in parts for prompt in part.prompts][::group_size],
        group_size=group_size,
        tokens=padded("tokens"),
        mask=padded("mask"),
        present=padded("present"),
        logp=padded("sampled"),
        truncated=listed("truncated"),
        texts=[""] * sum(len(part.prompts) for part in parts),
    )
    return Experience(
        number,
        rollout,
        listed("rewards"),
        listed("correct"),
        padded("reference"),
        greedy_rewards=None if first.greedy is None else listed("greedy"),
        old_logprobs=None if first.old is None else padded("old"),
        timeouts=None if first.timeouts is None else listed("timeouts"),
        reward_terms=None if first.reward_terms is None else listed("reward_terms"),
    )


def select_rows(experience: Experience, rows: Tensor) -> Experience:
    """Some trajectories of an experience, whatever their groups: to be summed up, not to be trained on."""
    rollout = experience.rollout
    index = rows.tolist()
    part = Rollout(
        prompts=[rollout.prompts[row // rollout.group_size] for row in index],
        group_size=1,
        tokens=rollout.tokens[rows],
        mask=rollout.mask[rows],
        present=rollout.present[rows],
        logp=rollout.logp[rows],
        truncated=rollout.truncated[rows],
        texts=[rollout.texts[row] for row in index],
    )
    return experience.select(rows, part)
