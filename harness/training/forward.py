"""The forward passes of an update: every cell's policy, its reference for whole distributions, and its critic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from klab.harness.policy.policy import Policy
from klab.harness.policy.rollout import Rollout
from klab.harness.policy.scores import token_scores
from klab.harness.training.distributed.messages import message_type
from klab.harness.training.optim.critic import Critics
from klab.harness.training.pack_settings import PackSettings


@dataclass(frozen=True, slots=True)
class Models:
    """What an update of a pack computes with: the policies that learn, their references, and their critics."""

    policy: Policy
    reference: Policy
    critics: Critics | None = None


@message_type
@dataclass(frozen=True, slots=True)
class ForwardPass:
    """A forward pass over n rows of one cell: log-probabilities [n, T], entropy [n, T] (with gradient for
    an entropy bonus), logits [n, T, V] for
    `full`, and its critic's values [n, T]."""

    logp: Tensor
    entropy: Tensor
    logits: Tensor | None = None
    logits_reference: Tensor | None = None
    values: Tensor | None = None


def forward_pass(
    models: Models, settings: PackSettings, rollouts: Sequence[Rollout], critic_only: bool
) -> list[ForwardPass]:
    """Run the models over some trajectories of every cell.

    Args:
        critic_only: the critics learn critic_only, so that no gradient of theirs goes into the policies.
    """
    temperature, full = settings.temperature, settings.needs_logits
    critics, listed = models.critics, list(rollouts)
    shared = critics is not None and critics.shares_trunk
    scores = token_scores(
        models.policy,
        listed,
        temperature=temperature,
        logits=full,
        entropy=True,
        entropy_gradient=settings.needs_entropy_gradient,
        states=shared,
    )
    with torch.no_grad():
        other = token_scores(models.reference, listed, temperature=temperature, logits=True) if full else None
    states = [score.states.detach() if critic_only and score.states is not None else score.states for score in scores]
    values = None if critics is None else critics.values(listed, states)
    found = []
    for c, score in enumerate(scores):
        assert score.entropy is not None
        found.append(
            ForwardPass(
                score.logp,
                score.entropy,
                score.logits,
                None if other is None else other[c].logits,
                None if values is None else values[c],
            )
        )
    return found


def concat_passes(passes: Sequence[ForwardPass]) -> ForwardPass:
    """The rows of several passes over one cell, one after the other."""

    if len(passes) == 1:
        return passes[0]

    def joined(values: Sequence[Tensor | None]) -> Tensor | None:
        present = [value for value in values if value is not None]
        return torch.cat(present) if present else None

    return ForwardPass(
        torch.cat([p.logp for p in passes]),
        torch.cat([p.entropy for p in passes]),
        joined([p.logits for p in passes]),
        joined([p.logits_reference for p in passes]),
        joined([p.values for p in passes]),
    )
