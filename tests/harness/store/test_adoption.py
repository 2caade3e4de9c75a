"""Finished cells are taken over from another run where they are the same in everything."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from klab.grid import load_grid
from klab.harness.store import Run
from klab.harness.store.adoption import adopt


def launched(folder: Path, name: str, seeds: int, weights: list[str]) -> Run:
    grid = {"name": name, "task": {"name": "addition"}, "policy": {"name": "tiny"}, "seeds": seeds}
    (folder / f"{name}.yaml").write_text(json.dumps({**grid, "axes": {"weight": weights}}))
    return Run.create(folder / "runs" / name, load_grid(folder / f"{name}.yaml"))


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run with two finished cells and two that are not; one of each has a weight of the user's."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights.py").write_text("def soft(ratio, advantage): return ratio\n")
    run = launched(tmp_path, "old", 2, ["ppo_clip", "./weights.py:soft"])
    for identity in run.cells:
        if run.resolved(identity)["seed"] == 0:
            run.cell(identity).append_metrics([{"update": 1, "loss": 0.5}])
            run.cell(identity).write_result({"state": "finished", "updates": 1})
            (run.cell(identity).path / "policy").mkdir()
            (run.cell(identity).path / "policy/config.json").write_text("{}")
            (run.cell(identity).path / "link").symlink_to("/etc/passwd")
    return run


def test_finished_cells_of_the_same_id_are_copied(old: Run, tmp_path: Path) -> None:
    new = launched(tmp_path, "new", 3, ["ppo_clip", "./weights.py:soft", "ratio"])
    found = adopt(new, old)
    assert found.different == {}
    assert sorted(found.adopted) == sorted(each for each in old.cells if old.resolved(each)["seed"] == 0)
    for identity in found.adopted:
        assert new.cell(identity).result() == old.cell(identity).result()
        assert new.cell(identity).metrics() == old.cell(identity).metrics()
        assert (new.cell(identity).path / "policy/config.json").read_text() == "{}"
        assert not (new.cell(identity).path / "link").exists()
    assert adopt(new, old).adopted == []


def test_cells_of_other_code_are_not(old: Run, tmp_path: Path) -> None:
    (tmp_path / "weights.py").write_text("def soft(ratio, advantage): return ratio * 2\n")
    new = launched(tmp_path, "new", 1, ["ppo_clip", "./weights.py:soft"])
    found = adopt(new, old)
    assert [old.resolved(identity)["objective"]["weight"] for identity in found.adopted] == ["ppo_clip"]
    assert list(found.different.values()) == [["./weights.py:soft"]]
    assert all(new.cell(identity).result() is None for identity in found.different)
