"""Trackers: every number is sent once, a cell that goes on continues the same tracked run."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from klab.grid import UserError
from klab.harness.store import Run
from klab.reports.track import follow, tracked_id

Small = Callable[..., Run]


def _events(folder: Path) -> dict[int, dict[str, float]]:
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_file_loader", reason="needs tensorboard")
    found: dict[int, dict[str, float]] = {}
    for path in sorted(folder.glob("events.*")):
        for event in loader.RawEventFileLoader(str(path)).Load():
            from tensorboard.compat.proto.event_pb2 import Event

            parsed = Event.FromString(event)
            for value in parsed.summary.value:
                assert value.tag not in found.get(parsed.step, {}), "sent twice"
                found.setdefault(parsed.step, {})[value.tag] = value.simple_value
    return found


def test_tensorboard_gets_every_number_once_also_when_a_cell_goes_on(small: Small) -> None:
    pytest.importorskip("tensorboard", reason="needs tensorboard")
    run = small(seeds=1, outcome=lambda cell: "interrupted")
    cell = run.cell(run.cells[0])
    assert follow(run, "tensorboard") > 0
    assert follow(run, "tensorboard") == 0
    rows = cell.metrics()
    cell.append_metrics([{**rows[-1], "update": update, "reward_mean": update / 100} for update in (6, 7)])
    follow(run, "tensorboard")
    cell.write_result({"state": "finished", "updates": 7})
    follow(run, "tensorboard")
    events = _events(run.report / "tensorboard" / run.resolved(cell.id)["group"] / "seed-0")
    assert sorted(events) == [0, *range(1, 8)]
    assert events[7]["train/reward_mean"] == pytest.approx(0.07)
    assert events[0]["evaluation/accuracy"] == pytest.approx(0.4)
    assert not any("nonfinite" in tag for tag in events[1] if tag.startswith("evaluation"))


def test_wandb_works_offline_with_one_stable_run_per_cell(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="needs wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = small(seeds=1)
    assert follow(run, "wandb") == 22
    folders = sorted(path.name for path in (run.report / "wandb" / "wandb").glob("offline-run-*"))
    assert {name.rpartition("-")[2] for name in folders} == {tracked_id(run, identity) for identity in run.cells}


def test_a_missing_package_and_an_unknown_tracker_are_said(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    run = small(seeds=1)
    with pytest.raises(UserError, match="tensorboard"):
        follow(run, "tensorbord")
    for name in ("tensorboard.summary.writer.event_file_writer", "wandb"):
        monkeypatch.setitem(sys.modules, name, None)
    for tracker in ("tensorboard", "wandb"):
        with pytest.raises(UserError, match=r"pip install 'klab\[track\]'"):
            follow(run, tracker)
