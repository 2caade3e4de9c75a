"""Whether a completion gives the right mathematical answer: plain numbers here, everything else by math-verify.

math-verify (Kydlíček, https://github.com/huggingface/Math-Verify) parses LaTeX and expressions with sympy, which may
take any time and memory on what a policy writes, and limits itself with a signal that belongs to the trainer. So it
runs in a worker; what it cannot decide in time is wrong.
"""

from __future__ import annotations

import logging
from functools import cache, lru_cache
from importlib.util import find_spec

from klab.grid.errors import UserError
from klab.tasks.answers import final_answer, number
from klab.tasks.worker import CallFailed, CallOverdue, Worker

STEP_SECONDS = 5
"""Limit of math-verify for each step (parsing, comparing)."""

CALL_SECONDS, MEMORY_GB = 30.0, 4.0


def require_math_verify() -> None:
    """Raises UserError where math-verify is not installed."""
    if find_spec("math_verify") is None:
        raise UserError(
            "the reward `math` needs math-verify, which is not installed",
            key="task.reward",
            value="math",
            hint="Install it with: pip install 'klab[math]'",
        )


@lru_cache(maxsize=4096)
def same_value(answer: str, completion: str) -> bool:
    r"""Whether the completion's answer equals the ground truth.

    Both are taken from their last `#### …` or `\boxed{…}`; without a mark, the ground truth is the whole text and the
    completion's answer is the last expression that math-verify finds in it.
    """
    truth, given = final_answer(answer) or answer.strip(), final_answer(completion)
    if given is not None:
        if given == truth:
            return True
        values = number(truth), number(given)
        if None not in values:
            return values[0] == values[1]
    try:
        return bool(_worker()(truth, given or "", completion)["number"])
    except (CallOverdue, CallFailed):
        return False


@cache
def _worker() -> Worker:
    return Worker("klab.tasks.verification:verified", CALL_SECONDS, MEMORY_GB)


def verified(truth: str, given: str, completion: str) -> bool:
    """What the worker computes: math-verify's verdict on the marked answer, or on the whole completion."""
    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns of every expression that it cannot decide
    gold = parse(f"\\boxed{{{truth}}}", parsing_timeout=STEP_SECONDS)
    found = parse(f"\\boxed{{{given}}}" if given else completion, parsing_timeout=STEP_SECONDS)
    return bool(verify(gold, found, timeout_seconds=STEP_SECONDS))
