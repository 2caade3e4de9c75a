"""Trackers: every number is sent once, a cell that goes on continues the same tracked run."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from klab.grid import UserError
from klab.harness.store import CellFolder, Run
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


def _expected(cell: CellFolder) -> dict[tuple[str, int], float]:
    """Every number of a cell's files as a tracker should have it, by name and update."""
    found: dict[tuple[str, int], float] = {}
    for prefix, rows in (("train", cell.metrics()), ("evaluation", cell.evaluations())):
        for row in rows:
            for name, value in row.items():
                if name != "update" and isinstance(value, int | float):
                    found[f"{prefix}/{name}", row["update"]] = float(value)
    result = cell.result() or {}
    for name, value in result.items():
        if isinstance(value, int | float):
            found[f"final/{name}", result["updates"]] = float(value)
    return found


def _mlflow_numbers(client: Any, run_id: str) -> list[tuple[tuple[str, int], float]]:
    names = client.get_run(run_id).data.metrics
    return [((name, each.step), each.value) for name in names for each in client.get_metric_history(run_id, name)]


def test_mlflow_has_the_numbers_of_the_files_once_in_one_run_per_cell(
    small: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    run = small(seeds=1, outcome=lambda cell: "interrupted")
    from mlflow.tracking import MlflowClient

    assert follow(run, "mlflow") > 0
    cell = run.cell(run.cells[0])
    rows = cell.metrics()
    cell.append_metrics([{**rows[-1], "update": update, "reward_mean": update / 100} for update in (6, 7)])
    follow(run, "mlflow")
    cell.write_result({"state": "finished", "updates": 7, "reward_final": 0.25, "reason": None})
    follow(run, "mlflow")
    (run.report / "mlflow" / "sent.json").unlink()  # what was sent is forgotten: MLflow itself still knows
    follow(run, "mlflow")
    client = MlflowClient(tracking_uri=(run.report / "mlflow").as_uri())
    experiment = client.get_experiment_by_name(run.name)
    assert experiment is not None
    found = {each.data.tags["klab.cell"]: each for each in client.search_runs([experiment.experiment_id])}
    assert sorted(found) == sorted(run.cells)
    tracked = found[cell.id]
    numbers = _mlflow_numbers(client, tracked.info.run_id)
    assert len({key for key, _ in numbers}) == len(numbers), "sent twice"
    assert dict(numbers) == _expected(cell)
    assert tracked.data.tags["klab.id"] == tracked_id(run, cell.id)
    assert tracked.data.tags["klab.group"] == run.resolved(cell.id)["group"]
    assert tracked.data.tags["klab.state"] == "finished"
    assert tracked.data.params["training.updates"] == "10"
    assert (tracked.info.status, found[run.cells[1]].info.status) == ("FINISHED", "RUNNING")


def test_trackio_has_the_numbers_of_the_files_once_in_one_run_per_cell(
    small: Small, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = """
import sys
from klab.harness.store import Run
from klab.reports.track import follow
print(follow(Run.open(sys.argv[1]), "trackio"))
"""
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HUB_OFFLINE": "1"}

    def follow_apart(run: Run) -> int:
        command = [sys.executable, "-c", program, str(run.path)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return int(done.stdout)

    run = small(seeds=1, outcome=lambda cell: "interrupted")
    assert follow_apart(run) > 0
    cell = run.cell(run.cells[0])
    rows = cell.metrics()
    cell.append_metrics([{**rows[-1], "update": update, "reward_mean": update / 100} for update in (6, 7)])
    cell.write_result({"state": "finished", "updates": 7, "reward_final": 0.25, "reason": None})
    follow_apart(run)
    assert follow_apart(run) == 0
    (run.report / "trackio" / "sent.json").unlink()
    follow_apart(run)
    (file,) = [path for path in (tmp_path / "trackio").rglob("*.db") if run.name in path.name]
    with sqlite3.connect(file) as base:
        logged = base.execute("SELECT step, metrics FROM metrics WHERE run_name = ? ORDER BY id", (cell.id,)).fetchall()
        configs = base.execute("SELECT config FROM configs WHERE run_name = ?", (cell.id,)).fetchall()
    numbers = [
        ((name, step), value)
        for step, text in logged
        for name, value in json.loads(text).items()
        if isinstance(value, int | float)
    ]
    found = [pair for pair in numbers if not pair[0][0].startswith("final/")]
    assert len({key for key, _ in found}) == len(found), "sent twice"
    assert dict(numbers) == _expected(cell)
    (config,) = [json.loads(text) for (text,) in configs]
    assert config["klab_id"] == tracked_id(run, cell.id)
    assert run.resolved(cell.id)["group"] in json.dumps(config)


def test_a_cell_that_failed_and_is_taken_up_again_continues_its_run(
    small: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    from mlflow.tracking import MlflowClient

    run = small(seeds=1, outcome=lambda cell: "failed")
    follow(run, "mlflow")
    client = MlflowClient(tracking_uri=(run.report / "mlflow").as_uri())
    experiment = client.get_experiment_by_name(run.name)
    assert experiment is not None

    def statuses() -> list[str]:
        return sorted(each.info.status for each in client.search_runs([experiment.experiment_id]))

    assert statuses() == ["FAILED", "FAILED"]
    cell = run.cell(run.cells[0])
    cell.clear_failure()
    rows = cell.metrics()
    cell.append_metrics([{**rows[-1], "update": rows[-1]["update"] + step} for step in (1, 2)])
    follow(run, "mlflow")
    assert statuses() == ["FAILED", "RUNNING"]
    cell.write_result({"state": "diverged", "updates": rows[-1]["update"] + 2})
    follow(run, "mlflow")
    assert statuses() == ["FAILED", "FINISHED"]


def test_a_missing_package_and_an_unknown_tracker_are_said(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    run = small(seeds=1)
    with pytest.raises(UserError, match="tensorboard"):
        follow(run, "tensorbord")
    for name in ("tensorboard.summary.writer.event_file_writer", "wandb", "mlflow.tracking", "trackio"):
        monkeypatch.setitem(sys.modules, name, None)
    for tracker in ("tensorboard", "wandb", "mlflow", "trackio"):
        with pytest.raises(UserError, match=r"pip install 'klab\[track\]'"):
            follow(run, tracker)
