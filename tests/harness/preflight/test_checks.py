"""What is wrong with a grid is found before it trains: code, data and models, all mistakes at once."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from klab.grid import parse_grid
from klab.harness.cli.main import main
from klab.harness.preflight import Finding
from klab.harness.preflight.checks import check, prompt_lengths
from klab.harness.preflight.process import representatives
from klab.tasks import Example, SplitName
from tests.support.transformers_tokenizer import character_tokenizer

VALUES = """
from klab.harness.objective import Placement
def soft(ratio, advantage, *, tau=1.0): return ratio / tau
def half(log_ratio, mask): return 0.5 * log_ratio
def placed(*, beta=0.1): return Placement(loss=lambda phi, mask: beta * phi)
def scalar(ratio, advantage): return ratio.mean()
def broken(ratio, advantage): return ratio.no_such_method()
"""

TASK = """
from klab.tasks import Example
class Own:
    name, alphabet, max_new_tokens, interactive = "own", "0123", 2, False
    def __init__(self, fault=""): self.fault = fault
    def split(self, name): return [] if self.fault == "empty" else [Example("12", "1")]
    def score(self, example, completion): return 1 / 0 if self.fault == "raises" else 1.0
    def respond(self, example, transcript): return None
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "values.py").write_text(VALUES)
    (tmp_path / "own.py").write_text(TASK)
    rows = [{"question": f"{i}+1", "answer": str(i + 1)} for i in range(40)]
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def found(folder: Path, **settings: Any) -> list[Finding]:
    training = {"prompts": 2, "evaluation_prompts": 2}
    grid = {"name": "mine", "task": {"name": "addition"}, "policy": {"name": "tiny"}, "training": training, **settings}
    cells = parse_grid(json.dumps(grid), folder / "mine.yaml").cells
    found = check(representatives(cells), folder / "mine.yaml")
    return [each for each in found if isinstance(each, Finding)]


def mistakes(folder: Path, **settings: Any) -> list[str]:
    return [finding.text for finding in found(folder, **settings) if finding.is_mistake]


def test_a_grid_without_mistakes_has_no_findings(folder: Path) -> None:
    weights = ["ppo_clip", "./values.py:soft"]
    assert found(folder, axes={"weight": weights, "placement": ["loss", "./values.py:placed"]}) == []


@pytest.mark.parametrize(
    ("axis", "value", "said"),
    [
        ("weight", "./values.py:sofd", "weight: './values.py' has no 'sofd'"),
        ("weight", "./nothing.py:soft", "weight: there is no file"),
        ("weight", "nothing:soft", "weight: there is no module 'nothing'"),
        ("weight", {"name": "./values.py:soft", "tua": 1.0}, "did you mean 'tau'"),
        ("placement", "./values.py:soft", "placement: cannot be called"),
        ("placement", "./values.py:half", "placement: cannot be called"),
        ("weight", "./values.py:placed", "weight: cannot be called"),
        ("weight", "./values.py:scalar", "weight: returns a tensor []"),
        ("weight", "./values.py:broken", "weight: ./values.py:broken raised AttributeError"),
    ],
)
def test_a_value_that_cannot_be_used_is_named(folder: Path, axis: str, value: object, said: str) -> None:
    (line,) = mistakes(folder, objective={axis: value, "weight": "one"} if axis != "weight" else {axis: value})
    assert line.startswith(f"{folder / 'mine.yaml'}: ")
    assert said in line
    assert "\n" not in line


def test_the_line_that_raised_is_named(folder: Path) -> None:
    (line,) = mistakes(folder, objective={"weight": "./values.py:broken"})
    assert line.endswith("values.py:7)")


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ({"name": "own:Own", "fault": "empty"}, "the split 'train' is empty"),
        ({"name": "own:Own", "fault": "raises"}, "task: own:Own raised ZeroDivisionError"),
        ({"name": "own:Own"}, "score returns a float"),
        ({"name": "own:Own", "falt": ""}, "falt"),
        ({"name": "file", "path": "sums.json", "prompt": "question", "answer": "answer"}, "no such file"),
        ({"name": "file", "path": "sums.jsonl", "prompt": "qestion", "answer": "answer"}, "no such column"),
        (
            {"name": "file", "path": "sums.jsonl", "prompt": "question", "reward": {"model": "./nowhere"}},
            "no such folder",
        ),
    ],
)
def test_a_task_that_cannot_be_used_is_named(folder: Path, task: dict[str, Any], said: str) -> None:
    (line,) = mistakes(folder, task=task)
    assert said in line


def test_all_mistakes_are_said_at_once(folder: Path) -> None:
    lines = mistakes(
        folder,
        axes={"weight": ["./values.py:scalar", "./values.py:broken", "nothing:soft"]},
        task={"name": "own:Own", "fault": "empty"},
        policy={"name": "hf", "model": "./nowhere"},
    )
    assert len(lines) == 5


