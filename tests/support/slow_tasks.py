"""Tasks for tests of dispatch: one that is slow, one that fails, one that kills its process."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from typing import Any, Literal

from klab.grid import UserError
from klab.tasks import Example, Score, load_task


class Chore:
    """Sums of one-digit numbers, with something else going on.

    Args:
        seconds: pause in every score.
        fail_unless: path of a file without which scoring raises.
        overdue: a limit of time decides every reward.
        die: number of processes to kill, one per attempt; the file of this name counts them.
    """

    name = "chore"
    alphabet = "0123456789+="
    max_new_tokens = 3

    def __init__(self, seconds: float = 0.0, fail_unless: str = "", die: int = 0, overdue: bool = False) -> None:
        from klab.grid.schema.sections import load_section

        self.addition: Any = load_task(load_section("task", {"name": "addition", "digits": 1}))
        self.has_reward_timeouts = overdue
        self.seconds, self.fail_unless, self.die = seconds, fail_unless, die

    def split(self, name: Literal["train", "held_out"]) -> Any:
        return self.addition.split(name)

    def score(self, example: Example, completion: str) -> Score:
        time.sleep(self.seconds)
        if self.fail_unless and not os.path.exists(self.fail_unless):
            raise UserError("the file is not there", file=self.fail_unless)
        if self.die:
            with open("deaths", "a+") as file:
                file.seek(0)
                if len(file.read()) < self.die:
                    file.write("x")
                    file.flush()
                    os.kill(os.getpid(), signal.SIGKILL)
        score: Score = self.addition.score(example, completion)
        return replace(score, timeouts=int(self.has_reward_timeouts))

    def respond(self, example: Example, transcript: str) -> str | None:
        return None
