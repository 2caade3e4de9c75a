"""Answers of a `Worker`'s process that are plain data: what was found, or a mistake of the user's in the question."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from klab.grid.errors import UserError


def answered(work: Callable[[], Any]) -> dict[str, Any]:
    """In the worker's process: `{"found": …}` for what the work returns, `{"mistake": …}` with the fields of a
    UserError that it raises, whose key is relative to the task."""
    try:
        return {"found": work()}
    except UserError as error:
        about = {"problem": error.problem, "key": error.key, "allowed": list(error.allowed), "hint": error.hint}
        return {"mistake": {**about, **({"value": error.value} if error.has_value else {})}}


def found_in(reply: Mapping[str, Any]) -> Any:
    """In the task's process: what was found, from the reply of a worker that is `plain`.

    Raises:
        UserError: the mistake.
    """
    answer = reply["plain"]
    if "mistake" in answer:
        mistake = dict(answer["mistake"])
        raise UserError(mistake.pop("problem"), **mistake).with_location(prefix="task")
    return answer["found"]
