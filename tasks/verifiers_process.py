"""Environments of `verifiers` in the process of a `Worker`: their rows and their scores, plain data in, plain data out.

A rollout is the library's own, with a client that responds with what is to be scored (`klab.tasks.verifiers_replay`).
What the environment sees is what it sees of a server, but for token ids and usage.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import logging
import random
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from klab.grid.errors import UserError
from klab.tasks.answered import answered
from klab.tasks.values import is_text, text_of

MONITORS = ("num_turns",)
"""What the library adds to every rubric with a weight of 0: in a single turn, always 1."""

_SERVER = (
    "Its rollouts are a conversation with a server that speaks the API of OpenAI, and klab samples itself. Write its "
    "tools for task trl_environment, or give its reward functions to task file, written as TRL's; or train with the "
    "trainer of verifiers against a vLLM server."
)


class Calling:
    """What a worker calls: a function that makes an environment, and requests about what it makes.

    Args:
        function: `load_environment`, or another function that returns an environment.
    """

    batched = False

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._made: dict[str, _Environment] = {}

    def __call__(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """What one request asks for.

        Args:
            request: `arguments` of the function and `writing`, the fields of `Writing`; with `rows` (a split, the first
                row and how many), the rows from there on, each `{"messages": [[role, content], …], "columns": {…},
                "answer": …, "tools": […]}`; with `reply`, `[split, row, transcript]`, the environment's answer or None;
                with `scores`, such rows, `{"reward", "parts"}` of each; else what the environment is: `sizes` of its
                splits (`held_out` is 0 where it has no dataset for evaluation), `weights` by the names of its reward
                functions, whether these `names_differ`, whether it is `interactive` and `has_tools`.

        Returns:
            see `klab.tasks.answered`.
        """
        return answered(partial(self._found, request))

    def _found(self, request: Mapping[str, Any]) -> Any:
        key = json.dumps([request["arguments"], request["writing"]], sort_keys=True)
        if key not in self._made:
            self._made[key] = _Environment(self._function, request["arguments"], request["writing"])
        environment = self._made[key]
        if "rows" in request:
            split, first, count = request["rows"]
            return [environment.row(split, index) for index in range(first, first + count)]
        if "reply" in request:
            return environment.reply(*request["reply"])
        if "scores" in request:
            return [environment.score(*row) for row in request["scores"]]
        return environment.description()


class _Environment:
    def __init__(self, function: Callable[..., Any], arguments: Mapping[str, Any], writing: Mapping[str, str]) -> None:
        import verifiers

        from klab.tasks.verifiers_replay import Writing

        self._writing = Writing(**writing)
        _errors.listen()
        _check_arguments(function, arguments)
        _seed("environment")
        try:
            self._environment = function(**arguments)
            _check_kind(verifiers, self._environment)
            self._tables = {"train": self._environment.build_dataset()}
            self._tables["held_out"] = self._environment.build_eval_dataset()
        except UserError:
            raise
        except Exception as error:
            problem = f"the environment cannot be made: {type(error).__name__}: {error}"
            raise UserError(problem, key="environment", value=_name(function)) from error
        if not self._tables["train"]:
            problem = "has no dataset to train on"
            raise UserError(problem, key="environment", value=_name(function))
        self._interactive = not isinstance(self._environment, verifiers.SingleTurnEnv)
        always = [] if self._interactive else [(name, 0.0) for name in MONITORS]
        self._weights = [each for each in _weights(self._environment) if each not in always]
        self._loop = asyncio.new_event_loop()

    def description(self) -> dict[str, Any]:
        return {
            "sizes": {split: len(table or ()) for split, table in self._tables.items()},
            "weights": dict(self._weights),
            "names_differ": len(dict(self._weights)) == len(self._weights),
            "interactive": self._interactive,
            "has_tools": bool(self._environment.tool_defs),
        }

    def row(self, split: str, index: int) -> dict[str, Any]:
        from klab.tasks.verifiers_replay import text_in

        row = self._tables[split][index]
        prompt = row["prompt"]
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return {
            "messages": [[each["role"], text_in(each.get("content"))] for each in messages],
            "columns": {
                name: value if isinstance(value, str | int | float) else text_of(value)
                for name, value in row.items()
                if is_text(value)
            },
            "answer": text_of(row.get("answer")) or "",
            "tools": self._tools(row),
        }

    def _tools(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The tools of a row as JSON Schema has them."""
        info = row.get("info")
        info = json.loads(info) if isinstance(info, str) else info or {}
        if "tool_defs" in info:
            kind = type(self._environment).__name__
            raise UserError("gives single rows tools of their own", key="environment", value=kind, hint=_SERVER)
        fields = {"name", "description", "parameters"}
        return [each.model_dump(include=fields) for each in self._environment.tool_defs or ()]

    def reply(self, split: str, index: int, transcript: str) -> str | None:
        """The environment's answer to the last turn, None where the episode is over: asked for twice.

        Raises:
            UserError: the answers differ, so that no episode could be replayed.
        """
        first: str | None
        first, second = (self._replayed(split, index, transcript)[1].due for _ in range(2))
        if first != second:
            raise UserError(
                f"answers differently when it is asked again: {first!r}, then {second!r}",
                key="environment",
                value=type(self._environment).__name__,
                hint="Let it depend on the row and the conversation alone.",
            )
        return first

    def score(self, split: str, index: int, transcript: str) -> dict[str, Any]:
        before = _errors.count
        state, _ = self._replayed(split, index, transcript)
        self._waited(self._environment.rubric.score_rollout(state))
        self._waited(self._environment.rubric.cleanup(state))
        parts = {name: float(state["metrics"][name]) for name, _ in self._weights}
        parts["reward_errors"] = float(_errors.count - before)
        return {"reward": float(state["reward"]), "parts": parts}

    def _replayed(self, split: str, index: int, transcript: str) -> tuple[Any, Any]:
        from klab.tasks.verifiers_replay import replayed

        _seed(json.dumps([split, index]))
        row = self._tables[split][index]
        played = replayed(self._environment, row, transcript, self._writing, self._interactive)
        return self._waited(played)  # type: ignore[no-any-return]

    def _waited(self, work: Any) -> Any:
        try:
            return self._loop.run_until_complete(work)
        except (MemoryError, UserError):
            raise
        except Exception as error:
            problem = f"a rollout raised {type(error).__name__}: {error}"
            raise UserError(problem, key="environment", value=type(self._environment).__name__) from error


