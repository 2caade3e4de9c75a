"""A task that scores all completions of a rollout at once, and misbehaves on demand."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from letters_task import Letters

from klab.tasks import Example, Score

ASKED: list[int] = []


class Together(Letters):
    """Scores all completions of a rollout at once.

    Args:
        trouble: "" for none; else what happens at the fourth completion: "raise", "hang", "end".
    """

    def __init__(self, trouble: str = "") -> None:
        super().__init__()
        self.trouble = trouble

    def score_all(self, examples: Sequence[Example], completions: Sequence[str]) -> Iterator[Score]:
        ASKED.append(len(completions))
        for number, (example, completion) in enumerate(zip(examples, completions, strict=True)):
            if number == 3 and self.trouble == "raise":
                raise RuntimeError("the fourth is broken")
            if number == 3 and self.trouble == "hang":
                time.sleep(3600)
            if number == 3 and self.trouble == "end":
                return
            yield super().score(example, completion)

    def score(self, example: Example, completion: str) -> Score:
        raise AssertionError("asked one by one")
