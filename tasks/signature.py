"""How a reward function is called: what it asks for by the names of its parameters.

Either one completion at a time, with any of `prompt, completion, answer, example` (a mapping of all columns) and
columns by name, or all at once as TRL does, `f(prompts, completions, **columns)`, returning one value per completion,
None for one that the function has nothing to say of. Either may be asynchronous; with `messages`, prompts and
completions are lists of chat messages, as TRL gives them for conversational datasets.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

SIGNATURES = (
    "f(prompt, completion, answer, example, …), any of these and of the dataset's columns by name, for a number or a "
    "tasks.Score; or f(prompts, completions, **columns) for a list of numbers, None where it does not apply"
)

_ONE, _ALL = ("prompt", "completion", "answer", "example"), ("prompts", "completions", "answers")


_OF_THE_TRAINER = ("completion_ids", "trainer_state", "environments")
"""What TRL's trainer gives reward functions besides, and klab has not: it rewards texts."""


def _unheard(*_: object) -> None:
    """`log_extra` and `log_metric` of TRL: klab records the parts of a `tasks.Score` instead."""


class Unfit(TypeError):
    """A function that cannot be called as a reward; the message says why, and how rewards are called."""

    def __init__(self, problem: str) -> None:
        super().__init__(f"{problem}; a reward function is {SIGNATURES}")


class Calling:
    """A user's function and the arguments it takes.

    Args:
        messages: prompts and completions are given as lists of one chat message.

    Raises:
        Unfit: none of its parameters is one of a reward function's, or it has both kinds.
    """

    def __init__(self, function: Callable[..., Any], messages: bool = False) -> None:
        self.function, self.messages = function, messages
        try:
            parameters = list(inspect.signature(function).parameters.values())
        except (TypeError, ValueError):  # a builtin without a signature
            parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_ONLY) for name in _ONE[:3]]
        self.parameters = [each for each in parameters if each.kind is not inspect.Parameter.VAR_POSITIONAL]
        names = {each.name for each in self.parameters if each.kind is not inspect.Parameter.VAR_KEYWORD}
        self.takes_all = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in self.parameters)
        one, many = names & set(_ONE[:2]), names & set(_ALL)
        if one and many:
            raise Unfit(f"takes both {sorted(one)[0]} and {sorted(many)[0]}")
        if not self.takes_all and not names & {*_ONE, *_ALL}:
            raise Unfit(f"takes ({', '.join(each.name for each in parameters)})")
        self.batched = bool(many)

    def __call__(
        self,
        prompts: Sequence[str],
        completions: Sequence[str],
        answers: Sequence[str],
        rows: Sequence[Mapping[str, Any]],
    ) -> list[Any]:
        """The function's values for some completions, in order.

        Args:
            answers: the ground truths as text.
            rows: all columns of each completion's example.

        Raises:
            Unfit: it asks for something that there is not, or returns something else than a list of as many values.
        """
        if self.messages:
            prompts = [[{"role": "user", "content": text}] for text in prompts]  # type: ignore[misc]
            completions = [[{"role": "assistant", "content": text}] for text in completions]  # type: ignore[misc]
        if not self.batched:
            each = zip(prompts, completions, answers, rows, strict=True)
            return [self._called({**row, **dict(zip(_ONE, (*texts, row), strict=True))}) for *texts, row in each]
        names = dict.fromkeys(name for row in rows for name in row)
        columns = {name: [row.get(name) for row in rows] for name in names}
        given = {"log_extra": _unheard, "log_metric": _unheard, "answer": list(answers), **columns}
        given.pop("prompt", None)
        given.pop("completion", None)
        found = self._called({**given, **dict(zip(_ALL, map(list, (prompts, completions, answers)), strict=True))})
        if isinstance(found, (str, bytes, Mapping)) or not isinstance(found, Iterable):
            raise Unfit(f"returned {type(found).__name__} for {len(completions)} completions")
        values = list(found)
        if len(values) != len(completions):
            raise Unfit(f"returned {len(values)} values for {len(completions)} completions")
        return values

    def _called(self, available: Mapping[str, Any]) -> Any:
        positional, named = [], {}
        for each in self.parameters:
            if each.kind is inspect.Parameter.VAR_KEYWORD:
                taken = {parameter.name for parameter in self.parameters}
                named.update({name: value for name, value in available.items() if name not in taken})
            elif each.name in available:
                if each.kind is inspect.Parameter.POSITIONAL_ONLY:
                    positional.append(available[each.name])
                else:
                    named[each.name] = available[each.name]
            elif each.default is inspect.Parameter.empty:
                if each.name in _OF_THE_TRAINER:
                    raise Unfit(f"asks for {each.name!r}, which only TRL's trainer has")
                known = (*_ONE, *_ALL, "log_extra", "log_metric")
                columns = sorted(name for name in available if name not in known)
                raise Unfit(f"asks for {each.name!r}, and the columns are {', '.join(columns) or 'none'}")
            elif each.kind is inspect.Parameter.POSITIONAL_ONLY:
                positional.append(each.default)
        found = self.function(*positional, **named)
        return asyncio.run(_awaited(found)) if inspect.isawaitable(found) else found


async def _awaited(found: Any) -> Any:
    return await found


class MessageCalling(Calling):
    """As `Calling`, for functions that take chat messages."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function, messages=True)
