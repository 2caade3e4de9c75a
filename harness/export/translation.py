"""A cell in the settings of another trainer: what is translated, and what can or cannot be said there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from klab.grid import Objective, UserError
from klab.grid.schema.sections import TrainingSection


@dataclass(frozen=True, slots=True)
class Setting:
    """What is exported: an objective, under a training schedule unless it is an algorithm without one."""

    objective: Objective
    training: TrainingSection | None = None

    @property
    def on_policy(self) -> bool:
        return self.training is not None and self.training.on_policy

    @property
    def max_new_tokens(self) -> int | None:
        return self.training.max_new_tokens if self.training is not None else None


@dataclass(frozen=True, slots=True)
class Export:
    """A peer's settings, and in words what they leave different."""

    settings: dict[str, Any]
    differences: tuple[str, ...] = ()


class Translation:
    """An objective on its way to a peer (the other trainer), and the differences that are left.

    Idle axes read as what the peer has anyway, so that they are never a reason to refuse.
    """

    def __init__(self, setting: Setting, peer: str) -> None:
        self.peer = peer
        self.objective = setting.objective
        self.on_policy = setting.on_policy
        self.canonical = setting.objective.canonical(setting.on_policy)
        self.differences: list[str] = []

    def active_value(self, axis: str, otherwise: str) -> str:
        """The value of an axis, or `otherwise` where the axis is idle."""
        return str(self.canonical.get(axis, otherwise))

    def refusal(self, axis: str, why: str) -> UserError:
        """The error to raise where the peer has nothing that corresponds to the value of an axis."""
        return UserError(
            f"{self.peer} cannot express this cell: {why}", key=axis, value=getattr(self.objective, axis, None)
        )

    def translate(self, axis: str, names: dict[str, str], otherwise: str) -> str:
        """The peer's name for the value of an axis.

        Raises:
            UserError: the peer has no such value.
        """
        value = self.active_value(axis, otherwise)
        if value not in names:
            raise self.refusal(axis, f"it has only {', '.join(names)} on this axis")
        return names[value]

    def compare_std(self, eps: float) -> None:
        """Note how the peer's standard deviation differs; it adds `eps` to the sample standard deviation."""
        std, own = self.objective.std, self.objective.eps
        if std != "sample":
            self.differences.append(
                f"{self.peer} divides advantages by the sample standard deviation, this cell by the population's: "
                "a factor √((G − 1)/G); std: sample makes them equal"
            )
        if own != eps:
            self.differences.append(f"{self.peer} adds {eps:g} to the standard deviation, this cell {own:g}")


def overlong_differences(training: TrainingSection, name: str) -> list[str]:
    """What is left to do for a soft punishment of overlong completions, which the peer has as the reward `name`."""
    if training.overlong_buffer is None:
        return []
    charge = f"up to {training.overlong_penalty:g} over the last {training.overlong_buffer} tokens"
    return [f"add {name} to the rewards: {charge}"]


def require_own_fresh_rollouts(training: TrainingSection, peer: str) -> None:
    """Raises UserError where rollouts are not the policy's own, drawn for the update: peers have no others."""
    for name, plain, why in (
        ("lag", 0, "it always trains on fresh rollouts"),
        ("behaviour", "policy", "rollouts are the policy's own"),
        ("sampler", None, "its sampler and what corrects for it are chosen with its inference engine"),
    ):
        if getattr(training, name) != plain:
            raise UserError(f"{peer} cannot express this cell: {why}", key=f"training.{name}")
