"""What peers can say about a cell's rollouts: how fresh they are, who samples them, and which are trained on."""

from __future__ import annotations

from typing import Any

from klab.grid import UserError
from klab.grid.schema.sections import TrainingSection


def require_own_fresh_rollouts(training: TrainingSection, peer: str) -> None:
    """Raises UserError where rollouts are not the policy's own, drawn for the update: peers have no others."""
    for name, plain, why in (
        ("lag", 0, "it always trains on fresh rollouts"),
        ("behaviour", "policy", "rollouts are the policy's own"),
        ("sampler", None, "its sampler and what corrects for it are chosen with its inference engine"),
    ):
        if getattr(training, name) != plain:
            raise UserError(f"{peer} cannot express this cell: {why}", key=f"training.{name}")


def trl_selection(training: TrainingSection) -> tuple[dict[str, Any], list[str]]:
    """Arguments of `trl.GRPOConfig`, and what they leave different.

    Raises:
        UserError: groups that leave the update or are replaced.
    """
    if training.equal_groups != "keep":
        raise UserError("TRL cannot express this cell: it trains on every group", key="training.equal_groups")
    found = {"mask_truncated_completions": True} if training.truncated == "mask" else {}
    return found, _overlong(training, "trl.rewards.get_soft_overlong_punishment")


def verl_selection(training: TrainingSection) -> tuple[dict[str, Any], list[str]]:
    """Overrides of verl's configuration, and what they leave different.

    Raises:
        UserError: groups that leave the update without being replaced, or truncated trajectories that do.
    """
    if training.equal_groups == "drop":
        raise UserError("verl cannot express this cell: what it filters, it draws again", key="training.equal_groups")
    if training.truncated == "mask":
        raise UserError("verl cannot express this cell: it trains on truncated samples", key="training.truncated")
    found: dict[str, Any] = {}
    differences = _overlong(training, "the reward manager 'dapo' and its overlong_buffer")
    if training.equal_groups == "refill":
        found = {
            "algorithm.filter_groups.enable": True,
            "algorithm.filter_groups.metric": "seq_reward",
            "algorithm.filter_groups.max_num_gen_batches": training.refill_rounds + 1,
        }
        differences.append("only its DAPO recipe filters groups; it stops where klab fills up with equal groups")
    return found, differences


def _overlong(training: TrainingSection, name: str) -> list[str]:
    if training.overlong_buffer is None:
        return []
    charge = f"up to {training.overlong_penalty:g} over the last {training.overlong_buffer} tokens"
    return [f"add {name} to the rewards: {charge}"]
