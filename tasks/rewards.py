r"""Rewards made of weighted terms, each reported separately.

A term is one of

* `exact`: 1 where the completion, or its marked final answer, is the ground truth;
* `math`: 1 where its final answer has the same mathematical value (see `klab.tasks.verification`);
* `format`: 1 where the completion marks a final answer (`#### …` or `\boxed{…}`), right or wrong;
* `package.module:function`: the user's, in a process of its own, called by the names of its parameters, one completion
  at a time or all at once as in TRL, also asynchronous or of chat messages (see `tasks.signature`);
* a sequence classifier (see `klab.tasks.reward_model`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from klab.grid.errors import UserError
from klab.grid.schema.task import RewardTerm, reward_terms
from klab.tasks.answers import final_answer
from klab.tasks.signature import SIGNATURES, Calling, MessageCalling
from klab.tasks.task import Example, Score
from klab.tasks.verdict import Verdict
from klab.tasks.worker import MEMORY_GB, CallFailed, CallOverdue, Worker

Reward = Callable[[Example, str], Verdict]


@runtime_checkable
class Batched(Protocol):
    """A reward that can look at several completions at once."""

    def __call__(self, example: Example, completion: str) -> Verdict: ...

    def verdicts(self, examples: Sequence[Example], completions: Sequence[str]) -> Iterator[Verdict]:
        """The verdict on each completion, in order."""
        ...


class Rewards:
    """The weighted sum of several terms.

    Args:
        given: a term or several, as in the grid file: a name, or a mapping with `name` or `model`, and `weight`.
        seconds: limit of one call of a user's function; of one that takes all completions at once, for each of them.
        memory_gb: limit of the memory of a user's function.

    Raises:
        UserError: a term that is unknown, cannot be imported or loaded, or needs a package that is missing.
    """

    def __init__(self, given: object, seconds: float = 10.0, memory_gb: float | None = MEMORY_GB) -> None:
        terms = reward_terms(given)
        self.weights = [term.weight for term in terms]
        self.has_timeouts = any(term.name == "math" for term in terms)
        self.names = _distinct([_label(term) for term in terms])
        self.terms = [_reward(term, seconds, memory_gb) for term in terms]

    def score(self, example: Example, completion: str) -> Score:
        """Σ weight·value over the terms that have a value. Parts: each one's value without its weight, and the parts of
        scores that functions return.

        Correct means that every term that judges correctness agrees; where none does, that the reward is positive.

        Raises:
            UserError: a function that returns something else than a finite number, takes too long or too much memory,
                or a completion for which no term has a value.
            CallFailed: a function that raises or ends its process.
        """
        return next(self.score_all([example], [completion]))

    def score_all(self, examples: Sequence[Example], completions: Sequence[str]) -> Iterator[Score]:
        """The score of every completion, in order: `score`, with models that read several at a time.

        Raises:
            UserError, CallFailed: as `score`, when the guilty completion's turn comes.
        """
        columns = [
            term.verdicts(examples, completions) if isinstance(term, Batched) else map(term, examples, completions)
            for term in self.terms
        ]
        for verdicts in zip(*columns, strict=True):
            yield self._total(verdicts)

    def _total(self, verdicts: Sequence[Verdict]) -> Score:
        total, parts, judged = 0.0, {}, []
        if all(verdict.value is None for verdict in verdicts):
            raise UserError(
                "every term returned None for a completion, so it has no reward",
                key="task.reward",
                value=", ".join(self.names),
                hint="Add a term that applies to every prompt.",
            )
        for name, weight, verdict in zip(self.names, self.weights, verdicts, strict=True):
            if verdict.value is None:
                continue
            if not math.isfinite(verdict.value):
                raise UserError("a reward must be finite", key=f"task.reward.{name}", value=verdict.value)
            total += weight * verdict.value
            parts[name] = verdict.value
            parts.update({f"{name}.{part}": value for part, value in verdict.parts.items()})
            if verdict.correct is not None:
                judged.append(verdict.correct)
        timeouts = sum(verdict.timeouts for verdict in verdicts)
        return Score(total, all(judged) if judged else total > 0, parts, timeouts)


def exact(example: Example, completion: str) -> Verdict:
    """1 where the completion, or the final answer it marks, is the ground truth; spaces around do not count."""
    truth = final_answer(example.answer) or example.answer.strip()
    same = truth in (completion.strip(), final_answer(completion))
    return Verdict(float(same), same)


def mathematical(example: Example, completion: str) -> Verdict:
    """1 where the completion's final answer has the value of the ground truth."""
    from klab.tasks.verification import compared

    found = compared(example.answer, completion)
    return Verdict(float(found.same), found.same, timeouts=int(found.overdue))


