"""Sums of two n-digit numbers, the answer written with its least significant digit first.

In that order each digit depends on two digits of the prompt and on a carry that was just decided, which a transformer
of a few layers learns within seconds (Lee et al. 2023, "Teaching Arithmetic to Small Transformers").
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from functools import cache
from hashlib import sha256

from klab.grid.errors import UserError
from klab.tasks.splits import Drawn, split_of
from klab.tasks.task import Example, Score, SplitName

LISTED_DIGITS, LARGEST = 2, 40
ORDERS = ("most", "least")
TRAIN_LENGTH, HELD_OUT_LENGTH = 1_000_000, 4_096


class Addition:
    """Prompt `12+34=`, answer `64`. Reward 1 for the exact answer, else 0.

    `a+b` and `b+a` are in the same split. Up to two digits a split lists every sum once, in a shuffled order; above
    that, sums are drawn.

    Args:
        digits: number of digits of both summands, without leading zeros; 0 counts as a one-digit number.
        prompt_order: the digit that summands begin with, `most` or `least` significant. With `least` each digit of the
            answer depends on two digits at fixed distances before it, so that a tiny policy learns long sums.
    """

    alphabet = "0123456789+="
    interactive = False

    def __init__(self, digits: int = 2, prompt_order: str = "most") -> None:
        if not 1 <= digits <= LARGEST:
            raise UserError(f"must be between 1 and {LARGEST}", key="task.digits", value=digits)
        if prompt_order not in ORDERS:
            raise UserError("no such order", key="task.prompt_order", value=prompt_order, allowed=ORDERS)
        self.name = "addition"
        self.digits, self.prompt_order = digits, prompt_order
        self.max_new_tokens = digits + 2
        self._low, self._high = (0 if digits == 1 else 10 ** (digits - 1)), 10**digits

    def split(self, name: SplitName) -> Sequence[Example]:
        if self.digits <= LISTED_DIGITS:
            return _listed(range(self._low, self._high), self.prompt_order)[name]
        length = HELD_OUT_LENGTH if name == "held_out" else TRAIN_LENGTH
        return Drawn(f"addition/{self.digits}", name, length, self._draw)

    def score(self, example: Example, completion: str) -> Score:
        correct = completion == example.answer
        return Score(float(correct), correct)

    def respond(self, example: Example, transcript: str) -> str | None:
        return None

    def _draw(self, generator: random.Random) -> tuple[str, Example]:
        a, b = generator.randrange(self._low, self._high), generator.randrange(self._low, self._high)
        return _key(a, b), _example(a, b, self.prompt_order)


@cache
def _listed(numbers: range, prompt_order: str) -> Mapping[SplitName, tuple[Example, ...]]:
    """Every sum of two of these numbers, by split; the tasks of all cells share it."""
    pairs = sorted(((a, b) for a in numbers for b in numbers), key=_shuffled)
    found: dict[SplitName, list[Example]] = {"train": [], "held_out": []}
    for a, b in pairs:
        found[split_of(_key(a, b))].append(_example(a, b, prompt_order))
    return {name: tuple(examples) for name, examples in found.items()}


def _key(a: int, b: int) -> str:
    return f"addition {min(a, b)} {max(a, b)}"


def _example(a: int, b: int, prompt_order: str) -> Example:
    answer, step = str(a + b)[::-1], -1 if prompt_order == "least" else 1
    return Example(f"{str(a)[::step]}+{str(b)[::step]}=", answer, answer)


def _shuffled(pair: tuple[int, int]) -> bytes:
    return sha256(f"order {pair[0]} {pair[1]}".encode()).digest()
