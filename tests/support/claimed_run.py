"""Runs of a study with claims, whose cells are filled in with scores that tests choose."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from klab.grid import Cell, Grid, parse_grid
from klab.grid.tuning import launched
from klab.harness.store import Run
from klab.reports import Study, load_run

Scores = Mapping[str, float]
NOISE = [0.011, -0.004, 0.007, -0.012, 0.001, -0.003]
"""A seed's own part of the score of the cells of one estimator."""


def grid_of(*claims: Mapping[str, Any], **sections: Any) -> Grid:
    written = [{"claim": f"claim {index}", "expect": "lower", **claim} for index, claim in enumerate(claims)]
    data = {
        "name": "study",
        "task": {"name": "addition", "digits": 1},
        "training": {"updates": 4},
        "objective": {"algorithm": "grpo", "beta": 0.05},
        "axes": {"estimator": ["k1", "k3"]},
        "seeds": 6,
        "claims": written,
        **sections,
    }
    return parse_grid(json.dumps({key: value for key, value in data.items() if value}), "study.yaml")


def fill(run: Run, scores: Callable[[Cell], Scores | None]) -> Run:
    """Write a result to every cell without one: `reward` as held-out reward, everything else to its result."""
    for identity in run.cells:
        folder = run.cell(identity)
        found = scores(folder.cell())
        if found is None or folder.result() is not None:
            continue
        given = {"state": "finished", "updates": 4, **found}
        reward = given.pop("reward")
        row = {"update": 4, "reward": reward, "accuracy": reward, "reverse_kl": 0.5, "completions": 8}
        folder.append_evaluations([row])
        folder.write_result({"reward_final": reward, **given})
    return run


def study_of(folder: Path, grid: Grid, scores: Callable[[Cell], Scores | None]) -> Study:
    return load_run(fill(Run.create(folder, launched(grid)), scores).path)


def rewards(worse: float = 0.1) -> Callable[[Cell], Scores]:
    """k1 is worse than the others by `worse` on average; seeds differ by much more than cells within a seed."""

    def reward(cell: Cell) -> Scores:
        drawn = NOISE[cell.seed % 6] * (cell.objective.estimator == "k1")
        return {"reward": 0.6 + 0.02 * cell.seed - worse * (cell.objective.estimator == "k1") + drawn}

    return reward
