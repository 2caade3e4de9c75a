"""GSM8K and MATH: rows of the published format, scored by their value; a run with them trains."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from klab.grid.errors import UserError
from klab.grid.schema.sections import load_section
from klab.tasks import Example, Score, load_task
from klab.tasks.gsm8k import Gsm8k

PROBLEMS = [
    {
        "question": f"Anna has {i} apples and buys {i} more. How many has she?",
        "answer": f"{i} + {i} = <<{i}+{i}={2 * i}>>{2 * i}\n#### {2 * i:,}",
    }
    for i in range(600, 640)
]
COMPETITION = [
    {
        "problem": f"Find $x$ if $2x = {i}$.",
        "solution": f"Thus $x = \\boxed{{\\frac{{{i}}}{{2}}}}$.",
        "level": "Level 1",
    }
    for i in range(20)
]


def task(**section: Any) -> Any:
    return load_task(load_section("task", section))


def test_gsm8k(write_rows: Callable[..., str], tmp_path: Path) -> None:
    write_rows("data/train.jsonl", *PROBLEMS[:30])
    write_rows("data/test.jsonl", *PROBLEMS[30:])
    gsm8k = task(name="gsm8k", path=str(tmp_path / "data"))
    assert (len(gsm8k.split("train")), len(gsm8k.split("held_out"))) == (30, 10)
    example = gsm8k.split("train")[0]
    assert example.prompt.startswith("Anna has 600 apples and buys 600 more. How many has she?\n")
    assert example.solution == "600 + 600 = 1200\n#### 1,200"
    for completion, correct, marked in (
        (example.solution, True, 1.0),
        ("600 twice is #### 1200.00", True, 1.0),
        ("So she has 1200 apples.", True, 0.0),
        ("#### 1201", False, 1.0),
        ("", False, 0.0),
    ):
        score = gsm8k.score(example, completion)
        assert (score.reward, score.correct) == (float(correct), correct), completion
        assert dict(score.parts) == {"math": float(correct), "format": marked}
    assert (gsm8k.alphabet, gsm8k.respond(example, "#### 1")) == (None, None)


def test_the_format_may_be_rewarded_too(write_rows: Callable[..., str]) -> None:
    path = write_rows("train.jsonl", *PROBLEMS)
    gsm8k = task(name="gsm8k", path=path, prompt="question", reward=["math", {"name": "format", "weight": 0.25}])
    example = gsm8k.split("train")[0]
    assert example.prompt == PROBLEMS[0]["question"]
    assert [gsm8k.score(example, each).reward for each in (example.solution, "#### 0", "0")] == [1.25, 0.25, 0.0]


def test_math(write_rows: Callable[..., str]) -> None:
    math = task(name="math", path=write_rows("math.jsonl", *COMPETITION))
    example = next(each for each in math.split("train") if "= 3$" in each.prompt)
    assert example.prompt.endswith("put the answer in \\boxed{}.\n")
    for completion, correct in ((r"\boxed{1.5}", True), (r"\boxed{\dfrac32}", True), (r"\boxed{3}", False)):
        assert math.score(example, completion).correct is correct


@pytest.mark.parametrize("name", ["gsm8k", "math"])
def test_without_a_network_what_was_never_downloaded_is_a_mistake(offline: None, name: str) -> None:
    with pytest.raises(UserError, match="Without a network, only datasets that were downloaded before can be read"):
        task(name=name).split("train")


def test_a_subclass_with_a_score_of_its_own_is_asked_for_it(write_rows: Callable[..., str]) -> None:
    class Short(Gsm8k):
        def score(self, example: Example, completion: str) -> Score:
            return Score(1.0 / len(completion), True)

    task = Short(write_rows("rows.jsonl", *({"question": f"{n}?", "answer": f"#### {n}"} for n in range(3))))
    examples = [task.split("train")[0]] * 2
    assert [score.reward for score in task.score_all(examples, ["ab", "abcd"])] == [0.5, 0.25]
