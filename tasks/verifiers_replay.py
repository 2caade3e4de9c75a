"""Rollouts of `verifiers` whose model is a transcript: a client of the library that responds with what was written.

What stands between two turns of the policy is the environment's, written with a template. Where a turn ends is found by
asking the environment: a turn ends before a text that is what the environment answers to it. One that merely looks so,
because the policy wrote it, is part of the turn.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import verifiers

from klab.grid.errors import UserError


@dataclass(frozen=True, slots=True)
class Writing:
    """How a conversation is written.

    Attributes:
        response: template of each message of the environment between two turns, with `{role}` and `{content}`.
        opens, closes: what stands around a call of a tool.
    """

    response: str
    opens: str
    closes: str

    @property
    def head(self) -> str:
        """What every message of the environment begins with."""
        return re.split(r"\{role\}|\{content\}", self.response)[0]

    def written(self, messages: Sequence[Any]) -> str:
        """The messages of the environment as text."""
        return "".join(
            re.sub(
                r"\{(role|content)\}",
                lambda found: text_in(each.content) if found.group(1) == "content" else str(each.role),  # noqa: B023
                self.response,
            )
            for each in messages
        )

    def calls(self, turn: str) -> tuple[str, list[tuple[str, str]]]:
        """What stands before a turn's calls, and names and arguments (as JSON) of these; none where one is no JSON."""
        pattern = f"{re.escape(self.opens)}(.*?){re.escape(self.closes)}"
        try:
            asked = [json.loads(text) for text in re.findall(pattern, turn, re.DOTALL)]
            calls = [(str(each["name"]), json.dumps(each.get("arguments") or {})) for each in asked]
        except (ValueError, LookupError, TypeError, AttributeError):
            return turn, []
        return (turn.partition(self.opens)[0], calls) if calls else (turn, [])


class Replay(verifiers.Client):  # type: ignore[misc]
    """The model of one rollout.

    Args:
        transcript: everything after the prompt.
        writing: how it is written.
        several: whether there may be several turns in it.
        passed: for each turn, how many texts that look like the environment's are part of it.

    Attributes:
        due: the environment's answer to the last turn, where it goes on.
        differs: whether some turn does not end where it was taken to.
    """

    def __init__(self, transcript: str, writing: Writing, several: bool, passed: list[int]) -> None:
        super().__init__(None)
        self._transcript, self._writing, self._several, self.passed = transcript, writing, several, passed
        self._place = self._seen = self._turns = 0
        self.due: str | None = None
        self.differs = False

    async def get_response(self, prompt: Any, *_: Any, tools: Any = None, **__: Any) -> Any:
        if self._turns:
            answer = self._writing.written(prompt[self._seen :])
            if self._place == len(self._transcript):
                self.due = answer
            elif self._transcript.startswith(answer, self._place):
                self._place += len(answer)
            else:
                self.differs = True
            if self.due is not None or self.differs or self._place == len(self._transcript):
                raise verifiers.OverlongPromptError("the transcript ends here")
        self._seen = len(prompt) + 1
        return self._response(self._turn(), tools)

    @property
    def ended_early(self) -> bool:
        """Whether the rollout ended before the transcript, so that the last turn was taken to be too short."""
        return self.differs or (self._turns > 0 and self._place < len(self._transcript))

    def longer(self) -> list[int]:
        """`passed` for the next attempt."""
        return [*self.passed[: self._turns - 1], self.passed[self._turns - 1] + 1]

    def _turn(self) -> str:
        if len(self.passed) <= self._turns:
            self.passed.append(0)
        end, left = len(self._transcript), self.passed[self._turns]
        if self._several:
            found = self._place - 1
            for _ in range(left + 1):
                found = self._transcript.find(self._writing.head, found + 1)
                if found < 0:
                    break
            end = found if found >= 0 else end
        turn, self._place = self._transcript[self._place : end], end
        self._turns += 1
        return turn

    def _response(self, turn: str, tools: Any) -> Any:
        content, calls = self._writing.calls(turn) if tools else (turn, [])
        asked = [
            verifiers.ToolCall(id=f"call_{self._turns}_{number}", name=name, arguments=arguments)
            for number, (name, arguments) in enumerate(calls)
        ]
        message = verifiers.ResponseMessage(
            content=content,
            tool_calls=asked or None,
            finish_reason="tool_calls" if asked else "stop",
            is_truncated=False,
        )
        return verifiers.Response(id="klab", created=0, model="klab", message=message)

    async def _unused(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError("a transcript has no native form")

    setup_client = to_native_tool = to_native_prompt = get_native_response = _unused
    raise_from_native_response = from_native_response = close = _unused


async def replayed(environment: Any, row: Any, transcript: str, writing: Writing, several: bool) -> tuple[Any, Replay]:
    """The state after a rollout along a transcript, not scored, and its model.

    Raises:
        UserError: the environment fails.
    """
    passed: list[int] = []
    while True:
        model = Replay(transcript, writing, several, passed)
        state = await environment.rollout(row, model, "klab", {})
        error = state.get("error")
        if error is not None and not isinstance(error, verifiers.ToolError):
            problem = f"a rollout ended with {type(error).__name__}: {error.__cause__ or error}"
            raise UserError(problem, key="environment", value=type(environment).__name__)
        if not model.ended_early:
            return state, model
        passed = model.longer()


def text_in(content: Any) -> str:
    """The text of a message's content.

    Raises:
        UserError: there is something else in it.
    """
    parts = content if isinstance(content, list) else [{"type": "text", "text": content or ""}]
    kinds = sorted({str(_field(part, "type")) for part in parts} - {"text"})
    if kinds:
        raise UserError(f"a message has {', '.join(kinds)}, and prompts are text", key="environment")
    return "".join(_field(part, "text") for part in parts)


def _field(part: Any, name: str) -> Any:
    return part.get(name) if isinstance(part, dict) else getattr(part, name, None)
