"""Overlong trajectories: DAPO's soft length penalty, and exclusion of truncated ones from the loss."""

from __future__ import annotations

from torch import Tensor

from klab.grid.errors import UserError
from klab.harness.policy.rollout import Rollout
from klab.harness.training.packed_cell import PackedCell


def training_rewards(member: PackedCell, rollout: Rollout, rewards: Tensor) -> Tensor:
    """The rewards that an update maximises, [N]: the task's minus the length penalties.

    The soft overlong punishment of DAPO (arXiv:2503.14476, eq. 13), times `overlong_penalty`: nothing up to
    budget − buffer own tokens, then linearly up to 1 at the budget.
    """
    training = member.cell.training
    if training.overlong_buffer is None:
        return rewards
    return rewards - length_penalties(rollout, member).to(rewards.dtype)


def length_penalties(rollout: Rollout, member: PackedCell) -> Tensor:
    """Penalty of each trajectory's length, float64 [N], at least 0."""
    training = member.cell.training
    buffer = training.overlong_buffer
    assert buffer is not None
    excess = rollout.mask.sum(1).double() - (member.max_new_tokens - buffer)
    return training.overlong_penalty * (excess / buffer).clamp(0.0, 1.0)


def excluded_rows(member: PackedCell, rollout: Rollout) -> Tensor | None:
    """bool [N], the trajectories that the loss leaves out; None where it never does."""
    return rollout.truncated if member.cell.training.truncated == "mask" else None


def check_overlong_buffer(member: PackedCell) -> None:
    """Raises UserError where the buffer is longer than the budget, which the task may have set."""
    buffer = member.cell.training.overlong_buffer
    if buffer is not None and buffer > member.max_new_tokens:
        raise UserError(
            f"exceeds the {member.max_new_tokens} tokens that task {member.task.name!r} allows",
            key="training.overlong_buffer",
            value=buffer,
            hint="Shorten it, or set training.max_new_tokens.",
        )
