"""Cells that were trained on other code, data or models are not added to a run without a word."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from klab.grid import UserError, load_grid
from klab.harness.store import Run
from klab.harness.store.inputs import Digests


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A grid with a dataset, a checkpoint folder, a reward and a weight of the user's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KLAB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "sums.jsonl").write_text('{"question": "1+1", "answer": "2"}\n')
    (tmp_path / "start").mkdir()
    (tmp_path / "start/config.json").write_text("{}")
    (tmp_path / "klab_test_reward.py").write_text("def length(prompt, completion, answer): return 1.0\n")
    (tmp_path / "weights.py").write_text("def soft(ratio, advantage): return ratio\n")
    return tmp_path


def launched(project: Path, accept_changes: bool = False, **settings: Any) -> Run:
    task = {"name": "file", "path": "sums.jsonl", "prompt": "question", "reward": "klab_test_reward:length"}
    grid = {"name": "mine", "task": task, "policy": {"name": "hf", "model": "start"}, "seeds": 1}
    grid |= {"objective": {"weight": "./weights.py:soft"}, **settings}
    (project / "mine.yaml").write_text(json.dumps(grid))
    return Run.create(project / "runs/mine", load_grid(project / "mine.yaml"), accept_changes=accept_changes)


CHANGES = {
    "sums.jsonl": "task.path sums.jsonl",
    "start/config.json": "policy.model start",
    "klab_test_reward.py": "klab_test_reward.py",
    "weights.py": "weights.py",
}


@pytest.mark.parametrize(("file", "named"), CHANGES.items())
def test_cells_are_not_added_under_changed_inputs(project: Path, file: str, named: str) -> None:
    run = launched(project)
    assert run.changed_inputs() == []
    assert launched(project, seeds=2).changed_inputs() == []
    (project / file).write_text((project / file).read_text() + " ")
    assert Run.open(run.path).changed_inputs() == [named]
    before = (run.path / "manifest.json").read_bytes()
    with pytest.raises(UserError, match=f"other versions of {named}: .*--accept-changes"):
        launched(project, seeds=3)
    assert (run.path / "manifest.json").read_bytes() == before
    assert len(launched(project, seeds=1).cells) == 2  # fewer cells add nothing


def test_cells_that_are_added_all_the_same_are_told_apart(project: Path) -> None:
    run = launched(project)
    run.cell(run.cells[0]).write_result({"state": "finished", "updates": 1})
    (project / "weights.py").write_text("def soft(ratio, advantage): return ratio * 2\n")
    grown = launched(project, accept_changes=True, seeds=2)
    assert grown.earlier_inputs() == {run.cells[0]: ["weights.py"]}
    assert grown.changed_inputs() == []
    assert grown.changed_inputs(run.cells[0]) == ["weights.py"]
    sources = [
        grown.user_code(identity)["./weights.py:soft"].source.read_text()
        for identity in grown.cells  # type: ignore[union-attr]
    ]
    assert ["* 2" in source for source in sources] == [False, True]


def test_a_touched_file_has_not_changed(project: Path) -> None:
    run = launched(project)
    os.utime(project / "sums.jsonl", (1, 1))
    assert run.changed_inputs() == []


def test_what_is_gone_is_said_only_where_it_is_needed(project: Path) -> None:
    run = launched(project)
    (project / "sums.jsonl").unlink()
    assert run.changed_inputs(missing=False) == []
    assert run.changed_inputs() == ["task.path sums.jsonl"]


def test_digests_of_large_files_are_kept_by_size_and_time(project: Path) -> None:
    large = project / "large.bin"
    large.write_bytes(b"x" * (5 << 20))
    digests = Digests()
    first = digests.of(large)
    digests.save()
    status = large.stat()
    with large.open("r+b") as file:
        file.write(b"y")
    os.utime(large, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert Digests().of(large) == first  # not read again: size and time are the same
    os.utime(large, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert Digests().of(large) != first


def test_what_is_no_regular_file_is_not_read(project: Path) -> None:
    os.mkfifo(project / "pipe")
    assert Digests().of(project / "pipe") is None
    assert Digests().of(Path("/dev/zero")) is None
    assert len(Digests().of(project) or "") == 64


def test_another_commit_of_the_hub_is_noticed(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(project / "hub"))
    refs = project / "hub/models--some--model/refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text("a" * 40)
    run = launched(project, policy={"name": "hf", "model": "some/model"})
    assert run.changed_inputs() == []
    (refs / "main").write_text("b" * 40)
    assert run.changed_inputs() == ["policy.model some/model"]
    (refs / "main").unlink()
    assert run.changed_inputs() == []  # not in this machine's cache: nothing is known


def test_folders_that_the_run_itself_changes_are_no_inputs(project: Path) -> None:
    (project / "klab_test_task.py").write_text("class Task:\n    def __init__(self, separator, place): ...\n")
    run = launched(project, task={"name": "klab_test_task:Task", "separator": "/", "place": "."})
    assert set(run.manifest["inputs"]) == {"policy.model start"}


def test_a_bounded_digest_reads_large_files_only_where_this_machine_has_before(project: Path) -> None:
    large = project / "large.bin"
    large.write_bytes(b"x" * (5 << 20))
    assert Digests(bounded=True).of(large) is None
    digests = Digests()
    digests.of(large)
    digests.save()
    large.write_bytes(b"y" * (6 << 20))
    assert Digests(bounded=True).of(large) == Digests().of(large)
    many = project / "many"
    many.mkdir()
    for number in range(10_001):
        (many / str(number)).touch()
    assert Digests(bounded=True).of(many) is None
    assert Digests().of(many) is not None