def marked(example: Example, completion: str) -> Verdict:
    """1 where the completion marks a final answer."""
    return Verdict(float(final_answer(completion) is not None))


class UserFunction:
    """A function of the user's in a worker of its own, started and imported at once so that a typo shows early."""

    def __init__(self, path: str, seconds: float, memory_gb: float | None = MEMORY_GB, messages: bool = False) -> None:
        self.path = path
        calling = MessageCalling if messages else Calling
        self.worker = Worker(path, seconds, memory_gb, caller=f"{calling.__module__}:{calling.__qualname__}")
        self.worker.start()

    def __call__(self, example: Example, completion: str) -> Verdict:
        return self._called([example], [completion])[0]

    def verdicts(self, examples: Sequence[Example], completions: Sequence[str]) -> Iterator[Verdict]:
        """The verdict on each completion, in order; a function that takes one is called when it is due."""
        if self.worker.batched:
            yield from self._called(examples, completions)
        else:
            yield from map(self, examples, completions)

    def _called(self, examples: Sequence[Example], completions: Sequence[str]) -> list[Verdict]:
        try:
            reply = self.worker(
                [example.prompt for example in examples],
                list(completions),
                [example.answer for example in examples],
                [dict(example.columns) for example in examples],
                seconds=self.worker.seconds * len(completions),
            )
        except CallOverdue as error:
            raise UserError(
                f"{error}; its process was stopped",
                key="task.reward",
                value=self.path,
                hint="Make it faster, or raise task.reward_seconds.",
            ) from None
        except CallFailed as error:
            if "MemoryError" not in str(error):
                raise
            raise UserError(
                f"a call needed more than {self.worker.memory_gb:g} GB of memory",
                key="task.reward",
                value=self.path,
                hint="Make it smaller, or raise task.reward_memory_gb.",
            ) from None
        return [self._verdict(value) for value in reply["values"]]

    def _verdict(self, value: Mapping[str, Any]) -> Verdict:
        if "number" in value:
            return Verdict(value["number"])
        if "score" in value:
            score = value["score"]
            return Verdict(score["reward"], score["correct"], score["parts"])
        if value["type"] == "NoneType" and self.worker.batched:
            return Verdict(None)
        raise UserError(
            f"a reward function returned {value['type']}; it is {SIGNATURES}", key="task.reward", value=self.path
        )


def _reward(term: RewardTerm, seconds: float, memory_gb: float | None) -> Reward:
    if term.model is not None:
        from klab.tasks.reward_model import reward_model

        return reward_model(term.model)
    assert term.name is not None
    if term.name == "math":
        from klab.tasks.verification import require_math_verify

        require_math_verify()
    known: dict[str, Reward] = {"exact": exact, "math": mathematical, "format": marked}
    return known[term.name] if term.name in known else UserFunction(term.name, seconds, memory_gb, term.messages)


def _label(term: RewardTerm) -> str:
    if term.part is not None:
        return term.part
    return "model" if term.name is None else term.name.rpartition(":")[2].rpartition(".")[2]


def _distinct(names: Sequence[str]) -> list[str]:
    """Names that occur again get a number: model, model_2."""
    found: list[str] = []
    for name in names:
        times = sum(name == before for before in names[: len(found)])
        found.append(f"{name}_{times + 1}" if times else name)
    return found
