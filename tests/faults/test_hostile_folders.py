"""All reading commands over run folders from a stranger: one message, in bounded time and memory, and nothing runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from klab.harness.store import Run, files
from tests.reports.synthetic import write_run

pytestmark = pytest.mark.faults

STUDY = """
name: hostile
task: {name: addition, digits: 2}
training: {updates: 4, updates_per_rollout: 2, evaluate_every: 2}
objective: {algorithm: grpo, beta: 0.05}
axes: {estimator: [k1, k2, k3], training.lr: [0.1, 0.2]}
seeds: 2
"""
IN_A_CELL = ("metrics.jsonl", "evaluations.jsonl", "attempts.jsonl", "heartbeat", "claim", "result.json", "error.txt")
IN_THE_RUN = ("index.json", "lock", "report/gradients.json")
ESCAPES = "\x1b]0;owned\x07\x1b[2J\x9b31m[bold]x[/bold]"
SECONDS = 120
MEGABYTES = {"status": 500, "logs": 500, "watch": 500, "report": 1500, "compare": 1500}


def fifo(path: Path) -> None:
    os.mkfifo(path)


def loop(path: Path) -> None:
    path.symlink_to(path.name)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def folder(path: Path) -> None:
    path.mkdir()


def zeros(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(2**30)


def escapes(path: Path) -> None:
    path.write_text(f"schema: 1\n{ESCAPES}\n")


MEASURED = """
import os, sys
pid = os.posix_spawn(sys.argv[2], sys.argv[2:], os.environ)
_, status, usage = os.wait4(pid, 0)
with open(sys.argv[1], "w") as file:
    file.write(str(usage.ru_maxrss))
sys.exit(os.waitstatus_to_exitcode(status) % 256)
"""
"""Runs a command and writes its peak of memory; a small process of its own, since a fork begins with its parent's."""


def command(*words: str, where: Path) -> tuple[int, str, float]:
    """Exit code, everything printed, and the peak of memory in MB."""
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", MEASURED, "peak", sys.executable, "-m", "klab.harness.cli.main", *words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=where,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
        timeout=SECONDS,
    )
    return done.returncode, done.stdout.decode(errors="surrogateescape"), int((where / "peak").read_text()) / 1024


@pytest.mark.parametrize("make", [fifo, loop, device, folder, zeros, escapes])
def test_every_reading_command_over_a_hostile_folder(tmp_path: Path, make: Callable[[Path], None]) -> None:
    run = write_run(tmp_path / "hostile", STUDY)
    (run.path / "report").mkdir(exist_ok=True)
    targets = [run.cell(identity).path / name for identity, name in zip(run.cells, IN_A_CELL, strict=False)]
    for target in [*targets, *(run.path / name for name in IN_THE_RUN)]:
        target.unlink(missing_ok=True)
        make(target)
    first, last = run.cells[0], run.cells[-1]
    for words in (
        ["status", str(run.path)],
        *(["logs", str(run.path), identity] for identity in run.cells[: len(IN_A_CELL)]),
        ["watch", str(run.path), "--once"],
        ["compare", f"{run.path}:{first}", f"{run.path}:{last}"],
        ["report", str(run.path)],
    ):
        code, printed, megabytes = command(*words, where=tmp_path)
        assert code in (0, 1, 2), (words, printed[-2000:])
        assert "Traceback" not in printed, (words, printed[-2000:])
        assert not any(sign in printed for sign in ("\x1b]", "\x1b[2J", "\x9b", "\x07")), words
        assert megabytes < MEGABYTES[words[0]], (words, megabytes)


def renamed(run: Run, **fields: object) -> None:
    path = run.path / "manifest.json"
    manifest = files.read_record(path)
    assert manifest is not None
    files.replace(path, files.encode_record(manifest | fields))


@pytest.mark.parametrize(
    "fields",
    [
        {"track": ["wandb", "tensorboard"]},
        {"code": {"os:system": {"file": "/etc/passwd", "digest": "0"}}},
        {"code": {"./zero.py:x": {"folder": "/dev", "module": "zero", "by_file": True, "files": {"zero": "0"}}}},
        {"inputs": {f"task.path {place}": {"path": place, "sha256": "0"} for place in ("/", "/proc", "/dev/zero")}},
        {"description": ESCAPES, "commit": ESCAPES},
        {"versions": {"python": ESCAPES}, "hardware": {"processor": ESCAPES}},
        {"resources": {"partition": ESCAPES}},
    ],
    ids=lambda fields: "-".join(fields),
)
def test_no_field_of_a_manifest_commands_anything(tmp_path: Path, fields: dict[str, object]) -> None:
    run = write_run(tmp_path / "hostile", STUDY)
    renamed(run, **fields)
    before = {path for path in tmp_path.rglob("*") if "report" not in path.parts}
    for words in (["status", str(run.path)], ["watch", str(run.path), "--once"], ["report", str(run.path)]):
        code, printed, _ = command(*words, where=tmp_path)
        assert code in (0, 1, 2), (words, printed[-2000:])
        assert "Traceback" not in printed, (words, printed[-2000:])
        assert not any(sign in printed for sign in ("\x1b]", "\x1b[2J", "\x9b", "\x07")), words
    assert not (run.path / "report" / "tensorboard").exists()
    after = {path for path in tmp_path.rglob("*") if "report" not in path.parts}
    assert {path.name for path in after - before} <= {"peak", "index.json"}


def test_modules_in_the_working_folder_are_not_loaded(tmp_path: Path) -> None:
    """Optional packages, too: a `tensorboard.py` or `wandb.py` beside the run stays data."""
    run = write_run(tmp_path / "hostile", STUDY)
    for name in ("yaml", "queue", "wandb", "tensorboard", "peft", "vllm", "math_verify", "pandas", "typer", "klab_x"):
        (tmp_path / f"{name}.py").write_text("open('loaded', 'a').write(__name__ + '\\n')\n")
    for words in (["status", str(run.path)], ["report", str(run.path)], ["doctor"], ["axes"], ["claims", "C13"]):
        process = subprocess.run(
            [Path(sys.executable).parent / "klab", *words],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=SECONDS,
            env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        )
        assert "Traceback" not in process.stderr, (words, process.stderr[-2000:])
    assert not (tmp_path / "loaded").exists(), (tmp_path / "loaded").read_text()
    assert json.loads((run.path / "report" / "tables" / "summary.json").read_text())["comparisons"]
