"""Names of scores: every spelling means one thing, and a wrong one is told with the nearest right one."""

from __future__ import annotations

import subprocess
import sys

import pytest

from klab.grid import UserError
from klab.grid.score import DEFAULT_SCORE, SCORES, parse_score, parse_scores, spellings


@pytest.mark.parametrize("name", [name for name, kind in SCORES.items() if kind.argument != "required"])
def test_a_name_is_its_own_spelling(name: str) -> None:
    score = parse_score(name)
    assert (score.name, score.kind, score.argument) == (name, name, None)
    assert score.higher is SCORES[name].higher


def test_numbers_in_parentheses() -> None:
    score = parse_score(" reward_at_kl(0.50) ")
    assert (score.name, score.kind, score.argument) == ("reward_at_kl(0.5)", "reward_at_kl", 0.5)
    assert score.title == "held-out reward at KL 0.5"
    assert parse_score("objective(5e-2)").title == "reward − 0.05·KL"
    assert parse_score("objective").argument is None


def test_a_part_of_the_reward_and_the_training_reward() -> None:
    score = parse_score("parts.my format")
    assert (score.name, score.kind, score.part) == ("parts.my format", "parts", "my format")
    assert parse_score("training_reward") == parse_score("reward_final")


def test_several_scores_are_each_there_once_in_order() -> None:
    found = parse_scores(["accuracy", "reward", "accuracy", "objective(0.1)", "objective(0.10)"])
    assert [score.name for score in found] == ["accuracy", "reward", "objective(0.1)"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("rewrad", "did you mean 'reward'"),
        ("reward(1)", "takes nothing in parentheses"),
        ("reward_at_kl", "needs a number"),
        ("reward_at_kl()", "a number of at least 0"),
        ("reward_at_kl(-1)", "a number of at least 0"),
        ("objective(nan)", "a number of at least 0"),
        ("objective(0.1", "unknown score"),
        ("parts.", "unknown score"),
        ("", "unknown score"),
    ],
)
def test_a_mistake_is_named(text: str, expected: str) -> None:
    with pytest.raises(UserError) as raised:
        parse_score(text, key="analysis.score")
    assert expected in str(raised.value)
    assert "analysis.score" in str(raised.value)


def test_no_score_at_all() -> None:
    with pytest.raises(UserError, match="names no score"):
        parse_scores([])


def test_what_is_offered_can_be_read() -> None:
    for text in spellings():
        parse_score(text)
    assert parse_score(DEFAULT_SCORE).title == "held-out reward"


def test_names_are_read_without_the_heavy_libraries() -> None:
    code = (
        "import sys, klab.grid.score; print([m for m in ('pandas', 'torch', 'numpy', 'pydantic') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
