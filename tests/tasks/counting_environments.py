"""Environments of a user, written for TRL."""

from __future__ import annotations

from typing import Any

made = 0


class Counter:
    """Count up to a goal."""

    def reset(self, goal: int = 3, **columns: Any) -> str:
        self.value, self.goal = 0, int(goal)
        return f" (from {self.value})"

    def add(self, amount: int) -> int:
        """Add an amount to the count."""
        self.value += amount
        return self.value

    async def take(self, amount: int) -> int:
        """Take an amount from the count."""
        self.value -= amount
        return self.value

    def _hidden(self) -> int:
        return self.value

    async def get_reward(self) -> float:
        return 1.0 if self.value == self.goal else 0.25


class Fickle(Counter):
    """An environment with a memory of its own."""

    def add(self, amount: int) -> int:
        """Answer otherwise every time."""
        global made
        made += 1
        return made


class Toolless:
    def reset(self, **columns: Any) -> None: ...


class Unrewarded:
    def reset(self, **columns: Any) -> None: ...

    def look(self) -> str:
        return "nothing"
