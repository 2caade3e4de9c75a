"""Commands about pretrained models, before there is any."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from klab.grid import Grid
from klab.harness.cli.main import main
from klab.harness.store import Run

MODEL = {"name": "hf", "model": "some-one/some-model", "revision": "v1", "dtype": "bfloat16", "lora": {"rank": 8}}
_PLAN = """
import sys
from klab.harness.cli.main import main
code = main(["plan", "study.yaml"])
loaded = [name for name in ("torch", "transformers", "huggingface_hub", "peft") if name in sys.modules]
sys.exit(f"loaded {loaded}" if loaded else code)
"""


@pytest.fixture
def study(make_grid: Callable[..., Grid], place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A grid file whose model is on the hub, without a network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    make_grid("study", cells=[{"estimator": "k1"}, {"estimator": "k3"}])
    file = place / "study.yaml"
    file.write_text(json.dumps({**json.loads(file.read_text()), "policy": MODEL}))
    return file


def test_a_plan_needs_no_model(study: Path, place: Path) -> None:
    root = Path(__file__).parents[3]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(place)]), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", _PLAN], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "2 jobs of 1 cells" in done.stdout


def test_a_model_that_cannot_be_had_fails_its_cells_with_one_sentence(
    study: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["launch", "study.yaml", "--on", "here", "--json"]) == 1
    run = Run.open(place / "runs" / "study")
    for identity in run.cells:
        text = str(run.cell(identity).error())
        assert text.splitlines()[-1].startswith("policy.model: neither a folder nor a model that can be downloaded: ")
        assert "some-one/some-model" in text
        assert "Traceback" not in text
