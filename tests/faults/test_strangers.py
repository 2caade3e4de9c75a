"""A run folder from a stranger is data: nothing in it is ever executed, and no text makes klab fall over."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from klab.grid import Grid, UserError, load_grid
from klab.harness.dispatch.slurm.submission import submissions
from klab.harness.dispatch.status import statuses
from klab.harness.store import Run
from tests.faults.conftest import MakeRun
from tests.support.forked_runs import live, wait

pytestmark = pytest.mark.faults
ROOT = Path(__file__).parents[2]
EXAMPLES = 300
GRID = {
    "name": "fuzz",
    "task": {"name": "addition", "digits": 1},
    "policy": {"name": "tiny"},
    "training": {"updates": 2, "lr": 0.01},
    "objective": {"algorithm": "grpo", "beta": 0.05},
    "axes": {"estimator": ["k1", "k2"], "training.lr": [0.1, 0.2]},
    "seeds": 2,
    "resources": {"gpus": 1, "sbatch": {"nice": 1}},
}
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.dates()
DATA = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(SCALARS, inner, max_size=3), max_leaves=8
)


class Bomb:
    """Unpickling it leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_nothing_is_unpickled(finished: MakeRun, tmp_path: Path) -> None:
    run = finished("stranger", "runs")
    exploded = tmp_path / "exploded"
    bomb = pickle.dumps(Bomb(exploded))
    cell = run.cell(run.cells[0])
    (run.path / "jobs" / "slurm" / "001").mkdir(parents=True)
    for name in ("7_0_result.pkl", "7_submitted.pkl", "submission.json"):
        (run.path / "jobs" / "slurm" / "001" / name).write_bytes(bomb)
    cell.checkpoint.mkdir()
    for path in (cell.checkpoint / "state.safetensors", cell.path / "heartbeat", run.path / "index.json"):
        path.write_bytes(bomb)
    (cell.policy / "pytorch_model.bin").write_bytes(bomb)
    for words in (["status"], ["logs", cell.id], ["report"]):
        command = [sys.executable, "-m", "klab.harness.cli.main", words[0], str(run.path), *words[1:]]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200)
        assert "Traceback" not in done.stderr, done.stderr
    (cell.path / "result.json").unlink()
    assert wait(live(run)) == 0
    assert not exploded.exists()


def read(path: Path) -> Grid | None:
    """The grid, or None where the file is said to be mistaken; everything else is a failure of the test."""
    try:
        return load_grid(path)
    except UserError:
        return None


@settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck))
@given(st.binary(max_size=400))
def test_any_bytes_as_a_grid_file(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "fuzz.yaml").write_bytes(data)
    read(tmp_path / "fuzz.yaml")


@settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_any_value_in_the_place_of_a_sound_one(tmp_path: Path, data: st.DataObject) -> None:
    grid: dict[Any, Any] = {key: dict(value) if isinstance(value, dict) else value for key, value in GRID.items()}
    for _ in range(data.draw(st.integers(1, 3))):
        part = data.draw(st.sampled_from([grid, *(value for value in grid.values() if isinstance(value, dict))]))
        key = data.draw(st.sampled_from(sorted(part, key=str)) if part else st.text(max_size=5))
        part[key] = data.draw(DATA)
    (tmp_path / "fuzz.yaml").write_text(yaml.safe_dump(grid, allow_unicode=True), encoding="utf-8", errors="replace")
    read(tmp_path / "fuzz.yaml")


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\nd: &d [*c, *c]\ne: &e [*d, *d]\nname: [*e, *e, *e, *e]\n" * 1,
        "x: " + "[" * 20_000,
        "!!python/object/apply:os.system ['touch exploded']",
        "seeds: 999999999999\nname: x\ntask: {name: addition}\npolicy: {name: tiny}\n",
        "name: x\ntask: {name: 'os:system'}\npolicy: {name: tiny}\nobjective: {weight: 'os:abort'}\n",
        "name: ../../etc\ntask: {name: addition}\npolicy: {name: tiny}\n",
        "a: 1\na: 2\n",
        "\ufeffname: x\n",
    ],
)
def test_malicious_grid_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fuzz.yaml").write_text(text)
    found = read(tmp_path / "fuzz.yaml")
    assert not (tmp_path / "exploded").exists()
    assert found is None or "/" not in found.name


def test_any_bytes_as_any_stored_file(finished: MakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever stands in a stored file: looking at the run refuses it or does not notice, and never falls over."""
    run = finished("bytes", "runs")
    cell = run.cell(run.cells[0])
    folder = run.path / "jobs" / "slurm" / "001"
    folder.mkdir(parents=True)
    targets = [run.path / name for name in ("manifest.json", "index.json", "lock", "jobs/local-request.json")]
    targets += [
        cell.path / name for name in ("metrics.jsonl", "evaluations.jsonl", "attempts.jsonl", "heartbeat", "claim")
    ]
    targets += [cell.path / name for name in ("result.json", "error.txt")]
    targets.append(folder / "submission.json")
    counts = {"tried": 0, "refused": 0}

    @settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(targets), st.binary(max_size=300) | DATA.map(lambda data: yaml.safe_dump(data).encode()))
    def look(target: Path, data: bytes) -> None:
        before = target.read_bytes() if target.exists() else None
        target.write_bytes(data)
        counts["tried"] += 1
        try:
            opened = Run.open(run.path)
            statuses(opened)
            folder = opened.cell(opened.cells[0])
            folder.metrics(), folder.evaluations(), folder.attempts(), folder.result(), submissions(opened)
        except UserError:
            counts["refused"] += 1
        finally:
            if before is None:
                target.unlink()
            else:
                target.write_bytes(before)

    look()
    with capsys.disabled():
        print(f"{counts['tried']} stored files with arbitrary bytes, {counts['refused']} refused with their name")
