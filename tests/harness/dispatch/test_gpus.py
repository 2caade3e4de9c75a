"""Which GPUs jobs get, and what is said where there is none."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from klab.grid import Grid, UserError
from klab.grid.user_code import python_command
from klab.harness.cli.main import main
from klab.harness.dispatch import gpus
from klab.harness.dispatch.backends import Pack
from klab.harness.dispatch.local.backend import LocalExecutor
from klab.harness.dispatch.local.inline import InlineExecutor
from klab.harness.store import Run, machine
from tests.support.run_processes import wait_for


@pytest.mark.parametrize(
    ("named", "found"), [("", []), ("-1", []), ("3", ["3"]), ("0, 1", ["0", "1"]), ("GPU-1,GPU-2", ["GPU-1", "GPU-2"])]
)
def test_visible(monkeypatch: pytest.MonkeyPatch, named: str, found: list[str]) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert gpus.visible_gpus() == found
    assert LocalExecutor().gpus() == found
    assert LocalExecutor(device="cpu").gpus() == []


DIVIDED = """\
GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-e86c)
  MIG 3g.20gb     Device  0: (UUID: MIG-5c89852c)
  MIG 1g.5gb+me   Device  1: (UUID: MIG-GPU-e86c/13/0)
GPU 1: NVIDIA A100-SXM4-40GB (UUID: GPU-0a1b)
"""
"""Of a machine with one divided card and a whole one; the second instance is named as drivers before 470 did."""


def test_instances_of_a_divided_card_are_devices() -> None:
    assert gpus.devices(DIVIDED) == {"MIG-5c89852c": 20.0, "MIG-GPU-e86c/13/0": 5.0, "1": None}
    assert gpus.devices("Failed to initialize NVML: Driver/library version mismatch\n") == {}


@pytest.mark.parametrize("named", [None, "MIG-GPU-e86c/13/0", "1"])
def test_jobs_get_instances_by_name_and_their_memory_counts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, named: str | None
) -> None:
    driver = tmp_path / "nvidia-smi"
    answers = f"case $1 in -L) printf '{DIVIDED}';; *) echo 40960;; esac"
    driver.write_text(f"#!/bin/sh\n{answers}\n")
    driver.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(machine, "gpus", lambda: ["A100", "A100"])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    gpus._driver_list.cache_clear()
    if named is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    expected = {None: (list(gpus.devices(DIVIDED)), 20.0), "MIG-GPU-e86c/13/0": ([named], 5.0), "1": (["1"], 40.0)}
    assert (gpus.visible_gpus(), gpus.gpu_memory_gb()) == expected[named]
    gpus._driver_list.cache_clear()


def test_segments_grow_unless_the_user_or_vllm_wants_them_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    both = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
    for name in both:
        monkeypatch.setenv(name, "")
    gpus.let_segments_grow()
    assert [os.environ[name] for name in both] == ["", ""]
    for name in both:
        monkeypatch.delenv(name)
    gpus.let_segments_grow({"klab", "vllm"})
    assert not any(name in os.environ for name in both)
    gpus.let_segments_grow({"klab"})
    assert os.environ[both[0]] == "expandable_segments:True"


def test_a_job_lets_segments_grow_before_it_trains(make_grid: Callable[..., Grid], place: Path) -> None:
    run = Run.create(place / "runs/little", make_grid(task={"name": "slow_tasks:Chore"}, updates=1))
    code = f"""
import os
from klab.harness.dispatch.job import run_job
print(run_job({str(run.path)!r}, {run.cells!r}, executor="here"), os.environ.get("PYTORCH_CUDA_ALLOC_CONF"))
"""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTORCH_")}
    done = subprocess.run(python_command("-c", code), cwd=place, capture_output=True, text=True, env=clean)
    assert done.stdout.split()[-2:] == ["'finished'}", "expandable_segments:True"], done.stderr


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
