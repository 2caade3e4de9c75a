"""Splits that never share a prompt: which one an example belongs to is decided by a hash of what the example asks."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from typing import overload

from klab.tasks.task import Example, SplitName

HELD_OUT_SHARE = 0.1


def split_of(key: str) -> SplitName:
    """The split of everything whose canonical form is `key`; about one key in ten is held out."""
    fraction = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64
    return "held_out" if fraction < HELD_OUT_SHARE else "train"


class Drawn(Sequence[Example]):
    """A lazy split of a space too large to list: example i is drawn with a generator seeded by (name, split, i).

    Draws that belong to the other split are rejected, so no prompt is in both; one prompt may be drawn twice in one
    split.

    Args:
        name: of the task with its parameters; part of every seed.
        split: which split.
        length: how many examples.
        draw: from a generator, an example and its canonical key.
    """

    def __init__(
        self, name: str, split: SplitName, length: int, draw: Callable[[random.Random], tuple[str, Example]]
    ) -> None:
        self.name, self.split, self.length, self.draw = name, split, length, draw

    def __len__(self) -> int:
        return self.length

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self.length))]
        if not -self.length <= index < self.length:
            raise IndexError(f"example {index} of {self.length}")
        generator = random.Random(f"{self.name}/{self.split}/{index % self.length}")
        while True:
            key, example = self.draw(generator)
            if split_of(key) == self.split:
                return example
