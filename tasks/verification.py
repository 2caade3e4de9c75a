"""Whether a completion gives the right mathematical answer: plain numbers here, everything else by math-verify.

math-verify (Kydlíček, https://github.com/huggingface/Math-Verify) parses LaTeX and expressions with sympy, which may
take any time and memory on what a policy writes, and limits itself with a signal that belongs to the trainer. So it
runs in a worker; what it cannot decide in time is wrong, and counted.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, lru_cache, partial
from typing import Any

from klab.grid.errors import UserError
from klab.grid.user_code import is_installed
from klab.tasks.answers import Answer, conclusion, marked_answer, without_special_tokens
from klab.tasks.numerals import Numeral, numeral
from klab.tasks.task import Score
from klab.tasks.worker import CallFailed, CallOverdue, Worker

STEP_SECONDS = 5.0
"""Processor time that math-verify has for each step (parsing the truth, parsing the answer, comparing)."""

CALL_SECONDS, MEMORY_GB = 30.0, 4.0

LONGEST_TRUTH = 40
"""Characters of a text that is taken for a number and its unit as a whole."""

_DELIMITED = re.compile(r"\\[(\[]|\$|^[+-]?\d+,\d+$")
"""What math-verify reads outside of a box: LaTeX with its delimiters, and decimal commas."""
_CURRENCY = re.compile(r"\$\s*\d")


def require_math_verify() -> None:
    """Raises a UserError where math-verify is not installed."""
    if not is_installed("math_verify"):
        raise UserError(
            "the reward `math` needs math-verify, which is not installed",
            key="task.reward",
            value="math",
            hint="Install it with: pip install 'klab[math]'",
        )


@dataclass(frozen=True, slots=True)
class Comparison:
    """Whether an answer is right, and whether that was decided by a limit: math-verify did not come to an end."""

    same: bool
    overdue: bool = False


def same_value(answer: str, completion: str) -> bool:
    """Whether the completion's answer equals the ground truth; see `compared`."""
    return compared(answer, completion).same


@lru_cache(maxsize=4096)
def compared(answer: str, completion: str) -> Comparison:
    r"""A completion's answer beside the ground truth.

    Both are what is marked (see `tasks.answers`); without a mark, the ground truth is the whole text and the
    completion's answer is the last expression that math-verify finds in it. Where the truth is a number, an expression
    that still has to be computed is no answer.
    """
    completion = without_special_tokens(completion)
    marked, given = marked_answer(answer), marked_answer(completion)
    truth = marked or Answer(answer.strip(), "text")
    wanted = numeral(truth.text) if marked or len(truth.text) <= LONGEST_TRUTH else None
    if given is not None and (tail := conclusion(completion, given)):
        given, completion = None, tail
    if given is None and wanted is not None and (bare := numeral(completion)) and bare.text == completion.strip(" \n."):
        given = Answer(bare.text, "text")
    if given is not None and given.text == truth.text:
        return Comparison(True)
    if given is not None and wanted is not None:
        if (found := _number(given)) is not None:
            return Comparison(wanted.same(found) and found.computes(wanted))
        if given.kind == "words":
            completion, given = given.text, None
    try:
        reply = _worker()(_parsed(truth), _parsed(given) if given else "", completion)
    except (CallOverdue, CallFailed):
        return Comparison(False, overdue=True)
    return Comparison(reply["score"]["correct"], bool(reply["score"]["parts"]["overdue"]))


def _number(given: Answer) -> Numeral | None:
    """The number that an answer is; of `48+24=72` the last one."""
    found = numeral(given.text)
    if found is None and "=" in given.text:
        found = numeral(given.text.rpartition("=")[2])
    return found


def _parsed(answer: Answer) -> str:
    """An answer as math-verify is to read it: in a box, unless it has LaTeX's delimiters."""
    text = answer.text
    if answer.kind != "box" and _CURRENCY.search(text) and "\\" not in text:
        text = text.replace("$", "")
    return text if answer.kind != "box" and _DELIMITED.search(text) else f"\\boxed{{{text}}}"


@cache
def _worker() -> Worker:
    return Worker(f"{__name__}:verified", CALL_SECONDS, MEMORY_GB)


class _Overdue(BaseException):
    """Not an Exception, because math-verify catches these."""


def verified(truth: str, given: str, completion: str) -> Score:
    """What the worker computes: math-verify's verdict on the marked answer, or on the whole completion where `given` is
    empty. Part `overdue`: 1 where it did not come to an end."""
    import signal

    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it warns of what it cannot decide

    def ring(*_: object) -> None:
        raise _Overdue

    signal.signal(signal.SIGPROF, ring)
    try:
        step = partial(signal.setitimer, signal.ITIMER_PROF, STEP_SECONDS)
        step()
        gold = parse(truth, parsing_timeout=None)
        step()
        found = parse(given or completion, parsing_timeout=None)
        step()
        same = is_computed(gold, found) and verify(gold, found, timeout_seconds=None)
    except _Overdue:
        return Score(0.0, False, {"overdue": 1.0})
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0.0)
    return Score(float(same), bool(same), {"overdue": 0.0})


def is_computed(gold: list[Any], found: list[Any]) -> bool:
    """Whether an answer leaves nothing to compute, where the truth is a number.

    Args:
        gold, found: what math-verify parsed: an expression, and the text it was read from.
    """
    from sympy import Integer, Number, Rational

    truth = _side(gold[0]) if gold else None
    if not isinstance(truth, Number) or not found or isinstance(found[0], str):
        return True
    written = numeral(found[-1]) if isinstance(found[-1], str) else None
    if written is not None and isinstance(truth, Rational):
        return written.computes(Numeral(Fraction(int(truth.p), int(truth.q))))
    return _is_numeral(found[0], fractions=not isinstance(truth, Integer)) and "\\binom" not in str(found[-1])


def _is_numeral(expression: Any, fractions: bool) -> bool:
    """Whether an expression of sympy is a number (or several) as opposed to an operation on numbers."""
    from sympy import FiniteSet, Integer, Mul, Pow, UnevaluatedExpr

    expression = _side(expression)
    if isinstance(expression, FiniteSet):
        return all(_is_numeral(each, fractions) for each in expression.args)
    if getattr(expression, "is_Atom", True) or getattr(expression, "free_symbols", None):
        return True
    if isinstance(expression, Mul) and len(expression.args) == 2:
        one, other = expression.args
        if isinstance(other, UnevaluatedExpr) or one == Integer(-1):  # a percentage, a negative number
            return _is_numeral(one, fractions) and (isinstance(other, UnevaluatedExpr) or _is_numeral(other, fractions))
        return (
            fractions and isinstance(one, Integer) and isinstance(other, Pow) and all(e.is_Integer for e in other.args)
        )
    return False


def _side(expression: Any) -> Any:
    """The right side of an equation, as math-verify compares `x = 5` with 5."""
    return getattr(expression, "rhs", expression) if getattr(expression, "is_Equality", False) else expression
