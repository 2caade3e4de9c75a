"""Rewards are sums of weighted terms; a user's function can do no harm but fail, with a message."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from klab.grid.errors import UserError
from klab.tasks import Example
from klab.tasks.rewards import Rewards
from klab.tasks.worker import CallFailed, Worker

MODULE = "tests.tasks.user_rewards"
EXAMPLE = Example("1+1=", "#### 2")


@pytest.fixture
def worker() -> Iterator[Any]:
    made: list[Worker] = []

    def make(name: str, seconds: float = 60.0) -> Worker:
        made.append(Worker(f"{MODULE}:{name}", seconds))
        return made[-1]

    yield make
    for each in made:
        each.stop()


def test_terms_are_weighted_and_reported_apart() -> None:
    rewards = Rewards(["exact", {"name": "format", "weight": 0.5}, {"name": f"{MODULE}:share", "weight": -1}])
    right = rewards.score(EXAMPLE, "#### 2")
    assert (right.reward, right.correct) == (0.5, True)
    assert right.parts == {"exact": 1.0, "format": 1.0, "share": 1.0}
    marked = rewards.score(EXAMPLE, "#### 3")
    assert (marked.reward, marked.correct) == (-0.5, False)
    bare = rewards.score(EXAMPLE, "2")
    assert (bare.correct, bare.parts["format"], bare.parts["share"]) == (True, 0.0, pytest.approx(1 / 6))


def test_a_function_may_judge_correctness_and_report_parts() -> None:
    rewards = Rewards([f"{MODULE}:judged", f"{MODULE}:scalar", f"{MODULE}:scalar"])
    score = rewards.score(EXAMPLE, "#### 2")
    assert (score.reward, score.correct) == (1.0, True)
    assert score.parts == {"judged": 0.5, "judged.prompt_length": 4.0, "scalar": 0.25, "scalar_2": 0.25}
    assert not rewards.score(EXAMPLE, "2").correct


def test_without_a_judge_a_positive_reward_is_correct() -> None:
    rewards = Rewards(f"{MODULE}:share")
    assert rewards.score(EXAMPLE, "1").correct
    assert not rewards.score(EXAMPLE, "").correct


def test_an_overdue_function_is_stopped_and_the_next_call_starts_anew() -> None:
    rewards = Rewards(f"{MODULE}:sleepy", seconds=1.0)
    assert [rewards.score(EXAMPLE, "").reward for _ in range(2)] == [1.0, 2.0]
    with pytest.raises(UserError, match=r"no answer within 1 s.*task\.reward_seconds"):
        rewards.score(EXAMPLE, "sleep")
    assert rewards.score(EXAMPLE, "").reward == 1.0


@pytest.mark.parametrize(
    ("completion", "message"),
    [
        ("none", "returned NoneType"),
        ("text", "returned str"),
        ("list", "returned list"),
        ("score", "other than numbers"),
        ("nan", r"task\.reward\.odd: a reward must be finite \(got nan\)"),
    ],
)
def test_odd_values_are_mistakes(odd: Rewards, completion: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        odd.score(EXAMPLE, completion)


@pytest.fixture(scope="module")
def odd() -> Rewards:
    return Rewards(f"{MODULE}:odd")


def test_a_failing_function_says_how_and_can_be_called_again(worker: Any) -> None:
    calling = worker("broken")
    for completion, message in (
        ("raise", 'KeyError: "the user\'s own trouble"'),
        ("interrupt", "KeyboardInterrupt"),
        ("exit", "ended with exit status 3"),
        ("kill", "ended with signal SIGKILL"),
    ):
        with pytest.raises(CallFailed, match=message):
            calling("", completion, "")
    assert calling("", "", "") == {"number": 1.0}


@pytest.mark.parametrize(
    ("term", "message"),
    [
        (f"{MODULE}:shar", "did you mean 'share'"),
        (f"{MODULE}:not_a_function", "not a function"),
        ("tests.tasks.no_such:share", "no module named 'tests.tasks.no_such'"),
        ("maths", "did you mean 'math'"),
        ({"name": "exact", "wieght": 2}, "did you mean 'weight'"),
        ([], "at least one term"),
        ({"weight": 1.0}, "either a name or a model"),
        ({"name": "exact", "model": "x"}, "either a name or a model"),
    ],
)
def test_terms_that_do_not_exist_are_named(term: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Rewards(term)


def test_math_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delitem(sys.modules, "math_verify", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(UserError, match=r"pip install 'klab\[math\]'"):
        Rewards("math")


def test_an_interrupted_wait_leaves_no_late_answer(worker: Any) -> None:
    calling = worker("process")
    before = calling("", "", "")["number"]

    def ring(*_: object) -> None:
        raise TimeoutError

    slow = worker("sleepy")
    slow("", "", "")
    old = signal.signal(signal.SIGALRM, ring)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(TimeoutError):
            slow("", "sleep", "")
    finally:
        signal.signal(signal.SIGALRM, old)
    assert slow("", "", "") == {"number": 1.0}
    assert calling("", "", "")["number"] == before != os.getpid()


def test_the_process_ends_with_ours(worker: Any) -> None:
    calling = worker("sleepy")
    calling("", "", "")
    process = calling._process
    calling._send([["", "sleep", ""]])
    process.stdin.close()  # what happens when this process is killed
    assert process.wait(30) == 0
