"""Cells are not trained under other data, models or code than the rest of their run without a word."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from klab.grid import Grid, load_grid
from klab.harness.dispatch.job import run_job
from klab.harness.store import Run
from klab.reports.study import load_run

MakeGrid = Callable[..., Grid]
Ask = Callable[..., Any]
NEW_WORDS = "\n"
"""Another content, with which everything works as before."""


@pytest.fixture
def grid(make_grid: MakeGrid, place: Path, digits: Path, monkeypatch: pytest.MonkeyPatch) -> Grid:
    """Two cells with datasets of their own; they share a checkpoint folder, a reward and a weight of the user's."""
    monkeypatch.setenv("KLAB_CACHE", str(place / "cache"))
    sums = [{"question": f"{a}+{b}=", "answer": str(a + b)} for a in range(4) for b in range(5)]
    for name in ("sums.jsonl", "others.jsonl"):
        (place / name).write_text("".join(json.dumps(each) + "\n" for each in sums))
    (place / "our_reward.py").write_text("def length(prompt, completion, answer):\n    return len(completion) / 3\n")
    (place / "weights.py").write_text("def soft(ratio, advantage):\n    return ratio.tanh()\n")
    shutil.copytree(digits, place / "start")
    task = {"name": "file", "path": "sums.jsonl", "prompt": "question", "reward": "our_reward:length"}
    make_grid(task=task, cells=[{}, {"task.path": "others.jsonl"}], max_new_tokens=3)
    text = json.loads((place / "little.yaml").read_text())
    text |= {"policy": {"name": "hf", "model": "start"}, "objective": {"weight": "./weights.py:soft"}}
    (place / "little.yaml").write_text(json.dumps(text))
    return load_grid(place / "little.yaml")


@pytest.mark.parametrize(
    ("file", "named"),
    {
        "sums.jsonl": "task.path sums.jsonl",
        "start/config.json": "policy.model start",
        "our_reward.py": "our_reward.py",
        "weights.py": "weights.py",
    }.items(),
)
def test_a_launch_trains_nothing_under_changed_inputs(grid: Grid, ask: Ask, place: Path, file: str, named: str) -> None:
    run = Run.create(place / "runs/little", grid)
    first, second = run.cells
    run_job(run.path, (first,), executor="here")
    (place / file).write_text((place / file).read_text() + NEW_WORDS)
    before = (run.path / "manifest.json").read_bytes()
    for words in (
        ["plan", "--no-check"],
        ["launch", "--no-check", "--dry-run"],
        ["launch", "--on", "here", "--no-check"],
    ):
        said = ask(words[0], "little.yaml", *words[1:], code=2)
        assert f"other versions of {named}: cells that are trained now" in said
        assert "--accept-changes" in said
    assert (run.path / "manifest.json").read_bytes() == before
    assert not run.cell(second).path.exists()
    assert "2 finished" in ask("launch", "little.yaml", "--on", "here", "--no-check", "--accept-changes")
    assert Run.open(run.path).earlier_inputs() == {first: [named]}
    assert f"1 cells of little were trained with other versions of {named}" in " ".join(load_run(run.path).notes)
    (place / file).write_text((place / file).read_text() + NEW_WORDS)
    assert "2 finished" in ask("launch", "little.yaml", "--on", "here", "--no-check")  # there is nothing to train


def test_a_job_goes_on_with_no_cell_whose_data_changed(
    grid: Grid, ask: Ask, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run.create(place / "runs/little", grid)
    first, second = run.cells
    done: list[int] = []
    states = run_job(
        run.path,
        (first,),
        executor="here",
        progress=lambda each: done.append(each.update),
        stop=lambda: done[-1:] == [2],
    )
    assert states == {first: "interrupted"}
    (place / "sums.jsonl").write_text((place / "sums.jsonl").read_text() + NEW_WORDS)

    assert run_job(run.path, (first, second), executor="here") == {first: "failed", second: "finished"}
    error = run.cell(first).error() or ""
    assert "task.path sums.jsonl changed since the run was launched" in error
    assert "klab launch GRID --retry-failed --accept-changes" in error
    assert "task.path sums.jsonl changed" in capsys.readouterr().err
    assert len(run.cell(first).metrics()) == 2
    assert "failed" in ask("status", "little", code=1)

    again = ("launch", "little.yaml", "--on", "here", "--no-check", "--retry-failed")
    assert "other versions of task.path sums.jsonl" in ask(*again, code=2)
    assert "2 finished" in ask(*again, "--accept-changes")
    accepted = Run.open(run.path)
    assert accepted.begun_earlier() == {first: ["task.path sums.jsonl"]}
    assert accepted.earlier_inputs() == {second: ["task.path sums.jsonl"]}
    assert "1 cells of little were begun with other versions" in " ".join(load_run(run.path).notes)


def test_a_part_of_the_grid_accepts_changes_of_what_it_does_not_name(grid: Grid, ask: Ask, place: Path) -> None:
    run = Run.create(place / "runs/little", grid)
    text = json.loads((place / "little.yaml").read_text())
    (place / "little.yaml").write_text(json.dumps(text | {"cells": [{}]}))
    (place / "others.jsonl").write_text((place / "others.jsonl").read_text() + NEW_WORDS)
    launch = ("launch", "little.yaml", "--on", "here", "--no-check")
    assert "task.path others.jsonl" in ask(*launch, code=2)
    assert "1 finished" in ask(*launch, "--accept-changes")
    assert Run.open(run.path).cells == run.cells
    assert Run.open(run.path).changed_inputs() == []
