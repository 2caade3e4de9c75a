"""Cells of a pack that are about to be computed alike: one of them is computed for all, with the same bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from klab.harness.policy.policy import Policy
from klab.harness.training.pack_settings import PackSettings
from klab.harness.training.packed_cell import PackedCell
from klab.tasks.task import Example

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class EqualCells:
    """Which members of a pack stand for all.

    Attributes:
        chosen: positions of those that are computed, ascending.
        place: of every member, where the one that stands for it is in `chosen`.
    """

    chosen: list[int]
    place: list[int]

    @classmethod
    def with_equal_starts(
        cls,
        settings: PackSettings,
        members: Sequence[PackedCell],
        examples: Sequence[Sequence[Example]],
        policy: Policy,
        by_seed: bool,
    ) -> EqualCells:
        """Members whose policies have the weights that they start from, by what their completions depend on: these
        weights, the prompts, and the seed where draws depend on it.

        On CPUs alone, where a cell's bits do not depend on the cells beside it; and where nothing but klab's own
        sampler and the policy makes completions: an environment may be anybody's code.

        Args:
            examples: of every member, those whose prompts are completed.
            policy: the members' policies.
            by_seed: whether members have to have one seed.
        """
        bare = policy.device.type == "cpu" and settings.sampler is None and settings.policy.lora is None
        answered = any(getattr(member.task, "interactive", True) for member in members)
        if not bare or answered:
            return cls.all_different(len(members))
        first: dict[tuple[object, ...], int] = {}
        place = []
        for member, listed in zip(members, examples, strict=True):
            prompts = tuple(example.prompt for example in listed)
            key = (member.start, prompts, member.cell.seed if by_seed else None)
            place.append(first.setdefault(key, len(first)))
        return cls([place.index(number) for number in range(len(first))], place)

    @classmethod
    def all_different(cls, members: int) -> EqualCells:
        return cls(list(range(members)), list(range(members)))

    def some(self, values: Sequence[T]) -> list[T]:
        """Of one value per member, those of the chosen ones."""
        return [values[position] for position in self.chosen]

    def all(self, values: Sequence[T]) -> list[T]:
        """From one value per chosen member, one per member."""
        return [values[number] for number in self.place]