def test_sets_that_are_smaller_than_what_is_asked_are_noted(folder: Path) -> None:
    task = {"name": "file", "path": "sums.jsonl", "prompt": "question", "answer": "answer", "alphabet": "0123456789+"}
    assert ["reference solutions" in line for line in mistakes(folder, task=task)] == [True]
    task["solution"] = "answer"
    notes = found(folder, task=task, training={"prompts": 64, "evaluation_prompts": 640})
    assert [note.is_mistake for note in notes] == [False, False]
    assert "evaluation_prompts: 640, but" in notes[0].text
    assert "prompts: 64, but there are" in notes[1].text


def test_a_policy_that_is_compared_with_itself_is_noted(folder: Path) -> None:
    rules = ["rollout", {"update_every": 1}, {"update_every": 2}]
    cells = [{"training.reference": rule} for rule in rules] + [{"training.reference": "rollout", "training.lag": 1}]
    for cell, noted in zip(cells, (True, True, False, False), strict=True):
        notes = [each.text for each in found(folder, design="list", cells=[cell]) if not each.is_mistake]
        assert any("the policy is compared with itself" in note for note in notes) == noted


def test_an_estimator_of_ones_own_that_asks_for_late_logits_of_the_reference(folder: Path) -> None:
    (folder / "own_estimator.py").write_text(
        "def whole(log_ratio, logits_reference): return log_ratio * logits_reference.mean()\n"
    )
    training = {"prompts": 2, "evaluation_prompts": 2, "updates_per_rollout": 2, "reference": {"update_every": 3}}
    objective = {"estimator": "./own_estimator.py:whole"}
    (said,) = mistakes(folder, training=training, objective=objective)
    assert "training.reference.update_every" in said
    assert "a multiple of 2" in said
    assert not mistakes(folder, training={**training, "reference": {"update_every": 4}}, objective=objective)


def test_a_model_and_its_prompts(folder: Path, digits: Path) -> None:
    task = {"name": "file", "path": "sums.jsonl", "prompt": "question", "answer": "answer"}
    policy = {"name": "hf", "model": str(digits)}
    assert mistakes(folder, task=task, policy=policy, training={"max_new_tokens": 4, "evaluation_prompts": 2}) == []
    (line,) = mistakes(folder, task=task, policy=policy, training={"max_new_tokens": 100_000, "evaluation_prompts": 2})
    assert "exceed the model's context" in line
    assert "policy.chat_template" in mistakes(folder, task=task, policy={**policy, "chat_template": "always"})[0]
    (digits_without := folder / "start").mkdir()
    for file in digits.iterdir():
        if "tokenizer" not in file.name:
            (digits_without / file.name).write_bytes(file.read_bytes())
    assert "tokenizer" in mistakes(folder, task=task, policy={"name": "hf", "model": str(digits_without)})[0]


def test_a_revision_of_a_folder_is_refused_as_it_is_when_training_starts(folder: Path, digits: Path) -> None:
    policy = {"name": "hf", "model": str(digits), "revision": "main"}
    (line,) = mistakes(folder, policy=policy)
    assert "policy.revision: a folder has no revisions" in line


def test_commands_say_all_mistakes_and_end_with_code_2(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid = {"name": "mine", "task": {"name": "addition"}, "policy": {"name": "tiny"}}
    grid |= {"axes": {"weight": ["./values.py:scalar", "./values.py:broken"]}, "track": ["wandb", "tensorboard"]}
    (folder / "mine.yaml").write_text(json.dumps(grid))
    for words in (["plan"], ["launch", "--dry-run"], ["launch"]):
        assert main([words[0], "mine.yaml", *words[1:]]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert all(line.startswith("klab: ") for line in lines)
        assert sum("values.py" in line for line in lines) == 2
    assert not (folder / "runs").exists()
    (folder / "mine.yaml").write_text(json.dumps({**grid, "track": []}))
    assert main(["plan", "mine.yaml", "--no-check"]) == 0
    assert "2 cells" in capsys.readouterr().out


class Drawn(Sequence[Example]):
    """Ten million prompts that are drawn when they are asked for; the later, the longer."""

    def __init__(self) -> None:
        self.asked = 0

    def __len__(self) -> int:
        return 10**7

    def __getitem__(self, index: Any) -> Any:
        self.asked += 1
        return Example("1" * (1 + index * 9 // 10**7), "")


class Counting:
    """A task whose prompts a rule draws."""

    name, alphabet, max_new_tokens, interactive = "counting", "0123456789", 4, False

    def __init__(self) -> None:
        self.prompts = Drawn()

    def split(self, name: SplitName) -> Sequence[Example]:
        return self.prompts

    def score(self, example: Example, completion: str) -> float:
        return 0.0

    def respond(self, example: Example, transcript: str) -> None:
        return None


def test_of_prompts_that_are_drawn_some_are_measured() -> None:
    task = Counting()
    lengths = [length for _, length in prompt_lengths(task, character_tokenizer("0123456789"), None)]
    assert max(lengths) == 9
    assert task.prompts.asked == 2 * 1024
