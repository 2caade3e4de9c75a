"""The ten minutes on a GPU at toy size on the emulated device: its recorded steps are those of a GPU."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.benchmarks import gpu_proof
from tests.support.emulated_device.device import EmulatedDevices


def test_it_runs_on_a_device(tmp_path: Path, device: EmulatedDevices) -> None:
    page, threads = tmp_path / "proof.md", torch.get_num_threads()
    steps = ["The machine", "Mixed lengths", "π_old", "TRL"]
    code = gpu_proof.main(["--setting", "toy", "--out", str(page), "--only", *steps])
    torch.set_num_threads(threads)
    text = page.read_text()
    assert code == 0, text
    assert "emulated:0 (no GPU)" in text
    assert "Left out: TRL knows no device 'emulated'." in text
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith(("| 12 |", "| 48 |"))]
    assert [int(row[1]) for row in rows] == [1, 2, 3, 4, 5] * 2
    recorded = [int(row[3]) for row in rows]
    assert recorded[0] > 0
    assert recorded[1:5] == recorded[6:] == [0, 0, 0, 0], "steps are recorded anew after the first rollout"
