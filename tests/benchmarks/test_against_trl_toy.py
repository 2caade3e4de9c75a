"""The comparison with TRL on one device runs at toy size on the CPU, and counts what it should."""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from klab.grid import parse_grid
from tests.benchmarks import against_trl, one_device
from tests.benchmarks.against_trl_report import device_table
from tests.benchmarks.clock import meet
from tests.benchmarks.processes import ROOT, Failure, run
from tests.benchmarks.setting import tiny
from tests.benchmarks.shapes import SHAPES

TRL = ROOT / ".venv-parity/bin/python"
SHAPE = SHAPES["toy"]


def adapter_numbers() -> int:
    """Of rank 16 on the seven projections of every layer of the toy shape."""
    c = SHAPE.config
    hidden, wide = c["hidden_size"], c["intermediate_size"]
    narrow = hidden // c["num_attention_heads"] * c["num_key_value_heads"]
    ends = 2 * (hidden + hidden) + 2 * (hidden + narrow) + 3 * (hidden + wide)
    return int(16 * ends * c["num_hidden_layers"])


def check(found: dict[str, Any], keys: list[str], printed: str, out: Path) -> None:
    assert list(found["rows"]) == keys
    assert json.loads((out / "against_trl_toy.json").read_text()) == json.loads(json.dumps(found))
    table = (out / "against_trl_toy.md").read_text()
    assert table in printed
    lines = [line.split(" | ") for line in table.splitlines() if line.startswith("| ")]
    assert lines[0][0] == f"| {found['device']}"
    assert [line[0] for line in lines[1:]] == [f"| {row['name']}" for row in found["rows"].values()]
    N = SHAPE.prompts * SHAPE.group_size
    for row in found["rows"].values():
        assert row["trajectories"] == [[N] * found["updates"]] * row["processes"]
        assert row["adapter_numbers"] == [adapter_numbers()] * row["processes"]
        assert 0 < row["ms"]["rollout"] < row["ms"]["update"]
        drawn = row["tokens_per_second"] * 2 * row["ms"]["rollout"] / 1e3
        assert N <= round(drawn) <= N * SHAPE.new_tokens


def test_klab_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = against_trl.main(["--setting", "toy", "--only", "klab_pack", "--out", str(tmp_path)])
    check(found, ["klab_pack"], capsys.readouterr().out, tmp_path)
    assert (found["rows"]["klab_pack"]["processes"], found["rows"]["klab_pack"]["cells"]) == (1, 2)
    assert "trl_over_this" not in found["rows"]["klab_pack"]


