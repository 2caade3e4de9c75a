"""Products of numbers, with a calculator that answers what the policy writes in brackets.

A tiny policy cannot multiply, but it can learn to copy the product into brackets, end its turn, and copy the answer.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from klab.grid.errors import UserError
from klab.tasks.expression import Malformed, evaluate
from klab.tasks.splits import Drawn
from klab.tasks.task import TURN_END, Example, Score, SplitName

TRAIN_LENGTH, HELD_OUT_LENGTH = 1_000_000, 4_096
LONGEST_RESULT = 12
_CALL = re.compile(r"\[([^\[\]]*)\]")
_ANSWERED = re.compile(r"\]=-?[0-9]*;")


class Calculator:
    """Prompt `12*34=`; the policy ends a turn with `[12*34]`, reads `=408;`, and answers `408`. Reward 1 for that.

    The calculator knows integers, `+`, `-`, `*` and parentheses; it answers `=;` where it does not understand or the
    result has over 12 digits. Its answers cost no budget and belong to no loss. The answer is what the policy
    wrote after its last bracket, with or without a call. Part: `calls`, the number of well-formed calls.

    Args:
        digits: number of digits of both factors, without leading zeros; with one digit, all products could be
            learned by heart.
        calls: how often the calculator answers in one episode; after that, the end of a turn ends the episode.
    """

    name = "calculator"
    alphabet = "0123456789+-*()[]=;"
    interactive = True

    def __init__(self, digits: int = 2, calls: int = 1) -> None:
        if not 2 <= digits <= 4:
            raise UserError("must be between 2 and 4", key="task.digits", value=digits)
        if not 1 <= calls <= 8:
            raise UserError("must be between 1 and 8", key="task.calls", value=calls)
        self.digits, self.calls = digits, calls
        self._low, self._high = 10 ** (digits - 1), 10**digits
        self.max_new_tokens = calls * (2 * digits + 4) + 2 * digits + 1

    def split(self, name: SplitName) -> Sequence[Example]:
        length = HELD_OUT_LENGTH if name == "held_out" else TRAIN_LENGTH
        return Drawn(f"calculator/{self.digits}", name, length, self._draw)

    def score(self, example: Example, completion: str) -> Score:
        correct = completion.rpartition("]")[2] == example.answer
        calls = sum(_result(call) != "" for call in _CALL.findall(completion))
        return Score(float(correct), correct, {"calls": float(calls)})

    def respond(self, example: Example, transcript: str) -> str | None:
        if not transcript.endswith("]") or len(_ANSWERED.findall(transcript)) >= self.calls:
            return None
        calls = _CALL.findall(transcript)
        return f"={_result(calls[-1]) if calls else ''};"

    def _draw(self, generator: random.Random) -> tuple[str, Example]:
        a, b = generator.randrange(self._low, self._high), generator.randrange(self._low, self._high)
        product = str(a * b)
        example = Example(f"{a}*{b}=", product, f"[{a}*{b}]{TURN_END}{product}")
        return f"calculator {min(a, b)} {max(a, b)}", example


def _result(expression: str) -> str:
    try:
        value, _ = evaluate(expression)
    except Malformed:
        return ""
    return str(value) if abs(value) < 10**LONGEST_RESULT else ""  # a larger one may be too large to write
