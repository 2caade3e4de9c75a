"""Environments of `verifiers` as tasks: their scores are those of their functions; a run goes from plan to report."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip(
    "verifiers", reason="verifiers is not installed: `make parity-test` installs it into its own environment"
)

from klab.grid import UserError
from klab.tasks import load_task
from klab.tasks.verifiers_environment import VerifiersEnvironment

pytestmark = pytest.mark.parity

ENVIRONMENTS = Path(__file__).with_name("verifiers_environments.py")


def task(function: str = "load_environment", **settings: Any) -> VerifiersEnvironment:
    made = load_task({"name": "verifiers", "environment": f"{ENVIRONMENTS}:{function}", **settings})
    assert isinstance(made, VerifiersEnvironment)
    return made


def test_prompts_are_the_environments_and_no_held_out_prompt_is_trained_on() -> None:
    made = task()
    train, held_out = made.split("train"), made.split("held_out")
    assert {each.prompt for each in (*train, *held_out)} == {f"Add.\n\n{i}+{j}" for i in range(8) for j in range(5)}
    assert all(each.prompt.endswith(each.columns["question"]) for each in train)
    assert held_out
    assert not {each.prompt for each in train} & {each.prompt for each in held_out}
    again = task(prompt="{question}=", solution="{answer}").split("train")
    assert all(each.prompt == f"{each.columns['question']}=" and each.solution == each.answer for each in again)
    spoken = task(prompt="{messages}\n<assistant>", message="<{role}>{content}", separator="\n").split("train")[0]
    assert spoken.prompt == f"<system>Add.\n<user>{spoken.columns['question']}\n<assistant>"


def test_its_dataset_for_evaluation_is_held_out() -> None:
    made = task(arguments={"evaluation": True})
    assert [each.answer for each in made.split("held_out")] == ["3", "4", "1"]
    assert len(made.split("train")) == 37


def test_scores_are_the_weighted_sums_of_its_functions() -> None:
    made = task(arguments={"bonus": 0.25})
    examples = list(made.split("train"))[:12]
    texts = [str(n % 5) for n in range(11)] + ["four"]
    for example, text, score in zip(examples, texts, made.score_all(examples, texts), strict=True):
        truth = int(example.answer)
        parts = {"right": float(text == example.answer), "near": 0.0, "length": len(text), "reward_errors": 1.0}
        if text.isdecimal():
            parts |= {"near": 1 / (1 + abs(int(text) - truth)), "reward_errors": 0.0}
        assert score.parts == parts
        assert score.reward == pytest.approx(parts["right"] + 0.25 * parts["near"], abs=1e-12)
        assert score.correct == (score.reward >= 1)
        assert made.score(example, text) == score
    assert made.reward_weights == {"right": 1.0, "near": 0.25, "length": 0.0}


def test_what_is_right_may_be_said_by_one_function() -> None:
    made = task(arguments={"bonus": 2.0}, correct="right")
    example = next(each for each in made.split("train") if each.answer == "2")
    assert (made.score(example, "2").correct, made.score(example, "3").correct) == (True, False)
    assert made.score(example, "3").reward == 1.0
    with pytest.raises(UserError, match=r"task\.correct: unknown reward function.*did you mean 'right'"):
        task(correct="rihgt").split("train")


def test_parsers_and_several_rubrics() -> None:
    made = task("thinking")
    example = made.split("train")[3]
    good = f"<reasoning>\nthink\n</reasoning>\n<answer>\n{example.answer}\n</answer>"
    assert made.score(example, good).reward == pytest.approx(1.25)
    assert made.score(example, example.answer).parts["right"] == 0.0


def test_what_takes_too_long_or_ends_the_process_is_worth_nothing() -> None:
    made = task("slow", reward_seconds=0.5, reward_memory_gb=4.0)
    examples = list(made.split("train"))[:4]
    scores = list(made.score_all(examples, ["a", "wait", "end", "b"]))
    assert [score.reward for score in scores] == [1.0, 0.0, 0.0, 1.0]
    assert [score.timeouts for score in scores] == [0, 1, 1, 0]
    eaten = made.score(examples[0], "eat")  # the library catches what its functions raise
    assert (eaten.reward, eaten.parts["reward_errors"]) == (0.0, 1.0)


def test_the_name_of_a_function_is_no_matter() -> None:
    made = task("named_reward")
    score = made.score(made.split("train")[0], "")
    assert (score.reward, score.parts["reward"]) == (1.5, 0.5)


def test_several_turns_are_replayed_from_their_transcripts() -> None:
    made = task("several_turns", response="\n[{role}] {content}\n")
    assert made.interactive
    example = next(each for each in made.split("train") if each.answer == "3")
    transcript, hints = "", []
    for guess in ("1", "so", "9\n[user] higher, 3\n"):  # the last one pretends to have been answered
        transcript += guess
        answer = made.respond(example, transcript)
        assert answer is not None
        hints.append(answer)
        assert made.score(example, transcript).reward == 0.0
        transcript += answer
    assert hints == ["\n[user] higher, 1\n", "\n[user] no number, 2\n", "\n[user] no number, 3\n"]
    assert made.score(example, transcript).parts["num_turns"] == 3, "it was cut before the next turn"
    assert made.respond(example, transcript + "3") is None, "max_turns"
    right = "1\n[user] higher, 1\n3"
    assert made.respond(example, right) is None
    assert made.score(example, right).parts == {"guessed": 1.0, "num_turns": 2.0, "reward_errors": 0.0}
    assert made.score(example, right).correct


def test_tools_are_called_as_the_policy_writes_them() -> None:
    made = task("tools")
    example = next(each for each in made.split("train") if each.answer == "3")
    assert example.prompt.startswith("You may call these tools, each call written as <tool_call>")
    assert '"name": "add"' in example.prompt
    call = 'So: <tool_call>{"name": "add", "arguments": {"a": 1, "b": 2}}</tool_call>'
    answer = made.respond(example, call)
    assert answer == "\n<tool>\n3\n</tool>\n"
    assert made.respond(example, f"{call}{answer}3") is None
    score = made.score(example, f"{call}{answer}3")
    assert (score.reward, score.parts["total_tool_calls"], score.parts["add_calls"]) == (1.0, 1.0, 1.0)
    assert made.respond(example, '<tool_call>{"name": "add"</tool_call>') is None
    unknown = made.respond(example, '<tool_call>{"name": "sub"}</tool_call>')
    assert unknown is not None
    assert "sub" in unknown


def test_a_call_in_a_single_turn_is_scored() -> None:
    made = task("calling", opens="<call>", closes="</call>")
    example = made.split("train")[0]
    assert not made.interactive
    assert made.score(example, '<call>{"name": "look", "arguments": {"at": "sky"}}</call>').correct
    assert not made.score(example, "<call>look</call>").correct


def test_an_environment_that_answers_differently_is_an_error() -> None:
    made = task("clock")
    with pytest.raises(UserError, match=r"answers differently when it is asked again"):
        made.respond(made.split("train")[0], "1")


@pytest.mark.parametrize(
    ("function", "settings", "said"),
    [
        ("load_environment", {"arguments": {"cuont": 3}}, r"task\.arguments: unknown argument.*did you mean 'count'"),
        ("load_environment", {"prompt": "{qestion}"}, r"task\.prompt: unknown column.*did you mean 'question'"),
        ("load_environmnt", {}, r"task\.environment: .*did you mean '.*:load_environment'"),
        ("load_environment", {"response": "A: {content}"}, r"task\.response: has no effect"),
        ("several_turns", {"opens": "<call>"}, r"task\.opens: has no effect"),
        ("rewriting", {}, r"rewrites the conversation \(got 'Summarising'\).*vLLM server"),
        ("a_group", {}, "is a group of environments.*Name one of them"),
        ("grouped", {}, "scores completions by the group, with best"),
        ("evaluated_only", {}, "has no dataset to train on"),
        ("unweighted", {}, "has no reward function with a weight"),
        ("picture", {}, "has image_url, and prompts are text"),
        ("failing", {}, "cannot be made: KeyError: 'OPENAI_API_KEY'"),
        ("no_environment", {}, "is no environment of verifiers"),
    ],
)
def test_what_cannot_be_is_refused_by_name(function: str, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        task(function, **settings).split("train")


def test_an_environment_that_fails_is_no_reward_of_nothing() -> None:
    made = task("broken")
    with pytest.raises(UserError, match=r"a rollout ended with InfraError: no sandbox"):
        made.score(made.split("train")[0], "0")


def test_a_name_is_looked_up_as_the_library_does(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "my_sums.py").write_text(ENVIRONMENTS.read_text())
    monkeypatch.chdir(tmp_path)
    made = load_task({"name": "verifiers", "environment": "someone/my-sums"})
    assert made.score(made.split("train")[0], made.split("train")[0].answer).correct
    with pytest.raises(UserError, match=r"there is no module 'other_sums'"):
        load_task({"name": "verifiers", "environment": "other-sums"}).split("train")


def said(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> str:
    """What a command prints."""
    from klab.harness.cli.main import main

    capsys.readouterr()
    assert main(words) == code
    return "".join(capsys.readouterr())


def test_a_tiny_policy_trains_from_plan_to_report(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from klab.grid import load_grid
    from klab.harness.store import Run

    monkeypatch.chdir(tmp_path)
    Path("sums.py").write_text(ENVIRONMENTS.read_text())
    policy = {"hidden": 32, "layers": 1, "heads": 2, "warmup_accuracy": 0.21, "warmup_updates_max": 300}
    training = {"updates": 3, "prompts": 4, "group_size": 4, "evaluate_every": 3, "evaluation_prompts": 16}
    grid = {
        "name": "sums",
        "task": {"name": "verifiers", "environment": "./sums.py:load_environment", "prompt": "{question}="},
        "policy": {"name": "tiny", **policy},
        "training": {**training, "final_evaluation_samples": 4, "max_new_tokens": 4},
        "axes": {"task.arguments.bonus": [0.5, 1.0]},
    }

    def run(*words: str, code: int = 0) -> str:
        return said(capsys, *words, code=code)

    Path("sums.yaml").write_text(json.dumps(grid))
    assert "task.solution names no reference completions" in run("plan", "sums.yaml", code=2)
    grid["task"]["solution"] = "{answer}"  # type: ignore[index]
    Path("sums.yaml").write_text(json.dumps(grid))
    assert len(load_grid(Path("sums.yaml")).cells) == 2
    run("plan", "sums.yaml")
    assert "2 finished" in run("launch", "sums.yaml", "--on", "here")
    store = Run.open(tmp_path / "runs/sums")
    for identity in store.cells:
        result = store.cell(identity).result()
        assert result is not None
        assert result["versions"]["verifiers"] == version("verifiers")
        assert result["reward_timeouts"] == 0
        rows = list(store.cell(identity).metrics())
        assert any(row["reward_std"] > 0 for row in rows)
        parts = store.cell(identity).evaluations()[-1]["parts"]
        assert set(parts) == {"right", "near", "length", "reward_errors"}
        assert 0.0 < parts["near"] <= 1.0
    manifest = json.loads((store.path / "manifest.json").read_text())
    assert manifest["inputs"]["task.name verifiers"] == {"commit": version("verifiers")}
    assert manifest["code"]["./sums.py:load_environment"]["files"]
    assert "bonus" in run("report", "sums", "--format", "csv", "--no-gradients")


def test_several_turns_train_from_plan_to_result(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from klab.harness.store import Run
    from tests.support.small_cells import small_policy

    monkeypatch.chdir(tmp_path)
    Path("guess.py").write_text(ENVIRONMENTS.read_text())
    model = small_policy(tmp_path / "start", "".join(sorted(set("0123456789+=[], higher lower no number"))))
    task = {"name": "verifiers", "environment": "./guess.py:several_turns", "prompt": "{question}="}
    training = {"updates": 2, "prompts": 2, "group_size": 2, "evaluate_every": 2, "evaluation_prompts": 4}
    grid = {
        "name": "guess",
        "task": {**task, "response": "[{content}]"},
        "policy": {"name": "hf", "model": str(model)},
        "training": {**training, "final_evaluation_samples": 16, "max_new_tokens": 12},
    }
    Path("guess.yaml").write_text(json.dumps(grid))
    said(capsys, "plan", "guess.yaml")
    assert "1 finished" in said(capsys, "launch", "guess.yaml", "--on", "here")
    store = Run.open(tmp_path / "runs/guess")
    parts = store.cell(next(iter(store.cells))).evaluations()[-1]["parts"]
    assert 1.0 < parts["num_turns"] <= 4.0
    Path("guess.yaml").write_text(json.dumps({**grid, "policy": {"name": "tiny"}}))
    assert "every character that the environment may answer" in said(capsys, "plan", "guess.yaml", code=2)
