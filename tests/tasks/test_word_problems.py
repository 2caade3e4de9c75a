"""Word problems: stories that add up, working that fits the budget, splits that share no story."""

from __future__ import annotations

import re

import pytest

from klab.grid.errors import UserError
from klab.tasks.word_problems import WordProblems


@pytest.mark.parametrize(("steps", "largest"), [(1, 5), (1, 20), (3, 99), (6, 99)])
def test_a_solution_follows_from_its_story_and_earns_the_reward(steps: int, largest: int) -> None:
    task = WordProblems(steps, largest)
    for example in [*task.split("train")[:100], *task.split("held_out")[:20]]:
        first, *changes, _ = re.split(r"(?<=[.?]) ", example.prompt)
        total = int(re.findall(r"\d+", first)[0])
        assert len(changes) == steps
        for change in changes:
            size = int(re.findall(r"\d+", change)[0])
            assert 2 <= size <= largest
            total += -size if re.search("gives|loses|sells|sends|drops", change) else size
        assert total >= 0
        assert example.answer == str(total)
        sums = re.findall(r"(\d+) ([+-]) (\d+) = (\d+)", example.solution)
        assert [int(a) + int(sign + b) for a, sign, b, _ in sums] == [int(c) for *_, c in sums]
        assert len(example.solution) + 1 <= task.max_new_tokens
        assert set(example.prompt + example.solution) <= set(task.alphabet)
        assert task.score(example, example.solution).correct
    assert len(set(task.alphabet)) == len(task.alphabet)


def test_only_the_marked_answer_counts() -> None:
    task = WordProblems()
    example = task.split("train")[0]
    assert task.score(example, f"#### {example.answer}").reward == 1.0
    wrong = task.score(example, f"{example.answer} #### {int(example.answer) + 1}")
    assert (wrong.reward, wrong.correct, wrong.parts) == (0.0, False, {"format": 1.0})
    unmarked = task.score(example, example.answer)
    assert (unmarked.reward, unmarked.parts) == (0.0, {"format": 0.0})
    assert task.respond(example, "") is None


def test_splits_never_change_and_share_no_story() -> None:
    task = WordProblems()
    train, held_out = task.split("train"), task.split("held_out")
    assert train[7] == WordProblems().split("train")[7]
    assert train[0].prompt != WordProblems(2).split("train")[0].prompt
    assert not {each.prompt for each in train[:3000]} & {each.prompt for each in held_out[:3000]}


@pytest.mark.parametrize(("key", "value"), [("steps", 0), ("steps", 7), ("largest", 4), ("largest", 100)])
def test_a_size_that_cannot_work_is_a_mistake(key: str, value: int) -> None:
    with pytest.raises(UserError, match=rf"task\.{key}"):
        WordProblems(**{key: value})
