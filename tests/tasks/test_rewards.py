"""Rewards are sums of weighted terms; a user's function can do no harm but fail, with a message."""

from __future__ import annotations

import os
import select
import signal
import subprocess
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
    rewards = Rewards(f"{MODULE}:sleepy", seconds=3.0)
    assert [rewards.score(EXAMPLE, "").reward for _ in range(2)] == [1.0, 2.0]
    with pytest.raises(UserError, match=r"no answer within 3 s.*task\.reward_seconds"):
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
        (f"{MODULE}:shar", "did you mean '.*:share'"),
        (f"{MODULE}:not_a_function", "not a function"),
        ("tests.tasks.no_such:share", "there is no module 'tests.tasks.no_such'"),
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
    idle, busy = worker("sleepy"), worker("sleepy")
    for each in (idle, busy):
        each("", "", "")
    busy._send([["", "sleep", ""]])
    for each in (idle, busy):
        process = each._process
        process.stdin.close()  # what happens when this process ends
        assert process.wait(600) in (0, -signal.SIGKILL)


def test_a_function_that_holds_the_interpreter_dies_with_the_trainer(tmp_path: Path) -> None:
    told = tmp_path / "told"
    os.mkfifo(told)
    code = f"""
from klab.tasks import Example
from klab.tasks.rewards import Rewards
Rewards({MODULE + ":backtracking"!r}, seconds=3600).score(Example({str(told)!r}, ""), "")
"""
    trainer = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[2])
    try:
        function = os.pidfd_open(int(told.read_text()))
    finally:
        trainer.send_signal(signal.SIGKILL)
        trainer.wait()
    poll = select.poll()
    poll.register(function, select.POLLIN)
    ended = poll.poll(60_000)
    os.close(function)
    assert ended


def test_memory_is_limited() -> None:
    rewards = Rewards(f"{MODULE}:hungry", memory_gb=1.0)
    with pytest.raises(UserError, match=r"more than 1 GB of memory.*raise task\.reward_memory_gb"):
        rewards.score(EXAMPLE, "2")
    assert rewards.score(EXAMPLE, "0").reward == 0.0
    with pytest.raises(UserError, match=r"more than 8 GB of memory"):
        Rewards(f"{MODULE}:hungry").score(EXAMPLE, "9")


GRADED = [
    Example(f"{n}+1=", str(n + 1), columns={"difficulty": level, "day": "2024-01-02", "answer": str(n + 1)})
    for n, level in enumerate((3, None, 5))
]


def test_a_function_of_trl_gets_columns_and_says_what_is_not_its_own() -> None:
    rewards = Rewards([f"{MODULE}:graded", {"name": f"{MODULE}:lengths", "weight": 0.5}])
    scores = list(rewards.score_all(GRADED, ["1", "2", "x"]))
    assert [score.reward for score in scores] == [3.5, 0.5, 0.5]
    assert [dict(score.parts) for score in scores] == [
        {"graded": 3.0, "lengths": 1.0},
        {"lengths": 1.0},
        {"graded": 0.0, "lengths": 1.0},
    ]
    assert [rewards.score(*pair).reward for pair in zip(GRADED, ["1", "2", "x"], strict=True)] == [3.5, 0.5, 0.5]


def test_a_completion_without_any_value_is_a_mistake() -> None:
    with pytest.raises(UserError, match=r"every term returned None.*never"):
        Rewards(f"{MODULE}:never").score(EXAMPLE, "")
    assert Rewards([f"{MODULE}:never", "exact"]).score(EXAMPLE, "2").parts == {"exact": 1.0}


def test_a_function_asks_for_what_it_needs_by_name() -> None:
    assert Rewards(f"{MODULE}:columns").score(GRADED[0], "ab").reward == 3 + 3 + 2 + 1
    assert Rewards(f"{MODULE}:whatever").score(GRADED[0], "").reward == 5.0  # prompt, answer, example, difficulty, day
    with pytest.raises(UserError, match=r"asks for 'dificulty', and the columns are day, difficulty; a reward"):
        Rewards(f"{MODULE}:missing").score(GRADED[0], "")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("unrelated", r"takes \(p, c, a\); a reward function is f\(prompt, completion, answer, example, …\)"),
        ("both", r"takes both completion and completions; .*f\(prompts, completions, \*\*columns\)"),
    ],
)
def test_a_signature_that_fits_nothing_is_named_at_the_start(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Rewards(f"{MODULE}:{name}")


@pytest.mark.parametrize(
    ("name", "message"),
    [("short", "returned 1 values for 2 completions"), ("alone", "returned float for 2 completions")],
)
def test_a_batch_has_a_value_for_each(name: str, message: str) -> None:
    with pytest.raises(UserError, match=rf"task\.reward: {message}.*None where it does not apply"):
        list(Rewards(f"{MODULE}:{name}").score_all([EXAMPLE] * 2, ["", ""]))


def test_functions_of_trl_may_be_asynchronous_and_take_messages() -> None:
    spoken = {"name": f"{MODULE}:spoken", "weight": 2.0, "messages": True}
    rewards = Rewards([f"{MODULE}:awaited", spoken, f"{MODULE}:graded"])
    scores = list(rewards.score_all(GRADED, ["1", "2", "x"]))
    assert [score.reward for score in scores] == [8.0, 2.0, 5.0]
    assert [dict(score.parts) for score in scores] == [
        {"awaited": 3.0, "spoken": 1.0, "graded": 3.0},
        {"spoken": 1.0},
        {"awaited": 5.0, "spoken": 0.0, "graded": 0.0},
    ]


def test_what_only_trls_trainer_has_is_said() -> None:
    with pytest.raises(UserError, match="asks for 'trainer_state', which only TRL's trainer has"):
        Rewards(f"{MODULE}:stateful").score(EXAMPLE, "")
    with pytest.raises(UserError, match=r"task\.reward\.messages: only functions of your own"):
        Rewards({"name": "exact", "messages": True})


def test_a_reward_function_of_trl_itself() -> None:
    from trl.rewards import think_format_reward

    texts = ["<think>so</think>\n1", "1"]
    own = think_format_reward([[{"role": "assistant", "content": text}] for text in texts])
    rewards = Rewards({"name": "trl.rewards:think_format_reward", "messages": True}, seconds=60.0)
    assert [score.reward for score in rewards.score_all([EXAMPLE] * 2, texts)] == own == [1.0, 0.0]