@pytest.mark.parity
@pytest.mark.skipif(not TRL.exists(), reason="`make parity-test` installs TRL into .venv-parity")
def test_beside_trl(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = against_trl.main(["--setting", "toy", "--out", str(tmp_path)])
    check(found, list(one_device.WAYS), capsys.readouterr().out, tmp_path)
    rows = found["rows"]
    for name in ("rollout", "reward", "reference", "forward", "backward", "step"):
        assert all(row["ms"][name] > 0 for row in rows.values())
    assert [row["ms"].get("behaviour", 0.0) > 0 for row in rows.values()] == [True, True, True, False, False, False]
    assert rows["trl"]["trl_over_this"] == rows["trl_at_once"]["trl_at_once_over_this"] == 1
    assert rows["klab"]["trl_over_this"] == rows["trl"]["ms"]["update"] / rows["klab"]["ms"]["update"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        against_trl.main(["--setting", "0.5b", "--only", "klab"])
    assert end.value.code == 2
    assert capsys.readouterr().err.strip().splitlines() == [
        "the 0.5b setting needs a CUDA device, and torch sees none; `--setting toy` runs on the CPU"
    ]


def test_a_cells_share_of_processes_at_once() -> None:
    def result(scale: float) -> dict[str, Any]:
        first = {"wall": 9.0, "cpu": 9.0, "rollout": 9.0}
        later = {"wall": 0.03 * scale, "cpu": 0.5, "rollout": 0.02 * scale}, {"wall": 0.01 * scale, "cpu": 0.5}
        updates = [first, first, *later * 2]
        facts = {"tokens": 60.0, "first_update": scale, "device": "a GPU", "trajectories": [8], "adapter_numbers": 3}
        return {"updates": updates, "peak_mb": 1e9, "device_mb": 100 * scale, "device_kept_mb": 200.0, **facts}

    found = one_device.summary([result(1.0), result(3.0)], one_device.ways(2)["trl_at_once"], "wall")
    assert found["ms"] == pytest.approx({"update": (20 + 60) / 2 / 2, "rollout": (10 + 30) / 2 / 2})
    assert found["tokens_per_second"] == pytest.approx(2 * 60 / ((20 + 60) / 2 / 1e3))
    assert (found["peak_mb"], found["kept_mb"], found["first_update"]) == (400, 400, 3.0)
    alone = one_device.summary([result(1.0)], one_device.ways(2)["klab"], "processor")
    assert alone["ms"] == pytest.approx({"update": 500, "rollout": 10})


def test_the_floor_of_a_setting_in_processor_time() -> None:
    shape = SHAPES["qwen2-10m"]
    layer = 2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 1024
    one = 2 * 8 * layer * 128 + 8 * 4 * 256 * 128 * 128 / 2 + 2 * 256 * 8192 * 64
    whole = {"rollout": 16 * one, "reference": 16 * one, "forward": 32 * one, "backward": 64 * one}
    assert one_device.floor(shape) == whole
    assert one_device.floor(replace(shape, lora_rank=16)) == {**whole, "backward": 32 * one}
    assert 9e6 < 8 * layer + 8192 * 256 < 11e6


def test_settings_on_the_processor_are_told_as_they_are() -> None:
    whole, adapters = (SHAPES[one_device.SHAPE_OF[name]] for name in ("10m", "10m_lora"))
    assert whole == replace(adapters, lora_rank=None)
    cell = parse_grid(one_device.told(whole).grid_text(Path("start"), 8, 1), "bench").cells[0]
    assert (cell.policy.dtype, cell.policy.lora, cell.training.micro_batch) == ("float32", None, None)
    assert (cell.training.prompts, cell.training.group_size, cell.training.max_new_tokens) == (4, 8, 64)
    assert one_device.obstacle("10m", None) is None


def test_what_does_not_fit_is_said() -> None:
    pack = {**asdict(one_device.ways(4)["klab_pack"]), "failed": "out of memory"}
    told = asdict(one_device.told(SHAPE))
    found = {"shape": "s", "device": "d", "told": told, "decoding": "static", "at_once": 4, "rounds": 1}
    found |= {"peak_gflops": 100.0, "floor_ms": 12.0}
    lines = device_table({**found, "rows": {"klab_pack": pack}}).strip().splitlines()
    assert lines[-1].startswith("| klab, a pack of 4 cells over one base | 4 | — | — | out of memory | — |")
    assert "take 12 ms at this core's measured peak (100 GFLOP/s in float32)" in lines[0]
    assert lines[-1].count("|") == lines[-2].count("|") == lines[-3].count("|")


def test_processes_wait_for_each_other(tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        early = pool.submit(meet, tmp_path, 2)
        with pytest.raises(TimeoutError):
            early.result(timeout=0.1)
        late = pool.submit(meet, tmp_path, 2)
        assert (early.result(timeout=60), late.result(timeout=60)) == (None, None)


def test_one_failure_ends_all_processes() -> None:
    waiting = [sys.executable, "-c", "import time; time.sleep(600)"]
    with pytest.raises(Failure, match="CUDA Out of Memory") as failure:
        run([waiting, [sys.executable, "-c", "raise SystemExit('CUDA Out of Memory')"]], {})
    assert failure.value.out_of_memory
    assert not [child for child in psutil.Process().children() if child.cmdline() == waiting]


def test_both_settings_are_told_to_klab() -> None:
    """Of what the tiny setting leaves out, klab's defaults stay."""
    plain = parse_grid(tiny(16, 8).grid_text(Path("start"), 20, 1), "bench").cells[0]
    assert (plain.policy.dtype, plain.policy.lora, plain.training.micro_batch) == ("float32", None, None)
    setting = one_device.told(SHAPES["qwen2.5-0.5b"])
    cell = parse_grid(setting.grid_text(Path("start"), 8, 1), "bench").cells[0]
    assert (cell.policy.dtype, cell.policy.lora.rank, cell.training.micro_batch) == ("bfloat16", 16, 64)
    assert (cell.training.prompts, cell.training.group_size, cell.training.max_new_tokens) == (16, 8, 256)
    assert (cell.training.updates_per_rollout, cell.objective.estimator, cell.objective.beta) == (2, "k3", 0.04)
