"""Tasks are found by name or import path; what cannot be found is named."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from klab.grid.errors import UserError
from klab.grid.schema.sections import AdditionTask, CountdownTask, CustomTask
from klab.tasks import Example, Score, Task, load_task
from klab.tasks.addition import Addition
from klab.tasks.countdown import Countdown


class Copying:
    """A user's own task."""

    alphabet, max_new_tokens = "ab", 3

    def __init__(self, length: int = 1) -> None:
        self.name, self.length = "copying", length

    def split(self, name: str) -> Sequence[Example]:
        return [Example("a" * self.length, "a")]

    def score(self, example: Example, completion: str) -> Score:
        return Score(1.0, True)

    def respond(self, example: Example, transcript: str) -> str | None:
        return None


def test_sections_give_their_tasks() -> None:
    addition = load_task(AdditionTask(digits=3))
    assert isinstance(addition, Addition)
    assert addition.digits == 3
    countdown = load_task(CountdownTask(numbers=4, target_max=50))
    assert isinstance(countdown, Countdown)
    assert (countdown.numbers, countdown.target_max) == (4, 50)
    assert isinstance(load_task(SimpleNamespace(name="addition", digits=1)), Task)
    assert isinstance(load_task({"name": "addition"}), Task)


def test_an_import_path_gives_a_users_task() -> None:
    task = load_task(CustomTask.model_validate({"name": "tests.tasks.test_load_task:Copying", "length": 2}))
    assert task.split("train")[0].prompt == "aa"


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"name": "adition"}, "did you mean 'addition'"),
        ({"name": "addition", "numbers": 3}, "numbers"),
        ({"name": "no_such_module:Task"}, "there is no module 'no_such_module'"),
        ({"name": "tests.tasks.test_load_task:Copyin"}, "did you mean 'tests.tasks.test_load_task:Copying'"),
        ({"name": "tests.tasks.test_load_task:Copying", "size": 1}, "size"),
        ({"name": "types:SimpleNamespace"}, "it lacks"),
    ],
)
def test_mistakes_are_named(section: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_task(section)
