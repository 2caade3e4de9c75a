"""A task that is learned in seconds from random weights; rewards and objectives that misbehave on demand."""

from __future__ import annotations

from itertools import product
from typing import ClassVar, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from klab.harness.objective import Returns
from klab.tasks import Example, Score

LETTERS = "abcd"


def rank() -> int:
    """Which of several processes this is; 0 for one alone."""
    return dist.get_rank() if dist.is_initialized() else 0


class Letters:
    """Prompt: three letters. Reward: the share of the four tokens that repeat the prompt's first letter.

    Args:
        fail_at: the reward raises for completions that begin with this letter.
        reward: what to give instead of the share, as text ("nan", "inf").
        fail_rank: the reward raises in this process of several.
    """

    name = "letters"
    alphabet = LETTERS
    max_new_tokens = 4
    interactive = False

    def __init__(self, fail_at: str = "", reward: str = "", fail_rank: int = -1) -> None:
        self.fail_at, self.instead, self.fail_rank = fail_at, reward, fail_rank

    def split(self, name: Literal["train", "held_out"]) -> list[Example]:
        words = ["".join(letters) for letters in product(LETTERS, repeat=3)]
        chosen = words[::4] if name == "held_out" else [word for i, word in enumerate(words) if i % 4]
        return [Example(word, word[0]) for word in chosen]

    def score(self, example: Example, completion: str) -> Score:
        if (self.fail_at and completion.startswith(self.fail_at)) or rank() == self.fail_rank:
            raise RuntimeError("the reward is broken")
        share = completion.count(example.answer) / 4
        return Score(float(self.instead) if self.instead else share, share >= 0.5, {"length": float(len(completion))})

    def respond(self, example: Example, transcript: str) -> str | None:
        return None


class Answering(Letters):
    """It might answer what the policy writes, and never does."""

    interactive = True


class Overdue(Letters):
    """A limit of time decides the reward of every completion that begins with an `a`; prompts with an `a` or `b` in
    their middle have a part `early`, which is 1."""

    has_reward_timeouts = True
    overdue = 0
    """How many such completions were scored in this process."""

    def score(self, example: Example, completion: str) -> Score:
        plain = super().score(example, completion)
        parts = {**plain.parts, **({"early": 1.0} if example.prompt[1] in "ab" else {})}
        Overdue.overdue += completion.startswith("a")
        return Score(plain.reward, plain.correct, parts, timeouts=int(completion.startswith("a")))


class Ragged(Letters):
    """Prompts of one to three letters."""

    def split(self, name: Literal["train", "held_out"]) -> list[Example]:
        words = [example.prompt[: 1 + index % 3] for index, example in enumerate(super().split(name))]
        return [Example(word, word[0]) for word in dict.fromkeys(words)]


class Echo(Letters):
    """The environment repeats what the policy wrote, until it has written twice."""

    interactive = True
    max_new_tokens = 6

    def respond(self, example: Example, transcript: str) -> str | None:
        return None if len(transcript) > 3 else transcript + "a"


def gentle(ratio: Tensor, advantage: Tensor, *, scale: float = 1.0) -> Tensor:
    """A custom weight: scale·ρ/(1 + ρ)."""
    return scale * ratio / (1 + ratio)


def broken(ratio: Tensor, advantage: Tensor) -> Tensor:
    """A custom weight that raises."""
    raise ZeroDivisionError("the weight is broken")


def hungry(ratio: Tensor, advantage: Tensor, *, process: float = 0.0) -> Tensor:
    """A custom weight for which 8 rows are too many in one of several processes."""
    if len(ratio) == 8 and rank() == process:
        raise MemoryError("nothing left")
    return ratio


def picky(ratio: Tensor, advantage: Tensor, *, process: float = 0.0) -> Tensor:
    """A custom weight that refuses 8 rows in one of several processes."""
    if len(ratio) == 8 and rank() == process:
        raise ValueError("not 8 rows")
    return ratio


def torn(ratio: Tensor, advantage: Tensor, *, process: float = 0.0) -> Tensor:
    """A custom weight of which one of several processes has another opinion, about 16 rows."""
    return ratio * float("inf") if len(ratio) == 16 and rank() == process else ratio


def exploding(ratio: Tensor, advantage: Tensor) -> Tensor:
    """A custom weight that is infinite."""
    return ratio * float("inf")


class Word(Letters):
    """One prompt, two tokens; the reward is that of the letters at their places."""

    max_new_tokens = 2
    worth = ({"a": 0.5, "b": 0.1}, {"a": 0.2, "c": 0.4, "d": -0.3})

    def split(self, name: Literal["train", "held_out"]) -> list[Example]:
        return [Example("abc", "ac")]

    def score(self, example: Example, completion: str) -> Score:
        letters = zip(self.worth, completion, strict=False)
        return Score(sum(worth.get(letter, 0.0) for worth, letter in letters), completion == example.answer)


def nothing(returns: Returns) -> Tensor:
    """A custom advantage of zero: only a critic learns."""
    return torch.zeros_like(returns.returns)


def starving(ratio: Tensor, advantage: Tensor) -> Tensor:
    """A custom weight for which memory never suffices."""
    raise MemoryError("nothing left")


class TwoTerms(Letters):
    """Repeats of the letter, and half a point for a completion without an `a`; prompts that begin with `b` lack the
    second term."""

    reward_weights: ClassVar = {"repeats": 1.0, "tidy": 0.5}

    def score(self, example: Example, completion: str) -> Score:
        parts = {"repeats": completion.count(example.answer) / 4}
        if example.answer != "b":
            parts["tidy"] = float("a" not in completion)
        total = sum(self.reward_weights[name] * value for name, value in parts.items())
        return Score(total, parts["repeats"] >= 0.5, parts)


def whole_distribution(log_ratio: Tensor, logits: Tensor, logits_reference: Tensor) -> Tensor:
    """An estimator that reads the distributions of policy and reference over the whole vocabulary."""
    p, q = logits.log_softmax(-1), logits_reference.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)