class _Errors(logging.Handler):
    """Counts what the library logs when a reward function raises, which is worth 0 to it, and keeps it from the log: a
    policy may write what makes functions raise by the thousand."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.count = 0

    def listen(self) -> None:
        logging.getLogger("verifiers").setLevel(logging.ERROR)
        rubrics = logging.getLogger("verifiers.rubrics")
        rubrics.handlers, rubrics.propagate = [self], False

    def emit(self, record: logging.LogRecord) -> None:
        self.count += record.getMessage().startswith("Error calling")


_errors = _Errors()


def _check_arguments(function: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
    parameters = inspect.signature(function).parameters
    if not any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
        for name in arguments:
            if name not in parameters:
                problem = f"unknown argument of {_name(function)}"
                raise UserError(problem, key="arguments", value=name, allowed=list(parameters))
    for name, each in parameters.items():
        if (
            name not in arguments
            and each.default is each.empty
            and each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL)
        ):
            raise UserError(f"{_name(function)} needs the argument {name}", key="arguments", value=dict(arguments))


def _check_kind(verifiers: Any, environment: Any) -> None:
    """Raises a UserError for everything but linear conversations that are scored one by one."""
    kind = type(environment).__name__
    if not isinstance(environment, verifiers.Environment):
        raise UserError("is no environment of verifiers", key="environment", value=kind)
    if isinstance(environment, verifiers.EnvGroup):
        raise UserError("is a group of environments", key="environment", value=kind, hint="Name one of them.")
    rubric = environment.rubric
    group = [each.__name__ for each in rubric._get_reward_funcs() if rubric._is_group_func(each)]
    for problem, wrong, hint in (
        ("has a rollout of its own", not isinstance(environment, verifiers.MultiTurnEnv), _SERVER),
        ("rewrites the conversation", _overrides(verifiers, environment, "get_prompt_messages"), _SERVER),
        ("asks a model itself", _overrides(verifiers, environment, "get_model_response"), _SERVER),
        (f"scores completions by the group, with {', '.join(group)}", bool(group), "klab scores each by itself."),
        ("scores nothing", not environment.score_rollouts, "score_rollouts is false."),
        ("has no reward function with a weight", not any(weight for _, weight in _weights(environment)), None),
    ):
        if wrong:
            raise UserError(problem, key="environment", value=kind, hint=hint)


def _overrides(verifiers: Any, environment: Any, method: str) -> bool:
    return getattr(type(environment), method, None) is not getattr(verifiers.MultiTurnEnv, method)


def _weights(environment: Any) -> list[tuple[str, float]]:
    """Names and weights of the rubric's functions."""
    names, weights = environment.rubric._get_reward_func_names(), environment.rubric._get_reward_weights()
    return [(str(name), float(weight)) for name, weight in zip(names, weights, strict=True)]


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", repr(function))


def _seed(text: str) -> None:
    """Seed the global generators: what is drawn depends on the request alone."""
    import numpy as np

    random.seed(text)
    np.random.seed(random.getrandbits(32))
