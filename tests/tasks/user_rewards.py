"""Reward functions of a user, good and bad; they run in a process of their own."""

from __future__ import annotations

import os
import re
import signal
import time
from fractions import Fraction
from typing import Any

from klab.tasks import Score

calls = 0


def share(prompt: str, completion: str, answer: str) -> float:
    """How much of the answer's length was written."""
    print("to be kept out of the protocol")
    return min(1.0, len(completion) / len(answer))


def judged(prompt: str, completion: str, answer: str) -> Score:
    return Score(0.5, completion == answer, {"prompt_length": float(len(prompt))})


def scalar(prompt: str, completion: str, answer: str) -> Any:
    return Fraction(1, 4)


def counted(prompt: str, completion: str, answer: str) -> int:
    global calls
    calls += 1
    return calls


def sleepy(prompt: str, completion: str, answer: str) -> int:
    if completion == "sleep":
        time.sleep(3600)
    return counted(prompt, completion, answer)


def broken(prompt: str, completion: str, answer: str) -> float:
    match completion:
        case "raise":
            raise KeyError("the user's own trouble")
        case "exit":
            os._exit(3)
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "interrupt":
            raise KeyboardInterrupt
    return 1.0


def odd(prompt: str, completion: str, answer: str) -> Any:
    return {"none": None, "nan": float("nan"), "text": "1.0", "list": [1.0], "score": Score("high", True)}[completion]  # type: ignore[arg-type]


def process(prompt: str, completion: str, answer: str) -> int:
    return os.getpid()


not_a_function = 3


def hanging(prompt: str, completion: str, answer: str) -> float:
    time.sleep(3600)
    return 0.0


def undefined(prompt: str, completion: str, answer: str) -> float:
    return float("nan")


def graded(prompts: list[str], completions: list[str], difficulty: list[int | None], **kwargs: Any) -> list[Any]:
    """As TRL calls it: the difficulty of right answers; nothing to say where there is none."""
    rows = zip(prompts, completions, kwargs["answer"], difficulty, strict=True)
    return [
        None if level is None else float(level * (prompt + given == prompt + answer))
        for prompt, given, answer, level in rows
    ]


def lengths(completions: list[str]) -> Any:
    import numpy as np

    return np.array([float(len(completion)) for completion in completions])


def columns(example: dict[str, Any], completion: str, day: str, *, difficulty: int = 7) -> float:
    assert example["day"] == day
    return float(example["difficulty"] + difficulty + len(completion) + isinstance(difficulty, int))


def whatever(completion: str, **kwargs: Any) -> float:
    return float(len(kwargs))


def unrelated(p: str, c: str, a: str) -> float:
    return 0.0


def both(completion: str, completions: list[str]) -> float:
    return 0.0


def short(completions: list[str]) -> list[float]:
    return [0.0]


def alone(completions: list[str], **kwargs: Any) -> float:
    return 0.0


def missing(completion: str, dificulty: int) -> float:
    return 0.0


def never(completions: list[str], **kwargs: Any) -> list[None]:
    return [None for _ in completions]


def hungry(completion: str) -> float:
    return float(len(bytearray(int(completion) * 2**30)))


def backtracking(prompt: str) -> float:
    """Tells its process to whoever reads the pipe at `prompt`, then holds the interpreter."""
    with open(prompt, "w") as pipe:
        pipe.write(str(os.getpid()))
    return float(bool(re.match(r"(a+)+b", "a" * 60)))


async def awaited(prompts: list[str], completions: list[str], log_metric: Any, **columns: Any) -> list[float | None]:
    """As TRL's asynchronous reward functions: all completions at once, None where it does not apply."""
    log_metric("seen", float(len(prompts)))
    return [None if level is None else float(level) for level in columns["difficulty"]]


def spoken(prompts: Any, completions: Any, answer: list[str], **columns: Any) -> list[float]:
    """As TRL's reward functions for conversational datasets."""
    asked = [(len(prompt), prompt[0]["role"]) for prompt in prompts]
    assert asked == [(1, "user")] * len(prompts)
    told = [(message["role"], message["content"]) for (message,) in completions]
    return [float(each == ("assistant", right)) for each, right in zip(told, answer, strict=True)]


def stateful(prompts: list[str], completions: list[str], trainer_state: Any) -> list[float]:
    return [0.0 for _ in prompts]
