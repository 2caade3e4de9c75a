"""Which GPUs jobs get, and what is said where there is none."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from klab.grid import Grid, UserError
from klab.harness.cli.main import main
from klab.harness.dispatch import gpus
from klab.harness.dispatch.backends import Pack
from klab.harness.dispatch.local.backend import LocalExecutor
from klab.harness.dispatch.local.inline import InlineExecutor
from klab.harness.store import Run
from tests.support.run_processes import wait_for


@pytest.mark.parametrize(
    ("named", "found"), [("", []), ("-1", []), ("3", ["3"]), ("0, 1", ["0", "1"]), ("GPU-1,GPU-2", ["GPU-1", "GPU-2"])]
)
def test_visible(monkeypatch: pytest.MonkeyPatch, named: str, found: list[str]) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert gpus.visible_gpus() == found
    assert LocalExecutor().gpus() == found
    assert LocalExecutor(device="cpu").gpus() == []


def test_a_gpu_is_required_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(UserError, match=r"--device: there is no NVIDIA GPU here \(got 'cuda'\).*--device cpu"):
        gpus.require_gpu("--device", "cuda")
    with pytest.raises(UserError, match=r"resources\.gpus: there is no NVIDIA GPU here \(got 2\).*resources\.gpus: 0"):
        gpus.require_gpu("resources.gpus", 2)


@pytest.mark.parametrize(
    ("version", "count", "problem"),
    [("None", 0, "it was built without CUDA"), ("'13.0'", 0, "it finds none"), ("'13.0'", 2, None)],
)
def test_torch_must_be_able_to_use_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, version: str, count: int, problem: str | None
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("from torch import cuda, version\n")
    (tmp_path / "torch" / "version.py").write_text(f"cuda = {version}\n")
    (tmp_path / "torch" / "cuda.py").write_text(f"def device_count():\n    return {count}\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    if problem is None:
        gpus.require_gpu("--device", "cuda")
        return
    with pytest.raises(UserError, match=f"torch cannot use the GPU: {problem}"):
        gpus.require_gpu("--device", "cuda")


def test_local_jobs_leave_gpus_alone_when_told_to(
    make_grid: Callable[..., Grid], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    run = Run.create(place / "runs" / "some", make_grid())
    LocalExecutor(device="cpu").submit(run, [Pack(tuple(run.cells))], run.resources)
    folder = run.cell(run.cells[0])
    wait_for(lambda: folder.result() is not None)
    assert folder.attempts()[0]["gpu"] == ""


def test_training_here_leaves_gpus_alone_when_told_to(
    make_grid: Callable[..., Grid], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    run = Run.create(place / "runs" / "some", make_grid())
    InlineExecutor(device="cpu").submit(run, [], run.resources)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


@pytest.mark.parametrize("asked", [["--device", "cuda"], ["--gpus", "1"], ["--on", "here", "--gpus", "1"]])
def test_a_launch_without_the_gpu_it_asks_for_writes_nothing(
    make_grid: Callable[..., Grid],
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    asked: list[str],
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    make_grid("study")
    assert main(["launch", "study.yaml", *asked]) == 2
    assert "there is no NVIDIA GPU here" in capsys.readouterr().err
    assert not (place / "runs").exists()


def test_slurm_hands_out_its_gpus_itself(
    make_grid: Callable[..., Grid], place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_grid("study")
    assert main(["launch", "study.yaml", "--on", "slurm", "--device", "cpu"]) == 2
    assert "On Slurm, --gpus asks for GPUs." in capsys.readouterr().err
