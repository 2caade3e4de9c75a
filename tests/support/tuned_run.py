"""Runs of a study that tunes, whose cells are filled in with results that tests choose."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from klab.grid import Cell, parse_grid
from klab.grid.tuning import launched
from klab.harness.dispatch.tuning import settle
from klab.harness.store import Run

TEXT = """
name: tuned
task: {name: addition, digits: 1}
policy: {name: tiny}
training: {updates: 4, lr: 3.0e-4}
objective: {algorithm: grpo, beta: 0.05}
design: one_at_a_time
axes:
  estimator: [k1, k3]
seeds: 3
tune: {training.lr: [1.0e-4, 3.0e-4, 1.0e-3], seeds: 2}
"""
"""Two configurations × three learning rates × two tuning seeds, and two configurations × three seeds."""

Outcome = tuple[str, float | None]


def create(path: Path, text: str = TEXT) -> Run:
    """The run as a launch creates it, without results."""
    return Run.create(path, launched(parse_grid(text, "tuned.yaml")))


def fill(run: Run, outcome: Callable[[Cell], Outcome | None]) -> None:
    """Write the result of every cell that has none: its state (finished, diverged or failed) and its reward."""
    for identity in run.cells:
        folder = run.cell(identity)
        found = outcome(folder.cell())
        if found is None or folder.result() is not None or folder.error() is not None:
            continue
        state, reward = found
        if state == "failed":
            folder.record_failure("RuntimeError: made up")
            continue
        row: dict[str, Any] = {"update": 4, "reward": reward, "accuracy": reward, "reverse_kl": 0.5, "completions": 8}
        folder.append_evaluations([row])
        folder.write_result({"state": state, "updates": 4, "reward_final": reward})


def settled(run: Run) -> list[str]:
    """Let the arms choose; the ids of the cells that this adds."""
    with run.lock():
        return settle(run)
