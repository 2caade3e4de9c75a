"""The ten minutes on a GPU at toy size: on the CPU, where it says what is left out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.benchmarks import gpu_proof, gpu_proof_steps
from tests.benchmarks.gpu_proof_steps import STEPS, Setting


def proof(*words: str) -> int:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return gpu_proof.main(["--setting", "toy", *words])
    finally:
        torch.set_num_threads(threads)


def test_every_step_is_made_or_says_why_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "proof.md"
    known = ["--bandwidth", "20", "--tflops", "0.1"]
    assert proof("--out", str(page), "--trl", str(tmp_path / "nowhere"), *known) == 0
    text = page.read_text()
    assert [line[3:] for line in text.splitlines() if line.startswith("## ")] == list(STEPS)
    assert "**Failed**" not in text
    assert all(text.count(f"Left out: {why}") == 1 for why in ("CUDA counts them", "there is no ", "vLLM "))
    sections = dict(each.split("\n", 1) for each in text.split("\n## ")[1:])
    assert "Equal up to the first difference: " in sections["Decoding"]
    assert sections["Mixed lengths"].count("\n| 12 |") == sections["Mixed lengths"].count("\n| 48 |") == 5
    assert "| adapters, 2 |" in sections["Use of the device"]
    assert "| trainer | 1.00000 | 1.0000 | 0% |" in sections["π_old"]
    assert "GB in " in sections["A checkpoint"]
    assert "aten::" in sections["Where the time goes"]
    assert text in capsys.readouterr().out.replace("\n\n\n", "\n\n") or "## vLLM" in text


def test_a_step_that_fails_fails_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(setting: Setting) -> str:
        """Broken?"""
        raise ValueError("it is broken")

    monkeypatch.setitem(gpu_proof_steps.STEPS, "A checkpoint", broken)
    page = tmp_path / "proof.md"
    assert proof("--out", str(page), "--only", "The machine", "A checkpoint", "vLLM") == 1
    assert "**Failed**: ValueError: it is broken" in page.read_text()
    assert "## vLLM" in page.read_text()


def test_what_no_longer_fits_is_left_out(tmp_path: Path) -> None:
    page = tmp_path / "proof.md"
    assert proof("--out", str(page), "--minutes", "0", "--only", "Decoding", "π_old") == 0
    assert page.read_text().count("Left out: the 0 minutes are over.") == 2


def test_a_machine_without_gpu_is_told_at_once() -> None:
    with pytest.raises(SystemExit, match="there is no GPU here; --setting toy"):
        gpu_proof.main([])
