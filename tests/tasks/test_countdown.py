"""Countdown: every problem is solvable, rewards follow from the expression's value and the numbers that it uses."""

from __future__ import annotations

import pytest

from klab.grid.errors import UserError
from klab.tasks.countdown import Countdown
from klab.tasks.task import Example


@pytest.mark.parametrize(("numbers", "largest", "target_max"), [(2, 9, 81), (3, 9, 30), (5, 25, 200)])
def test_reference_solutions_are_correct_and_fit_the_budget(numbers: int, largest: int, target_max: int) -> None:
    task = Countdown(numbers, largest, target_max)
    for example in [*task.split("train")[:150], *task.split("held_out")[:50]]:
        score = task.score(example, example.solution)
        assert score.correct
        assert score.reward == 1.0
        assert 1 <= int(example.answer) <= target_max
        assert len(example.solution) + 1 <= task.max_new_tokens
        assert set(example.prompt + example.solution) <= set(task.alphabet)
        assert len(example.prompt.split(":")[0].split(",")) == numbers


@pytest.mark.parametrize(
    ("completion", "reward", "valid"),
    [
        ("5*3+7", 1.0, 1.0),
        ("7+3*5", 1.0, 1.0),
        ("(3*5)+7", 1.0, 1.0),
        ("3*7+1", 0.0, 0.0),  # 1 is not given
        ("5*5-3", 0.0, 0.0),  # 5 is used twice
        ("3*7", 0.0, 1.0),
        ("22", 0.0, 0.0),
        ("5*3+", 0.0, 0.0),
        ("", 0.0, 0.0),
        ("__import__('os')", 0.0, 0.0),
    ],
)
def test_reward_needs_the_value_and_each_number_at_most_once(completion: str, reward: float, valid: float) -> None:
    score = Countdown().score(Example("3,5,7:22=", "22"), completion)
    assert (score.reward, score.correct, score.parts["valid"]) == (reward, reward == 1.0, valid)


def test_a_number_given_twice_may_be_used_twice() -> None:
    assert Countdown().score(Example("4,4,2:16=", "16"), "4*4").correct


def test_splits_are_disjoint_up_to_the_order_of_the_numbers() -> None:
    task = Countdown(2, 9, 30)

    def problems(split: str) -> set[tuple[tuple[str, ...], str]]:
        examples = task.split(split)[:1000]  # type: ignore[arg-type]
        return {(tuple(sorted(e.prompt.split(":")[0].split(","))), e.answer) for e in examples}

    assert not problems("train") & problems("held_out")
    assert task.split("train")[7] == Countdown(2, 9, 30).split("train")[7]


def test_sizes_that_cannot_work_are_mistakes() -> None:
    for arguments in ((1, 9, 30), (7, 9, 30), (3, 1, 30), (3, 9, 0)):
        with pytest.raises(UserError, match=r"task\."):
            Countdown(*arguments)
