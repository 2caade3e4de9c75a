"""A bandit: one prompt, one token, one reward per arm."""

from __future__ import annotations

from collections.abc import Sequence

from klab.grid.errors import UserError
from klab.tasks.tabular import Tabular


class Bandit(Tabular):
    """Prompt `?`, completion the letter of an arm.

    Args:
        arms: how many, from `a`.
        seed: draws the rewards.
        rewards: one per arm; replaces the drawn ones.

    Raises:
        UserError: fewer than 2 or more than 26 arms, or another number of rewards.
    """

    name = "bandit"

    def __init__(self, arms: int = 4, seed: int = 0, rewards: Sequence[float] | None = None) -> None:
        if not 2 <= arms <= 26:
            raise UserError("must be between 2 and 26", key="task.arms", value=arms)
        super().__init__(arms, 1, seed, rewards)
