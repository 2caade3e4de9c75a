"""A user's dataset becomes a task: files, folders, columns, templates, splits, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from klab.grid import UserError
from klab.grid.schema.sections import load_section
from klab.tasks import Example, load_task
from klab.tasks.file import File, Template

Write = Callable[..., str]
SUMS = [{"q": f"{i}+1=", "a": i + 1, "why": f"{i}+1"} for i in range(60)]


def file_task(**settings: Any) -> Any:
    return load_task(load_section("task", {"name": "file", **settings}))


def prompts(task: Any, split: str) -> list[str]:
    return [example.prompt for example in task.split(split)]


def test_a_jsonl_file_is_split_by_what_it_asks(write_rows: Write) -> None:
    task = file_task(path=write_rows("sums.jsonl", *SUMS, SUMS[0]), prompt="q", answer="a", solution="why")
    train, held_out = prompts(task, "train"), prompts(task, "held_out")
    assert sorted({*train, *held_out}) == sorted(row["q"] for row in SUMS)
    assert not set(train) & set(held_out)
    assert 1 <= len(held_out) <= 15
    assert train == sorted(train, key=lambda prompt: int(prompt[:-3])) or train[-1] == "0+1="
    example = next(each for each in task.split("train") if each.prompt == train[3])
    assert example.solution + "=" == example.prompt
    assert task.score(example, example.answer).correct
    assert isinstance(task.split("train")[1:3], list)
    grown = file_task(path=write_rows("grown.jsonl", *SUMS, {"q": "x", "a": 1, "why": ""}), prompt="q")
    assert set(held_out) <= set(prompts(grown, "held_out"))
    assert grown.split("train")[0].answer == ""


def test_parquet_folders_and_saved_datasets(write_rows: Write, tmp_path: Path) -> None:
    import datasets

    columns = {"q": [row["q"] for row in SUMS], "a": [row["a"] for row in SUMS]}
    whole = datasets.Dataset.from_dict(columns)
    whole.to_parquet(tmp_path / "sums.parquet")
    expected = prompts(file_task(path=str(tmp_path / "sums.parquet"), prompt="q", answer="a"), "held_out")
    whole.save_to_disk(tmp_path / "saved")
    assert prompts(file_task(path=str(tmp_path / "saved"), prompt="q"), "held_out") == expected
    write_rows("folder/train.jsonl", *SUMS[:9])
    write_rows("folder/test.jsonl", *SUMS[6:12])
    folder = file_task(path=str(tmp_path / "folder"), prompt="q", answer="a")
    assert prompts(folder, "held_out") == [row["q"] for row in SUMS[6:12]]
    assert prompts(folder, "train") == [row["q"] for row in SUMS[:6]]  # what is held out is not trained on
    swapped = file_task(path=str(tmp_path / "folder"), prompt="q", train="test", held_out="train")
    assert prompts(swapped, "held_out") == [row["q"] for row in SUMS[:9]]
    elsewhere = file_task(path=str(tmp_path / "sums.parquet"), prompt="q", held_out_path=str(tmp_path / "folder"))
    assert prompts(elsewhere, "held_out") == [row["q"] for row in SUMS[6:12]]
    assert len(elsewhere.split("train")) == 54


def test_templates_name_columns() -> None:
    row = {"q": "1+1", "the hint": "count"}
    assert Template("q").render(row) == "1+1"
    assert Template("Q: {q} ({the hint})\n").render(row) == "Q: 1+1 (count)\n"
    assert Template("{q} in \\boxed{} or {{q}}").render(row) == "1+1 in \\boxed{} or {q}"
    assert Template("{q}{q}").columns == ["q"]


def test_answers_that_are_no_text_become_json(write_rows: Write) -> None:
    rows = [{"q": f"q{i}", "a": {"tests": ["f(1) == 2"], "id": i}} for i in range(3)]
    task = file_task(path=write_rows("code.jsonl", *rows), prompt="q", answer="a")
    assert {example.answer for example in task.split("train")} <= {
        f'{{"tests": ["f(1) == 2"], "id": {i}}}' for i in range(3)
    }


def test_a_reward_of_ones_own_and_a_tiny_policys_alphabet(write_rows: Write) -> None:
    path = write_rows("sums.jsonl", *SUMS)
    reward = [{"name": "tests.tasks.user_rewards:share", "weight": 2}, {"name": "exact", "weight": 0}]
    task = file_task(path=path, prompt="q", answer="a", reward=reward, alphabet="0123456789+=")
    score = task.score(Example("12+1=", "13"), "1")
    assert (score.reward, score.correct, dict(score.parts)) == (1.0, False, {"share": 0.5, "exact": 0.0})
    assert len(task.split("train")) > 40


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt": "question"}, r"sums\.jsonl: task\.prompt: no such column \(got 'question'\).*Valid: a, q, why"),
        ({"prompt": "Q: {qq}"}, r"task\.prompt: no such column \(got 'qq'\); did you mean 'q'"),
        ({"answer": "answers"}, r"task\.answer: no such column \(got 'answers'\)"),
        ({"solution": "wy"}, r"task\.solution: no such column.*did you mean 'why'"),
        ({"train": "training"}, r"task\.train: no such split \(got 'training'\); did you mean 'train'"),
        ({"held_out": "test"}, r"task\.held_out: no such split"),
        ({"alphabet": "0123456789+"}, r"task\.alphabet: row 0: its prompt has characters that are not in it: '='"),
    ],
)
def test_columns_and_splits_that_do_not_exist(write_rows: Write, settings: dict[str, str], message: str) -> None:
    task = file_task(**{"path": write_rows("sums.jsonl", *SUMS[:3]), "prompt": "q", "answer": "a", **settings})
    with pytest.raises(UserError, match=message):
        task.split("train")


def test_files_that_do_not_exist(write_rows: Write, tmp_path: Path) -> None:
    write_rows("sums.jsonl", *SUMS[:3])
    for path, message in {
        str(tmp_path / "sum.jsonl"): r"task\.path: no such file or folder.*did you mean '\S*/sums\.jsonl'",
        "./sums": "no such file or folder",
        "sums.parquet": "no such file or folder",
        "nobody/nothing": "Without a network, only datasets that were downloaded before",
        str(tmp_path / "note.txt"): "a file of unknown kind.*Valid: .jsonl",
        str(tmp_path / "empty.jsonl"): "the file is empty",
        str(tmp_path / "torn.jsonl"): "cannot be read",
        str(tmp_path / "nothing"): "cannot be read",
    }.items():
        (tmp_path / "note.txt").write_text("note")
        (tmp_path / "empty.jsonl").touch()
        (tmp_path / "torn.jsonl").write_text('{"q": "1+')
        (tmp_path / "nothing").mkdir(exist_ok=True)
        with pytest.raises(UserError, match=message):
            file_task(path=path, prompt="q").split("train")


def test_rows_that_cannot_be_used(write_rows: Write, tmp_path: Path) -> None:
    import datasets

    nothing = datasets.Dataset.from_dict({"q": [], "a": []})
    nothing.to_parquet(tmp_path / "empty.parquet")
    nothing.save_to_disk(tmp_path / "saved")
    (tmp_path / "folder").mkdir()
    nothing.to_parquet(tmp_path / "folder" / "test.parquet")
    datasets.Dataset.from_dict({"q": ["1", "2"], "a": ["1", "2"]}).to_parquet(tmp_path / "folder" / "train.parquet")
    for path, message in {
        str(tmp_path / "empty.parquet"): r"the split is empty \(got 'train'\)",
        str(tmp_path / "folder"): r"the split is empty \(got 'test'\)",
        str(tmp_path / "saved"): "cannot be read",
        write_rows("one.jsonl", *[{"q": "only"}] * 3): "at least two different prompts",
        write_rows("null.jsonl", {"q": "1"}, {"q": None}): r"row 1, column 'q': a prompt is made of text \(got None\)",
        write_rows("chat.jsonl", {"q": [{"role": "user"}]}, {"q": []}): "row 0, column 'q': a prompt is made of text",
        write_rows("blank.jsonl", {"q": "1"}, {"q": ""}): "row 1: the prompt is empty",
    }.items():
        with pytest.raises(UserError, match=message):
            file_task(path=path, prompt="q").split("train")
    path = write_rows("both.jsonl", *SUMS[:3])
    with pytest.raises(UserError, match="all of its prompts are held out as well"):
        file_task(path=path, prompt="q", held_out_path=path).split("train")
    unanswered = write_rows("unanswered.jsonl", *({"q": f"{i}", "a": None} for i in range(3)))
    with pytest.raises(UserError, match=r"task\.answer: row \d has none"):
        file_task(path=unanswered, prompt="q", answer="a").split("train")[0]


def test_small_datasets_hold_one_prompt_out(write_rows: Write) -> None:
    for count in (2, 3, 5):
        task = File(write_rows(f"{count}.jsonl", *SUMS[:count]), "q")
        assert len(task.split("held_out")) >= 1
        assert len(task.split("train")) >= 1


def test_a_hub_dataset_that_was_downloaded_once_needs_no_network(write_rows: Write, tmp_path: Path) -> None:
    local = file_task(path=write_rows("sums.jsonl", *SUMS), prompt="q", answer="a")
    expected = prompts(local, "held_out")
    built = next((tmp_path / "cache" / "json").glob("default-*/0.0.0/*/dataset_info.json")).parent
    # where `datasets` keeps what it downloaded: <owner>___<name>/<configuration>/<version>/<commit>
    cached = tmp_path / "cache" / "somebody___sums" / "default" / "0.0.0" / ("0" * 40)
    cached.mkdir(parents=True)
    for file in built.iterdir():
        if file.is_file():
            (cached / file.name.replace("json-", "sums-")).write_bytes(file.read_bytes())
    hub = file_task(path="somebody/sums", prompt="q", answer="a")
    assert prompts(hub, "held_out") == expected
