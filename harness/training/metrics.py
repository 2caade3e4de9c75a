"""One row of metrics.jsonl: what one optimizer update saw and did.

All metrics are of the trajectories of that update (its minibatch): averaged over the minibatches of an epoch they are
those of the rollout. A number that is not finite is stored as null. Seconds are wall time divided equally among the
cells of the pack; the seconds of a rollout are in the row of the update before which it was sampled.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from klab.harness.objective.masking import masked
from klab.harness.training.data.experience import Experience

FROM_OBJECTIVE = (
    "k1",
    "k2",
    "k3",
    "kl_behaviour",
    "ratio_mean",
    "ratio_max",
    "ess",
    "weight_mean",
    "clip_fraction",
    "informative_groups",
)
"""Figures of `klab.harness.objective`'s output that a row keeps under their own names."""

Row = dict[str, Any]


def update_row(
    *,
    update: int,
    experience: Experience,
    entropy: Tensor,
    loss: float,
    metrics: Mapping[str, float],
    gradient_norm: float,
    lr: float,
    nonfinite: bool,
) -> Row:
    """The row of one update on a minibatch.

    Args:
        update: counted from 1.
        experience: the minibatch.
        entropy: [N, T], of the policy before the update, at own tokens.
        gradient_norm: before clipping.
        nonfinite: the loss or the gradient was not finite, and the update was skipped.
    """
    sampled, total_entropy = _sampled(experience, masked(entropy, experience.rollout.mask).sum())
    return {
        "update": update,
        "rollout": experience.number,
        **sampled,
        **{name: finite(metrics[name]) for name in FROM_OBJECTIVE},
        "entropy": finite(total_entropy / max(1, sampled["tokens"])),
        "gradient_norm": finite(gradient_norm),
        "loss": finite(loss),
        "lr": lr,
        "nonfinite": nonfinite,
    }


def sampled_figures(experience: Experience) -> Row:
    """Metrics of the trajectories of a minibatch that need no policy: rewards and lengths."""
    return _sampled(experience, experience.rewards.new_zeros(()))[0]


def _sampled(experience: Experience, more: Tensor) -> tuple[Row, float]:
    """The same, and another scalar tensor as a number, all in one copy to the host."""
    rollout, rewards = experience.rollout, experience.rewards.double()
    tokens = int(rollout.on_host.mask.sum())
    figures = (rewards.mean(), rewards.std(correction=0), experience.correct.mean(), rollout.truncated.double().mean())
    mean, std, correct, truncated, number = torch.stack([figure.double() for figure in (*figures, more)]).tolist()
    row = {
        "reward_mean": finite(mean),
        "reward_std": finite(std),
        "correct": correct,
        "length_mean": tokens / len(rewards),
        "truncated": truncated,
        "tokens": tokens,
    }
    return row, number


def finite(value: float) -> float | None:
    """The value, or None (JSON null) where it is NaN or infinite."""
    return float(value) if math.isfinite(value) else None


def same_numbers(row: Mapping[str, Any]) -> Row:
    """The row without what may differ between two runs of the same cell: times."""
    return {key: value for key, value in row.items() if not key.startswith("seconds")}
