"""A reward for every word of a small alphabet, so that what training should reach can be computed exactly.

With one prompt and all rewards known, the optimum of E[R] − β·KL(π ‖ π₀) is π*(y) ∝ π₀(y)·exp(R(y)/β), and any policy's
value is a sum over words.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import product
from string import ascii_lowercase

from klab.grid.errors import UserError
from klab.grid.schema.task import LARGEST_TABLE
from klab.tasks.task import Example, Score, SplitName

PROMPT = "?"
SHARE_OF_BEST = 0.4
"""Share of the reference solutions that are the best word, so that a warm-up ends where reinforcement can begin."""

SOLUTIONS = 1000


class Tabular:
    """Prompt `?`, completion a word of `horizon` letters, reward its entry in the table; anything else is worth 0.

    The budget is `horizon` tokens, so that a word needs no end token. Correct is the word with the largest reward (the
    first of several). There is one prompt, which is trained on and evaluated on: nothing is to be generalised.

    Args:
        symbols: letters, from `a`.
        horizon: letters of a word.
        seed: draws the rewards uniformly from 0, 0.001, …, 1.
        rewards: the table itself, words in lexicographic order; replaces the drawn one.

    Raises:
        UserError: a table that is too large, or not of `symbols ** horizon` rewards.
    """

    name = "tabular"
    interactive = False

    def __init__(
        self, symbols: int = 3, horizon: int = 2, seed: int = 0, rewards: Sequence[float] | None = None
    ) -> None:
        size = symbols**horizon
        if not 2 <= symbols <= len(ascii_lowercase):
            raise UserError("must be between 2 and 26", key="task.symbols", value=symbols)
        if horizon < 1 or size > LARGEST_TABLE:
            raise UserError(f"a table has 1 to {LARGEST_TABLE} rewards", key="task.horizon", value=horizon)
        if rewards is not None and len(rewards) != size:
            raise UserError(f"{len(rewards)} rewards for a table of {size}", key="task.rewards")
        self.alphabet = PROMPT + ascii_lowercase[:symbols]
        self.max_new_tokens = horizon
        generator = random.Random(f"{symbols} symbols, {horizon} times, seed {seed}")
        drawn = [generator.randrange(1001) / 1000 for _ in range(size)] if rewards is None else rewards
        self.words = ["".join(letters) for letters in product(ascii_lowercase[:symbols], repeat=horizon)]
        self.table = dict(zip(self.words, map(float, drawn), strict=True))
        self.best = max(self.words, key=self.table.__getitem__)

    def split(self, name: SplitName) -> Sequence[Example]:
        """The prompt many times; its reference solutions are the best word and, in turn, all others."""
        others = [word for word in self.words if word != self.best]
        often = round(SHARE_OF_BEST * SOLUTIONS)
        solutions = [self.best] * often + [others[i % len(others)] for i in range(SOLUTIONS - often)]
        return [Example(PROMPT, self.best, word) for word in solutions]

    def score(self, example: Example, completion: str) -> Score:
        return Score(self.table.get(completion, 0.0), completion == self.best)

    def respond(self, example: Example, transcript: str) -> str | None:
        return None
