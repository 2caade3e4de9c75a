"""`track:` in a grid file: launching sends the curves, and refuses a tracker that is not there."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from klab.grid import UserError
from klab.harness.cli.main import main
from klab.harness.cli.tracking import Tracking, require_trackers
from klab.harness.store import Run

STUDY = """
name: tracked
task: {name: addition, digits: 2}
policy: {name: tiny}
training: {updates: 3, prompts: 2, group_size: 2, evaluate_every: 3, evaluation_prompts: 4, evaluation_samples: 1}
track: [tensorboard]
seeds: 2
"""


def test_launching_sends_every_update_of_every_seed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_file_loader", reason="needs tensorboard")
    monkeypatch.chdir(tmp_path)
    Path("tracked.yaml").write_text(STUDY)
    assert main(["launch", "tracked.yaml", "--on", "here", "--no-check"]) == 0
    assert main(["launch", "tracked.yaml", "--on", "here", "--no-check"]) == 0
    files = sorted(Path("runs/tracked/report/tensorboard").rglob("events.*"))
    assert [file.parent.name for file in files] == ["seed-0", "seed-1"]
    for file in files:
        steps = [event.step for event in loader.EventFileLoader(str(file)).Load() if event.HasField("summary")]
        assert steps == [0, 1, 2, 3, 3]  # the last one has the results


def test_watching_sends_nothing_that_was_not_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard", reason="needs tensorboard")
    monkeypatch.chdir(tmp_path)
    Path("tracked.yaml").write_text(STUDY)
    assert main(["launch", "tracked.yaml", "--on", "here", "--no-check"]) == 0
    shutil.rmtree("runs/tracked/report")
    assert main(["watch", "runs/tracked"]) == 0
    assert not Path("runs/tracked/report/tensorboard").exists()
    assert main(["watch", "runs/tracked", "--track", "tensorboard"]) == 0
    assert len(list(Path("runs/tracked/report/tensorboard").rglob("events.*"))) == 2


def test_a_tracker_that_fails_is_said_once_and_the_cells_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tracked.yaml").write_text(STUDY.replace("tensorboard", "mlflow"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nowhere://at/all")
    assert main(["launch", "tracked.yaml", "--on", "here", "--no-check"]) == 0
    assert main(["watch", "runs/tracked", "--track", "mlflow"]) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "mlflow could not be sent to" in line]
    assert len(said) == 2  # once by each command
    tracking = Tracking(Run.open("runs/tracked"), ["mlflow"])
    for _ in range(3):
        tracking.finish()
    assert capsys.readouterr().err.count("mlflow could not be sent to") == 1
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "ml").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    tracking.finish()  # what could not be sent is sent then
    assert list((tmp_path / "ml").rglob("reward_mean"))


def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_written() -> None:
    with pytest.raises(UserError, match=r"klab\[track\]"):
        require_trackers(("a_tracker_that_nobody_has",))
