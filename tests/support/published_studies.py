"""Studies of every kind that a document shows: with claims and a confirmation, tuned, a fraction, with a proxy."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from klab.grid import Cell, parse_grid
from klab.harness.exact.drift_names import ON_POLICY
from klab.harness.store import Run, files
from klab.reports import load_run
from klab.reports.comparison import compare_all
from klab.reports.confirmation import confirmation
from tests.reports.synthetic import write_run
from tests.support import tuned_run

CLAIMED = """
name: claimed
description: Which estimator, and where?
task: {name: addition, digits: 1}
policy: {name: tiny}
training: {updates: 4}
objective: {algorithm: grpo, beta: 0.05}
axes:
  estimator: [k1, k2, k3]
  placement: [loss, reward]
seeds: 5
claims:
  - {claim: k1 is a bad loss, source: Somebody 2025, cells: {estimator: k1, placement: loss}, expect: lower}
  - {claim: The placement of k3 does not matter, cells: {placement: reward}, where: {estimator: k3}, expect: equal}
"""

FRACTION = """
name: fraction
description: Which of three axes act together?
task: {name: addition, digits: 2}
training: {updates: 4, updates_per_rollout: 2, lr: 1.0e-4}
objective: {algorithm: grpo, estimator: k1, beta: 0.05}
design: {name: fractional, cells: 20, holdout: 4}
axes:
  estimator: [k1, k2, k3]
  placement: [loss, reward]
  weight: [ppo_clip, {name: power, q: 0.5}, truncate]
  training.lr: [1.0e-4, 3.0e-4]
seeds: 3
"""


def noise(cell: Cell) -> float:
    """Between −0.01 and 0.01, the same whenever it is asked for."""
    return int(hashlib.sha256(f"{cell.group} {cell.seed}".encode()).hexdigest()[:6], 16) / 2**24 * 0.02 - 0.01


def reward(cell: Cell) -> float:
    """k1 as a loss is worse than all others, which do not differ."""
    return 0.7 - 0.2 * (cell.objective.estimator == "k1" and cell.objective.placement == "loss") + noise(cell)


def fill(run: Run, **more: Any) -> Run:
    """Write the result and three evaluations of every cell, and that it took an hour on two cores."""
    for place, identity in enumerate(run.cells):
        folder = run.cell(identity)
        cell = folder.cell()
        score = reward(cell)
        start = {
            "event": "started",
            "at": 1.75e9 + 3600 * place,
            "pid": 1,
            "host": "here",
            "processes": 1,
            "threads": 2,
        }
        folder.append_attempt(start)
        folder.append_attempt({"event": "ended", "at": 1.75e9 + 3600 * place + 3600})
        for update, share in ((0, 0.2), (2, 1.1), (4, 1.0)):
            row = {"update": update, "reward": share * score, "accuracy": score, "reverse_kl": 0.1 * update}
            parts = {"parts": {"proxy": 0.5 * update, "gold": share * score}} if more.get("proxy") else {}
            folder.append_evaluations([{**row, "completions": 8, "reward_se": 0.01, **parts}])
        result = {"state": "finished", "updates": 4, "reward_final": score, "reverse_kl_final": 0.4}
        folder.write_result({**result, "versions": {"klab": "0.1.0", "torch": "2.9.0"}})
    return run


def claimed(folder: Path) -> Run:
    run = fill(Run.create(folder / "claimed", parse_grid(CLAIMED, "claimed.yaml")))
    groups = [str(run.resolved(identity)["group"]) for identity in run.cells[::5]]
    rows = [
        {"group": group, "drift": ON_POLICY, "bias": 0.1 * place, "cosine": 1.0, "variance": 1.0 + place}
        for place, group in enumerate(groups)
    ]
    (run.path / "report").mkdir()
    files.replace(run.path / "report" / "gradients.json", files.encode_record({"rows": rows}))
    return run


def confirmed(folder: Path, explored: Run) -> Run:
    """The best two cells and the baseline on six fresh seeds."""
    study = load_run(explored.path)
    grid, record = confirmation(study, compare_all(study), 2, 6, "claimed-confirm")
    run = Run.create(folder / "claimed-confirm", grid, explored.created)
    with run.lock():
        run.grow((), **record)
    return fill(run)


def tuned(folder: Path) -> Run:
    run = tuned_run.create(folder / "tuned", tuned_run.TEXT.replace("seeds: 3", "seeds: 4"))

    def outcome(cell: Cell) -> tuple[str, float]:
        return "finished", reward(cell) - 0.05 * (cell.training.lr == 1e-3)

    tuned_run.fill(run, outcome)
    tuned_run.settled(run)
    tuned_run.fill(run, outcome)
    return run


def fraction(folder: Path) -> Run:
    return write_run(folder / "fraction", FRACTION)


def proxied(folder: Path) -> Run:
    text = CLAIMED.replace("name: claimed", "name: proxied").partition("claims:")[0]
    return fill(Run.create(folder / "proxied", parse_grid(text, "proxied.yaml")), proxy=True)
