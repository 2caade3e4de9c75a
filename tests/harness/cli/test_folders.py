"""klab beside any project: folders with files of every name that could be taken for something else."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import textwrap
from pathlib import Path
from typing import Any

import pytest

from klab.harness.store import Run

pytestmark = pytest.mark.faults
COMMANDS = {
    "sbatch": 'cp "$1" "$FAKE/script"; echo "Submitted batch job 101"',
    "scontrol": 'printf "ClusterName = lab\\nMaxArraySize = 1001\\n"',
    "squeue": "",
    "sacct": "",
    "srun": 'while [ "$1" != sh ]; do shift; done; exec "$@"',
}
"""Stand-ins for Slurm's commands; the job that `sbatch` takes is run by the test."""

IN_THE_WAY = ("grid", "reports", "harness", "queue", "yaml", "random", "torch", "numpy", "submitit", "typer", "rich")

SOFT = "def soft(ratio, advantage, *, tau=1.0):\n    return (ratio / tau).tanh() * tau\n"

TASK = """
    from itertools import product
    from klab.tasks import Example, Score
    from tasks.letters import LETTERS
    from . import letters

    class Copying:
        name, alphabet, max_new_tokens, interactive = "copying", letters.LETTERS, 2, False
        def split(self, name):
            words = ["".join(each) for each in product(LETTERS, repeat=2)]
            return [Example(word, word[0]) for word in (words[::4] if name == "held_out" else words[1::2])]
        def score(self, example, completion):
            return Score(float(completion.count(example.answer)), completion == example.answer)
        def respond(self, example, transcript):
            return None
"""


class Folder:
    """A user's folder and the klab of some Python."""

    def __init__(self, path: Path, python: Path) -> None:
        self.path = path
        self.python = python
        self.environment = {**os.environ, "OMP_NUM_THREADS": "1", "FAKE": str(path / "slurm")}
        self.environment.pop("PYTHONPATH", None)

    def write(self, name: str, text: str) -> None:
        file = self.path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(textwrap.dedent(text))

    def grid(self, policy: Path, **settings: Any) -> None:
        training = {"updates": 2, "prompts": 2, "group_size": 2, "updates_per_rollout": 2, "lr": 0.01}
        training |= {"evaluate_every": 50, "evaluation_prompts": 2, "evaluation_samples": 1}
        task = {"name": "addition", "digits": 1}
        given = {"name": "mine", "task": task, "policy": {"name": "hf", "model": str(policy)}, "training": training}
        self.write("mine.yaml", json.dumps({**given, **settings}))

    def klab(self, *words: str, code: int = 0) -> str:
        command = [str(self.python), "-m", "klab.harness.cli.main", *words]
        done = subprocess.run(command, cwd=self.path, env=self.environment, capture_output=True, text=True)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout

    def slurm(self) -> None:
        """Launch on stand-ins for Slurm and do what the job's first element would."""
        bin_ = self.path / "slurm" / "bin"
        bin_.mkdir(parents=True)
        for name, line in COMMANDS.items():
            (bin_ / name).write_text(f"#!/bin/sh\n{line}\n")
            (bin_ / name).chmod(0o755)
        self.environment["PATH"] = f"{bin_}:{os.environ['PATH']}"
        self.klab("launch", "mine.yaml", "--on", "slurm", "--runs", "slurm/runs")
        job = {"SLURM_JOB_ID": "101", "SLURM_ARRAY_JOB_ID": "101", "SLURM_ARRAY_TASK_ID": "0", "SLURM_PROCID": "0"}
        job |= {"SLURM_JOB_NUM_NODES": "1", "SLURM_NTASKS": "1", "SLURM_JOB_NODELIST": "lab1"}
        command = ["bash", str(self.path / "slurm" / "script")]
        done = subprocess.run(command, cwd=self.path, env=self.environment | job, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        run = Run.open(self.path / "slurm/runs/mine")
        assert (run.cell(run.cells[0]).result() or {}).get("state") == "finished", run.cell(run.cells[0]).error()


@pytest.fixture
def folder(installed_python: Path, tmp_path: Path) -> Folder:
    return Folder(tmp_path / "project", installed_python)


def test_files_that_are_in_the_way_are_not_looked_at(folder: Folder, digits: Path) -> None:
    for name in IN_THE_WAY:
        folder.write(f"{name}.py", "raise RuntimeError('this file was imported')")
    (folder.path / "tasks").mkdir()
    (folder.path / "wandb").mkdir()
    folder.write("weights.py", SOFT)
    folder.grid(digits, axes={"weight": ["ppo_clip", "weights:soft"]})
    assert "2 cells" in folder.klab("plan", "mine.yaml")
    assert "2 finished" in folder.klab("launch", "mine.yaml", "--on", "local")
    cell = Run.open(folder.path / "runs/mine").cells[1]
    assert "bit for bit" in folder.klab("rerun", "mine", cell)
    for words in (("status", "mine"), ("logs", "mine", cell), ("axes",), ("doctor",)):
        folder.klab(*words)
    folder.slurm()


def test_code_of_any_name_is_found_by_import_path_and_by_file(folder: Folder, digits: Path) -> None:
    folder.write("tasks/__init__.py", "")
    folder.write("tasks/letters.py", "LETTERS = '0123'\n")
    folder.write("tasks/mine.py", TASK)
    folder.write("grid.py", SOFT)
    folder.write("reports.py", SOFT)
    folder.write("queue.py", "from queue import SimpleQueue\n" + SOFT)
    folder.write("yaml.py", "from yaml import safe_load\n" + SOFT)
    folder.write("more/weights.py", "from . import queue\nimport beside\nsoft = beside.soft\n")
    folder.write("more/beside.py", SOFT)
    folder.write("more/queue.py", "")
    weights = ["grid:soft", "reports:soft", "queue:soft", {"name": "yaml:soft", "tau": 2.0}, "./more/weights.py:soft"]
    folder.grid(digits, task={"name": "tasks.mine:Copying"}, axes={"weight": weights})
    assert "5 cells" in folder.klab("plan", "mine.yaml")
    assert "5 finished" in folder.klab("launch", "mine.yaml", "--on", "here")
    run = Run.open(folder.path / "runs/mine")
    assert "bit for bit" in folder.klab("rerun", "mine", run.cells[-2])
    stored = [run.cell(cell).metrics() for cell in run.cells]
    for name in ("tasks", "more"):
        shutil.rmtree(folder.path / name)
    assert "bit for bit" in folder.klab("rerun", "mine", run.cells[-1])  # from the run's copies
    assert [run.cell(cell).metrics() for cell in run.cells] == stored
