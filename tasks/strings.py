"""Strings with a graded reward: every symbol and every pair of neighbours has a weight, and repetition costs.

A gold reward for `klab.tasks.proxy` that is known exactly and can be learnt in part: near the starting policy it is
almost linear in the counts of symbols and pairs, while the cost of repetition shows only in strings that this policy
hardly ever writes. A reward model that has seen few comparisons is right there and wrong further out.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from string import ascii_lowercase

from klab.grid.errors import UserError
from klab.tasks.task import Example, Score, SplitName

PROMPT = "?"
SOLUTIONS = 4096
LARGEST_EXPONENT = 700.0
CORRECT_SHARE = 0.35
"""Share of uniformly drawn strings that count as correct."""


class Strings:
    """Prompt `?`, completion a string of `length` symbols; anything else is worth 0.

    The reward of a string y of N symbols is the logistic function of

        Σᵢ w(yᵢ)/√N + Σᵢ u(yᵢ, yᵢ₊₁)/√(N−1) − repetition·C(y)²,    C(y) = Σₛ (share of s in y)²,

    with weights w and u drawn from normal distributions. Over uniformly drawn strings both sums have mean 0, their
    variances are the mean squares of w and u, and C is about 1/symbols; C is 1 where one symbol fills the string.

    The budget is `length` tokens, so that a string needs no end token. There is one prompt, which is trained on and
    evaluated on. Reference solutions are drawn uniformly: the starting policy learns to write strings, not good ones.
    Correct is a string that is worth as much as the best 35% of them.

    Args:
        symbols: letters, from `a`.
        length: symbols of a string, N.
        repetition: cost of repetition.
        seed: draws the weights.

    Raises:
        UserError: an argument out of range.
    """

    name = "strings"
    interactive = False

    def __init__(self, symbols: int = 8, length: int = 16, repetition: float = 20.0, seed: int = 0) -> None:
        if not 2 <= symbols <= len(ascii_lowercase):
            raise UserError("must be between 2 and 26", key="task.symbols", value=symbols)
        if length < 2:
            raise UserError("must be at least 2", key="task.length", value=length)
        if repetition < 0:
            raise UserError("must not be negative", key="task.repetition", value=repetition)
        self.letters = ascii_lowercase[:symbols]
        self.alphabet = PROMPT + self.letters
        self.max_new_tokens = length
        self.repetition = repetition
        generator = random.Random(f"weights of {symbols} symbols, seed {seed}")
        self.weights = _centred({letter: generator.gauss(0, 1) for letter in self.letters})
        self.pair_weights = _centred({a + b: generator.gauss(0, 1) for a in self.letters for b in self.letters})

    def split(self, name: SplitName) -> Sequence[Example]:
        return self._examples

    def score(self, example: Example, completion: str) -> Score:
        reward = self._reward(completion)
        return Score(reward, reward >= self._correct_from)

    def respond(self, example: Example, transcript: str) -> str | None:
        return None

    def _reward(self, text: str) -> float:
        length = self.max_new_tokens
        if len(text) != length or not set(text) <= set(self.letters):
            return 0.0
        single = sum(self.weights[letter] for letter in text) / math.sqrt(length)
        pairs = sum(self.pair_weights[a + b] for a, b in pairwise(text)) / math.sqrt(length - 1)
        concentration = sum((count / length) ** 2 for count in Counter(text).values())
        return 1 / (1 + math.exp(min(self.repetition * concentration**2 - single - pairs, LARGEST_EXPONENT)))

    @cached_property
    def _examples(self) -> tuple[Example, ...]:
        generator = random.Random(f"strings of {self.max_new_tokens} from {self.letters}")
        drawn = ("".join(generator.choices(self.letters, k=self.max_new_tokens)) for _ in range(SOLUTIONS))
        return tuple(Example(PROMPT, "", text) for text in drawn)

    @cached_property
    def _correct_from(self) -> float:
        rewards = sorted((self._reward(example.solution) for example in self._examples), reverse=True)
        return rewards[int(CORRECT_SHARE * SOLUTIONS)]


def _centred(weights: dict[str, float]) -> dict[str, float]:
    mean = sum(weights.values()) / len(weights)
    return {name: weight - mean for name, weight in weights.items()}
