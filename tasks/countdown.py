"""Countdown: write an expression over the given numbers that reaches the target, each number at most once."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

from klab.grid.errors import UserError
from klab.tasks.expression import Malformed, evaluate
from klab.tasks.splits import Drawn
from klab.tasks.task import Example, Score, SplitName

TRAIN_LENGTH, HELD_OUT_LENGTH = 1_000_000, 4_096
ATTEMPTS = 10_000


class Countdown:
    """Prompt `3,5,7:22=`, a solution `5*3+7`. Reward 1 for an expression of that value using each number at most once.

    Every problem has a solution, because it was made from one: a random expression over all of its numbers, with every
    intermediate value positive. Two problems with the same numbers in another order are in the same split.

    Args:
        numbers: how many numbers are given.
        largest: the largest of them; they start at 1.
        target_max: the largest target; targets start at 1.
    """

    alphabet = "0123456789+-*(),:="
    interactive = False

    def __init__(self, numbers: int = 3, largest: int = 9, target_max: int = 30) -> None:
        if not 2 <= numbers <= 6:
            raise UserError("must be between 2 and 6", key="task.numbers", value=numbers)
        if largest < 2:
            raise UserError("must be at least 2", key="task.largest", value=largest)
        if target_max < 1:
            raise UserError("must be at least 1", key="task.target_max", value=target_max)
        self.name = "countdown"
        self.numbers, self.largest, self.target_max = numbers, largest, target_max
        digits = len(str(largest))
        self.max_new_tokens = numbers * digits + (numbers - 1) + 2 * max(numbers - 2, 0) + 1

    def split(self, name: SplitName) -> Sequence[Example]:
        length = HELD_OUT_LENGTH if name == "held_out" else TRAIN_LENGTH
        return Drawn(f"countdown/{self.numbers}/{self.largest}/{self.target_max}", name, length, self._draw)

    def score(self, example: Example, completion: str) -> Score:
        """Parts: `valid` is 1 for an expression that uses each given number at most once, whatever its value."""
        given, _, target = example.prompt.rstrip("=").partition(":")
        try:
            value, used = evaluate(completion)
        except Malformed:
            return Score(0.0, False, {"valid": 0.0})
        valid = not Counter(used) - Counter(int(number) for number in given.split(","))
        correct = valid and value == int(target)
        return Score(float(correct), correct, {"valid": float(valid)})

    def respond(self, example: Example, transcript: str) -> str | None:
        return None

    def _draw(self, generator: random.Random) -> tuple[str, Example]:
        for _ in range(ATTEMPTS):
            numbers = [generator.randint(1, self.largest) for _ in range(self.numbers)]
            found = _combined(numbers, self.target_max, generator)
            if found is None:
                continue
            value, solution = found
            generator.shuffle(numbers)
            key = f"countdown {sorted(numbers)} {value}"
            return key, Example(f"{','.join(map(str, numbers))}:{value}=", str(value), solution)
        raise UserError(
            "no problem found: targets up to this are out of reach", key="task.target_max", value=self.target_max
        )


def _combined(numbers: list[int], target_max: int, generator: random.Random) -> tuple[int, str] | None:
    """A value within the target's range and an expression for it over all numbers, else None.

    Each term is (value, text, binding strength: 2 for a number or a parenthesis, 1 for a product, 0 for a sum).
    """
    terms = [(number, str(number), 2) for number in numbers]
    while len(terms) > 1:
        left = terms.pop(generator.randrange(len(terms)))
        right = terms.pop(generator.randrange(len(terms)))
        operator = generator.choice("+-*")
        if left[0] < right[0]:  # one order per pair, the same for every operator, is easier to learn
            left, right = right, left
        value = {"+": left[0] + right[0], "-": left[0] - right[0], "*": left[0] * right[0]}[operator]
        if value <= 0:
            return None
        binding = 1 if operator == "*" else 0
        first = _enclosed(left[1], left[2] < binding)
        second = _enclosed(right[1], right[2] < binding or (operator == "-" and right[2] == 0))
        terms.append((value, first + operator + second, binding))
    value, text, _ = terms[0]
    return (value, text) if value <= target_max else None


def _enclosed(text: str, needed: bool) -> str:
    return f"({text})" if needed else text
