"""The benchmark for GPUs runs at toy size, and counts what it should."""

from __future__ import annotations

import pytest
import torch

from tests.benchmarks import gpu


def test_it_runs_and_counts(capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    found = gpu.main(["--shape", "toy", "--rounds", "1", "--bandwidth", "20", "--tflops", "0.1"])
    torch.set_num_threads(threads)
    shape = gpu.SHAPES["toy"]
    N = shape.prompts * shape.group_size
    for name, cells in {"all weights": 1, "adapters, 1": 1, "adapters, 2": 2}.items():
        each = found[name]
        assert each.cells == cells
        assert cells * N <= each.tokens <= cells * N * shape.new_tokens
        assert each.trained == each.tokens + cells * N * shape.prompt_tokens
        assert each.rollout_seconds > 0
        assert each.update_seconds > 0
    qkv, out, mlp, norms = 32 * 64 + 64, 32 * 32, 3 * 32 * 64, 2 * 32
    weights = 64 * 32 + 2 * (qkv + out + mlp + norms) + 32
    assert found["all weights"].flop == 6 * found["all weights"].trained * weights
    assert found["adapters, 2"].flop == 4 * found["adapters, 2"].trained * weights
    mean, largest = found["gap"]
    assert 0 < mean < 0.05
    assert mean < largest < 0.5
    printed = capsys.readouterr().out
    assert printed.count("%") == 6
    assert "bfloat16 − float32" in printed


def test_peaks_are_those_of_the_card_unless_given() -> None:
    cpu = torch.device("cpu")
    assert gpu.peaks(cpu, None, None) == (None, None)
    assert gpu.peaks(cpu, 3350, 989) == gpu.PEAKS["H100"]
