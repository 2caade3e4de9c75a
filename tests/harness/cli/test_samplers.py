"""Launching refuses a sampler that is not installed, before anything is written."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from klab.harness.cli.main import main

STUDY = """
name: fast
task: {name: addition, digits: 2}
policy: {name: tiny}
training: {updates: 3, sampler: {engine: vllm, correction: tis}}
"""


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vllm is installed")
@pytest.mark.parametrize("where", ["here", "local", "slurm"])
def test_without_vllm(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("fast.yaml").write_text(STUDY)
    assert main(["launch", "fast.yaml", "--on", where, "--no-merge", "--no-check"]) == 2
    assert "training.sampler.engine: vllm is not installed" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
