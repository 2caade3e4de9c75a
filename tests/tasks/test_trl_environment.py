"""Environments written for TRL: calls are answered, episodes are replayed, and the environment owns the reward."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from klab.grid import UserError, load_grid
from klab.harness.policy.sampling.sampler import TranscribingEnvironment
from klab.harness.store import Run
from klab.harness.training import run_cells
from klab.harness.training.data.generate import environment_of
from klab.tasks import Example, load_task
from klab.tasks.trl_environment import TrlEnvironment
from tests.support.small_cells import small_policy

MODULE = "tests.tasks.counting_environments"
SETTINGS = {"calls": 3, "opens": "<", "closes": ">", "response": "={response};"}


@pytest.fixture
def make(write_rows: Callable[..., str]) -> Callable[..., TrlEnvironment]:
    def task(name: str = "Counter", **more: Any) -> TrlEnvironment:
        path = write_rows("goals.jsonl", *({"question": f"reach {goal}", "goal": goal} for goal in range(3, 23)))
        data = {"path": path, "prompt": "question", **SETTINGS, **more}
        made = load_task({"name": "trl_environment", "environment": f"{MODULE}:{name}", **data})
        assert isinstance(made, TrlEnvironment)
        return made

    return task


def call(name: str, **arguments: int) -> str:
    return f"<{json.dumps({'name': name, 'arguments': arguments})}>"


def example(task: TrlEnvironment, goal: int) -> Example:
    every = [*task.split("train"), *task.split("held_out")]
    return next(each for each in every if each.columns["goal"] == goal)


def test_an_episode_is_what_its_transcript_says(make: Callable[..., TrlEnvironment]) -> None:
    task = make()
    asked = example(task, 5)
    assert asked.prompt.endswith("reach 5 (from 0)")
    assert "add(amount: 'int'): Add an amount to the count." in asked.prompt
    assert "_hidden" not in asked.prompt
    first = call("add", amount=7)
    assert task.respond(asked, first) == "=7;"
    second = f"{first}=7;so {call('take', amount=2)}"
    assert task.respond(asked, second) == "=5;"
    assert task.respond(asked, f"{second}=5;done") is None
    assert (done := task.score(asked, f"{second}=5;done")).correct
    assert (done.reward, done.parts) == (1.0, {"Counter": 1.0})
    assert task.score(asked, f"{first}=7;").reward == 0.25
    assert task.score(asked, f"{first} and on").reward == 0.25, "no call: the turn did not end there"
    other = example(task, 7)
    assert task.score(other, f"{first}=7;").reward == 1.0, "episodes share nothing"


def test_calls_that_cannot_be_are_answered_and_limited(make: Callable[..., TrlEnvironment]) -> None:
    task = make(calls=1)
    asked = example(task, 3)
    for wrong, said in (("<nonsense>", "error"), (call("fly"), "no tool 'fly'"), (call("_hidden"), "no tool")):
        assert said in str(task.respond(asked, wrong))
    assert "unexpected keyword" in str(task.respond(asked, call("add", much=1)))
    one = f"{call('add', amount=1)}=1;"
    assert task.respond(asked, one + call("add", amount=2)) is None
    assert task.score(asked, one + call("add", amount=2)).reward == 0.25


def test_an_environment_that_answers_otherwise_is_an_error(make: Callable[..., TrlEnvironment]) -> None:
    task = make("Fickle")
    asked = example(task, 3)
    turn = call("add", amount=1)
    answer = task.respond(asked, turn)
    with pytest.raises(UserError, match="answers differently when it is asked again"):
        task.score(asked, f"{turn}{answer}")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Toolless", "has no tools"),
        ("Unrewarded", r"no method get_reward, and there is no task\.reward"),
        ("Countr", r"task\.environment: .*has no 'Countr'.*did you mean"),
    ],
)
def test_what_is_no_environment_is_named(make: Callable[..., TrlEnvironment], name: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        make(name)


def test_in_training_it_scores_transcripts(make: Callable[..., TrlEnvironment]) -> None:
    asked = environment_of([SimpleNamespace(task=make())], [[]], 1, [0])  # type: ignore[list-item]
    assert isinstance(asked, TranscribingEnvironment)
    assert asked.transcribed == {0}, "calls are found by their answers"


def test_a_cell_trains_in_it_with_a_term_beside_and_its_code_is_recorded(
    write_rows: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "counter.py").write_text((Path(__file__).parent / "counting_environments.py").read_text())
    path = write_rows("goals.jsonl", *({"question": f"{goal}=", "goal": goal} for goal in range(3, 23)))
    task = {"name": "trl_environment", "environment": "./counter.py:Counter", "path": path, "prompt": "question"}
    training = {"updates": 2, "prompts": 2, "group_size": 2, "max_new_tokens": 4, "evaluate_every": 2}
    grid = {
        "name": "counting",
        "task": {**task, **SETTINGS, "describe": False, "reward": {"name": "format", "weight": 0.5}},
        "policy": {"name": "hf", "model": str(small_policy(tmp_path / "start", "0123456789=<> (from)"))},
        "training": {**training, "evaluation_prompts": 2, "evaluation_samples": 1, "final_evaluation_samples": 1},
    }
    (tmp_path / "counting.yaml").write_text(json.dumps(grid))
    run = Run.create(tmp_path / "run", load_grid(tmp_path / "counting.yaml"))
    assert list(run_cells(run.path, run.cells).values()) == ["finished"]
    folder = run.cell(run.cells[0])
    assert set(folder.evaluations()[-1]["parts"]) == {"format", "Counter"}
    assert "./counter.py:Counter" in run.manifest["code"]
