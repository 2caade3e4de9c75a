"""Schedules: the learning rate of each update, and when each rollout is sampled and used.

Updates are counted in optimizer updates. A rollout serves `updates_per_rollout` epochs of `minibatches` updates
each. With `lag: k` a rollout comes from the policy of k updates before its first use: it is drawn *at that moment*,
when the policy has exactly those weights, and waits in a queue. So no lagged weights have to be kept, at any lag,
and the log-probabilities that the sampler kept are the behaviour policy's own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from klab.grid.schema.sections import TrainingSection


def learning_rate(training: TrainingSection, update: int, peak: float | None = None) -> float:
    """The learning rate of the `update`-th update (1-based): linear warm-up, then constant, linear or cosine to zero.

    Warm-up reaches the full rate, `peak` or that of the section, at update `warmup_updates`; the decays would reach
    zero one update after the last.
    """
    lr = training.lr if peak is None else peak
    done = update - 1
    if done < training.warmup_updates:
        return lr * update / training.warmup_updates
    if training.schedule == "constant":
        return lr
    share = (done - training.warmup_updates) / max(1, training.updates - training.warmup_updates)
    if training.schedule == "linear":
        return lr * (1.0 - share)
    return lr * 0.5 * (1.0 + math.cos(math.pi * share))


@dataclass(frozen=True, slots=True)
class RolloutSchedule:
    """Which rollout serves which update. Rollouts and updates done are counted from 0."""

    updates: int
    epochs: int
    minibatches: int
    lag: int

    @classmethod
    def of(cls, training: TrainingSection) -> RolloutSchedule:
        lag = 0 if training.behaviour == "reference" else training.lag  # the reference never ages
        return cls(training.updates, training.updates_per_rollout, training.minibatches, lag)

    @property
    def updates_per_rollout(self) -> int:
        """Updates served by one rollout."""
        return self.epochs * self.minibatches

    @property
    def rollouts(self) -> int:
        """Rollouts needed in all; the last may be cut short by `updates`."""
        return -(-self.updates // self.updates_per_rollout)

    def position(self, done: int) -> tuple[int, int, int]:
        """(rollout, epoch, minibatch) of the update that follows `done` updates."""
        rollout, rest = divmod(done, self.updates_per_rollout)
        epoch, part = divmod(rest, self.minibatches)
        return rollout, epoch, part

    def rollouts_needed(self, done: int) -> int:
        """How many rollouts have been drawn once the policy, `done` updates old, is about to make another."""
        return min(self.rollouts, (done + self.lag) // self.updates_per_rollout + 1)
