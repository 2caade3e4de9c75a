"""What is exported, and what an export consists of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from klab.grid import Objective, UserError
from klab.grid.schema.sections import TrainingSection


@dataclass(frozen=True, slots=True)
class Setting:
    """What is exported: an objective, under a training schedule unless it is an algorithm without one.

    Attributes:
        name: of the algorithm, or the cell's folder.
    """

    objective: Objective
    training: TrainingSection | None = None
    name: str = ""

    @property
    def on_policy(self) -> bool:
        return self.training is not None and self.training.on_policy

    @property
    def max_new_tokens(self) -> int | None:
        return self.training.max_new_tokens if self.training is not None else None


@dataclass(frozen=True, slots=True)
class Export:
    """A peer's settings, and in words what they leave different.

    Attributes:
        settings: by the peer's names.
        differences: what the settings leave different or to do.
        target: what they are arguments of.
        objective: the one whose gradient the peer has with them: the cell's, with the peer's conventions.
    """

    settings: dict[str, Any]
    differences: tuple[str, ...]
    target: str
    objective: Objective


def overlong_differences(training: TrainingSection, name: str) -> list[str]:
    """What is left to do for a soft punishment of overlong completions, which the peer has as the reward `name`."""
    if training.overlong_buffer is None:
        return []
    charge = f"up to {training.overlong_penalty:g} over the last {training.overlong_buffer} tokens"
    return [f"add {name} to the rewards: {charge}"]


def require_own_fresh_rollouts(training: TrainingSection, peer: str) -> None:
    """Raises UserError where rollouts are not the policy's own, drawn for the update: peers have no others; and where
    the loss has a part that they lack."""
    for name, plain, why in (
        ("lag", 0, "it always trains on fresh rollouts"),
        ("behaviour", "policy", "rollouts are the policy's own"),
        ("trust_region", None, "it has no penalty on the KL to the behaviour policy"),
    ):
        if getattr(training, name) != plain:
            raise UserError(f"{peer} cannot express this cell: {why}", key=f"training.{name}")


def sampler_differences(training: TrainingSection, peer: str) -> list[str]:
    """What an export leaves different of a sampler.

    Raises:
        UserError: it has another temperature than the trainer; peers have one for both.
    """
    sampler = training.sampler
    if sampler is None:
        return []
    if sampler.temperature not in (None, training.temperature):
        raise UserError(
            f"{peer} cannot express this cell: it scores at the temperature that it samples at",
            key="training.sampler.temperature",
            value=sampler.temperature,
        )
    if sampler.engine == "vllm" and sampler.dtype is None:
        return []
    return [f"{peer} samples with its inference engine, in the precision chosen there"]
