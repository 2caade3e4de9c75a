"""Strings with a graded reward: known exactly, in the middle at first, and dearer the more a string repeats itself."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from klab.grid.errors import UserError
from klab.grid.schema.sections import load_section
from klab.tasks import Example, load_task
from klab.tasks.strings import CORRECT_SHARE, PROMPT, SOLUTIONS, Strings

EXAMPLE = Example(PROMPT, "")


def plain(task: Strings, **weights: float) -> Strings:
    """The task with these weights of symbols, and none of pairs."""
    task.weights = {letter: weights.get(letter, 0.0) for letter in task.letters}
    task.pair_weights = dict.fromkeys(task.pair_weights, 0.0)
    return task


def logit(reward: float) -> float:
    return math.log(reward / (1 - reward))


def test_the_reward_by_hand() -> None:
    task = plain(Strings(symbols=2, length=4, repetition=3.0), a=1.0, b=-0.5)
    task.pair_weights |= {"ab": 0.25}
    reward = task.score(EXAMPLE, "abaa").reward
    concentration = (3 / 4) ** 2 + (1 / 4) ** 2
    assert logit(reward) == pytest.approx(2.5 / 2 + 0.25 / math.sqrt(3) - 3.0 * concentration**2)


def test_a_string_of_one_symbol_pays_all_of_the_cost() -> None:
    costs = [logit(plain(Strings(4, 8, cost)).score(EXAMPLE, "cccccccc").reward) for cost in (0.0, 5.0)]
    assert costs == pytest.approx([0.0, -5.0])
    assert 0 < plain(Strings(4, 8, 1e9)).score(EXAMPLE, "cccccccc").reward < 1e-300
    even = plain(Strings(4, 8, 5.0)).score(EXAMPLE, "abcdabcd").reward
    assert logit(even) == pytest.approx(-5.0 / 16)


@given(st.text(alphabet="abcd?z", max_size=7))
def test_anything_but_a_string_of_that_length_is_worth_nothing(text: str) -> None:
    score = Strings(symbols=4, length=6).score(EXAMPLE, text)
    fits = len(text) == 6 and set(text) <= set("abcd")
    assert 0 < score.reward < 1 if fits else (score.reward, score.correct) == (0, False)


def test_the_seed_draws_weights_that_say_nothing_on_average() -> None:
    one, other = (load_task(load_section("task", {"name": "strings", "seed": seed})) for seed in (0, 1))
    assert one.weights != other.weights  # type: ignore[attr-defined]
    assert one.weights == Strings().weights  # type: ignore[attr-defined]
    for weights in (Strings().weights, Strings().pair_weights):
        assert sum(weights.values()) == pytest.approx(0, abs=1e-12)


def test_random_strings_are_in_the_middle_and_so_many_of_them_correct() -> None:
    task = Strings()
    scores = [task.score(example, example.solution) for example in task.split("train")]
    assert sum(score.correct for score in scores) == int(CORRECT_SHARE * SOLUTIONS) + 1
    mean = sum(score.reward for score in scores) / SOLUTIONS
    assert 0.2 < mean < 0.6
    assert max(score.reward for score in scores) > 0.9


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"symbols": 1}, r"task\.symbols"),
        ({"length": 1}, r"task\.length"),
        ({"repetition": -1}, r"task\.repetition"),
        ({"lenght": 9}, "did you mean 'length'"),
    ],
)
def test_strings_that_cannot_be(section: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_section("task", {"name": "strings", **section})
    if "lenght" not in section:
        with pytest.raises(UserError, match=message):
            Strings(**section)
