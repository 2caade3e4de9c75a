"""Addition: exact match, least significant digit first, splits that share nothing."""

from __future__ import annotations

import pytest

from klab.grid.errors import UserError
from klab.tasks.addition import Addition


@pytest.mark.parametrize("digits", [1, 2, 5, 40])
def test_prompts_answers_and_budget(digits: int) -> None:
    task = Addition(digits)
    for example in [*task.split("train")[:200], *task.split("held_out")[:5]]:
        first, second = example.prompt.removesuffix("=").split("+")
        assert len(first) == len(second) == digits
        assert int(example.answer[::-1]) == int(first) + int(second)
        assert example.solution == example.answer
        assert len(example.solution) + 1 <= task.max_new_tokens
        assert set(example.prompt + example.solution) <= set(task.alphabet)


@pytest.mark.parametrize("digits", [2, 15])
def test_summands_may_begin_with_their_least_significant_digit_too(digits: int) -> None:
    usual, least = Addition(digits), Addition(digits, prompt_order="least")
    for place in range(50):
        one, other = usual.split("held_out")[place], least.split("held_out")[place]
        assert other.prompt == "+".join(number[::-1] for number in one.prompt.rstrip("=").split("+")) + "="
        assert (other.answer, other.solution) == (one.answer, one.solution)
    with pytest.raises(UserError, match=r"task\.prompt_order"):
        Addition(2, prompt_order="middle")


def test_reward_is_exact_match() -> None:
    task = Addition(2)
    example = next(e for e in task.split("train") if e.prompt == "41+48=")
    assert example.answer == "98"
    assert task.score(example, "98").reward == 1.0
    assert task.score(example, "98").correct
    for wrong in ("89", "980", "9", "", " 98", "98="):
        assert task.score(example, wrong).reward == 0.0
        assert not task.score(example, wrong).correct
    assert task.respond(example, "98") is None


def test_two_digit_splits_hold_every_sum_once_and_share_no_pair() -> None:
    task = Addition(2)
    parts = {name: [e.prompt for e in task.split(name)] for name in ("train", "held_out")}
    assert len(parts["train"]) + len(parts["held_out"]) == 90 * 90
    assert len({*parts["train"], *parts["held_out"]}) == 90 * 90
    assert 0.05 < len(parts["held_out"]) / 8100 < 0.15
    pairs = {name: {frozenset(p.rstrip("=").split("+")) for p in prompts} for name, prompts in parts.items()}
    assert not pairs["train"] & pairs["held_out"]
    assert parts["train"] != sorted(parts["train"])


def test_splits_never_change() -> None:
    assert [e.prompt for e in Addition(2).split("train")[:3]] == ["41+48=", "72+85=", "97+61="]
    assert [e.prompt for e in Addition(2).split("held_out")[:3]] == ["54+36=", "12+42=", "25+64="]
    assert Addition(4).split("train")[123_456] == Addition(4).split("train")[123_456]


def test_large_splits_are_lazy_and_disjoint() -> None:
    task = Addition(9)
    train, held_out = task.split("train"), task.split("held_out")
    assert len(train) == 1_000_000
    assert train[-1] == train[999_999]
    assert [train[i] for i in (5, 6)] == list(train[5:7])
    assert not {e.prompt for e in train[:500]} & {e.prompt for e in held_out[:500]}
    with pytest.raises(IndexError):
        train[1_000_000]


@pytest.mark.parametrize("digits", [0, 41])
def test_a_size_that_cannot_work_is_a_mistake(digits: int) -> None:
    with pytest.raises(UserError, match=r"task\.digits"):
        Addition(digits)
