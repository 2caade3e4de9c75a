"""Environments as TRL has them (`environment_factory`): a class with `reset`, tools as its methods, and `get_reward`.

TRL keeps one instance per rollout. klab's tasks know nothing but an example and a transcript, from which an episode is
made anew wherever it goes on or is scored: the same calls, in the same order, on a new instance. Environments must
therefore answer the same when they are asked the same; one that does not is an error.
"""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from klab.grid import user_code
from klab.grid.errors import UserError
from klab.tasks.file import File
from klab.tasks.task import Example, Score

_OWN = ("reset", "get_reward")


class TrlEnvironment(File):
    """A dataset whose prompts are asked in an environment of the user's own.

    A turn of the policy that ends with `opens{"name": …, "arguments": {…}}closes` is a call; the environment answers
    with `response`, and any other end of a turn ends the episode. The reward is the environment's `get_reward()`, where
    it has one, plus the terms of `reward`; right is what `get_reward` gives at least 1, or what the terms say.

    Args:
        environment: `package.module:Class` or `./file.py:Class`, called without arguments.
        calls: most calls of an episode.
        opens, closes: what stands around a call.
        response: the answer to a call, with `{response}`.
        describe: whether the prompt begins with the tools' signatures and docstrings.
        reward: terms beside the environment's own; None: none.
        more: those of `klab.tasks.file.File`.

    Raises:
        UserError: the class has no `reset` or no tools, or there is neither `get_reward` nor a term.
    """

    name = "trl_environment"
    interactive = True
    scores_transcripts = True

    def __init__(
        self,
        environment: str,
        calls: int,
        opens: str,
        closes: str,
        response: str,
        describe: bool = True,
        reward: object = None,
        **more: Any,
    ) -> None:
        self._factory = user_code.load(environment, "task.environment")
        methods = dict(inspect.getmembers(self._factory, predicate=inspect.isfunction))
        self._tools = sorted(name for name in methods if name not in _OWN and not name.startswith("_"))
        self._owns_reward = "get_reward" in methods
        for problem, wrong in (
            ("has no method reset", "reset" not in methods),
            ("has no tools: methods with public names", not self._tools),
            ("has no method get_reward, and there is no task.reward", not self._owns_reward and not reward),
        ):
            if wrong:
                raise UserError(problem, key="task.environment", value=environment)
        super().__init__(reward=reward or "format", **more)
        self._has_terms = bool(reward)
        if not self._has_terms:
            self.has_reward_timeouts, self.reward_weights = False, {}
        self._environment, self._calls = environment, calls
        self._opens, self._closes, self._response = opens, closes, response
        self._head = response.partition("{response}")[0]
        self._description = self._described(methods) if describe else ""

    def respond(self, example: Example, transcript: str) -> str | None:
        return self._replayed(example, transcript)[1]

    def score(self, example: Example, completion: str) -> Score:
        return next(self.score_all([example], [completion]))

    def score_all(self, examples: Sequence[Example], completions: Sequence[str]) -> Iterator[Score]:
        """The scores of many episodes, in order."""
        terms = iter(self._rewards.score_all(examples, completions)) if self._has_terms else None
        for example, completion in zip(examples, completions, strict=True):
            found = Score(0.0, True) if terms is None else next(terms)
            if self._owns_reward:
                own = float(_finished(self._replayed(example, completion)[0].get_reward()))
                parts = {**found.parts, self._environment.rpartition(":")[2]: own}
                found = Score(found.reward + own, found.correct and own >= 1.0, parts, found.timeouts)
            yield found

    def _example(self, row: Mapping[str, Any], number: int, path: str) -> Example:
        plain = super()._example(row, number, path)
        columns = {**row, "prompt": plain.prompt}
        observation = _finished(self._factory().reset(**columns))
        if observation is not None and not isinstance(observation, str):
            problem = f"reset returned {type(observation).__name__}, and prompts are text"
            raise UserError(problem, key="task.environment", value=self._environment)
        prompt = f"{self._description}{plain.prompt}{observation or ''}"
        return Example(prompt, plain.answer, plain.solution, columns)

    def _replayed(self, example: Example, transcript: str) -> tuple[Any, str | None]:
        """The environment after the calls of an episode, and its answer to the last one where that is due."""
        instance = self._factory()
        _finished(instance.reset(**example.columns))
        place, answered = 0, 0
        while (start := transcript.find(self._opens, place)) >= 0:
            end = transcript.find(self._closes, start + len(self._opens))
            if end < 0 or answered >= self._calls:
                break
            call, rest = transcript[start + len(self._opens) : end], transcript[end + len(self._closes) :]
            due = not rest.strip()
            if not due and not rest.lstrip().startswith(self._head.lstrip()):
                place = end + len(self._closes)  # the turn did not end there
                continue
            answer = self._response.replace("{response}", self._called(instance, call))
            if due:
                return instance, answer
            answered += 1
            blanks = len(rest) - len(rest.lstrip()) - (len(self._head) - len(self._head.lstrip()))
            if not rest[max(0, blanks) :].startswith(answer):
                raise UserError(
                    f"answers differently when it is asked again: {answer!r}, before {rest[: len(answer)]!r}",
                    key="task.environment",
                    value=self._environment,
                    hint="Let reset and the tools depend on their arguments alone.",
                )
            place = end + len(self._closes) + max(0, blanks) + len(answer)
        return instance, None

    def _called(self, instance: Any, call: str) -> str:
        """What a tool answers, as text; `{'error': …}` as TRL has it where there is none, or where it raises."""
        try:
            asked = json.loads(call)
            name, arguments = asked["name"], asked.get("arguments") or {}
            if name not in self._tools:
                raise LookupError(f"no tool {name!r}; there are {', '.join(self._tools)}")
            return str(_finished(getattr(instance, name)(**arguments)))
        except Exception as error:
            return str({"error": str(error)})

    def _described(self, methods: Mapping[str, Any]) -> str:
        lines = [f"You may call these tools, each call written as {self._opens}"]
        lines[0] += f'{{"name": "tool", "arguments": {{}}}}{self._closes}:'
        for name in self._tools:
            parameters = [str(each) for each in inspect.signature(methods[name]).parameters.values()][1:]
            text = " ".join((inspect.getdoc(methods[name]) or "").split())
            lines.append(f"{name}({', '.join(parameters)}): {text}")
        return "\n".join(lines) + "\n\n"


def _finished(found: Any) -> Any:
    """A value, also of an asynchronous method."""
    if not inspect.isawaitable(found):
        return found

    async def wait() -> Any:
        return await found

    return asyncio.run(wait())
