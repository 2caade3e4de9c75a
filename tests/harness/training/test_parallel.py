"""Several processes train a cell as one does: the same tokens, the same numbers but for rounding, and bits of their own
that do not depend on what happens to them. The other processes are real ones, which do one test after the other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from training_records import MakeRun, StopAfter, assert_same, finished, numbers, weights

from harness.store import Run
from harness.training import run_cells
from harness.training.parallel import finish
from harness.training.world import join

HERE = Path(__file__).parent
Together = Callable[..., dict[str, str]]

EXACT: dict[str, Any] = {"policy.dtype": "float64"}


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Together]:
    """`run_cells` in two or three processes, of which this one leads."""
    folder = tmp_path_factory.mktemp("peers")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path.cwd())}
    peers = [
        subprocess.Popen([sys.executable, HERE / "peer.py", str(rank), str(folder)], env=environment) for rank in (1, 2)
    ]
    numbers = count()

    def announce(what: dict[str, Any]) -> Path:
        number = next(numbers)
        (folder / "partial").write_text(json.dumps(what))
        (folder / "partial").rename(folder / f"{number}.json")
        return folder / f"{number}.meeting"

    def run_together(run: Run, size: int, **options: Any) -> dict[str, str]:
        meeting = announce({"run": str(run.path), "size": size, "path": [str(HERE)]})
        world = join(0, size, meeting, device=torch.device("cpu"))
        try:
            states = run_cells(run.path, run.cells, world=world, **options)
            finish(world)
        finally:
            world.leave()
        return states

    yield run_together
    announce({})
    assert [peer.wait(30) for peer in peers] == [0, 0]


def assert_close(left: Run, right: Run) -> None:
    """Every cell of two runs has the same records and weights but for rounding."""
    assert left.cells == right.cells
    for identity in left.cells:
        _close(numbers(left, identity), numbers(right, identity), identity)
        mine, theirs = weights(left, identity), weights(right, identity)
        for name, value in mine.items():
            torch.testing.assert_close(value, theirs[name], rtol=1e-10, atol=1e-10)


def _close(left: Any, right: Any, where: str) -> None:
    if isinstance(left, dict):
        assert left.keys() == right.keys(), where
        for name in left:
            _close(left[name], right[name], f"{where}/{name}")
    elif isinstance(left, list):
        assert len(left) == len(right), where
        for place, pair in enumerate(zip(left, right, strict=True)):
            _close(*pair, f"{where}/{place}")
    elif isinstance(left, float):
        assert left == pytest.approx(right, rel=1e-9, abs=1e-10), where
    else:
        assert left == right, where


CELLS: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "a pack, one of whose members compares whole distributions": (
        {"updates_per_rollout": 2},
        [{"estimator": "full", "placement": "loss"}, {"estimator": "full", "placement": "loss", "beta": 0.2}],
    ),
    "micro-batches of single rows": ({"micro_batch": 1, "prompts": 3, "group_size": 2}, [{}]),
    "an exponent of the whole update": (
        {"updates_per_rollout": 2, "minibatches": 2, "lag": 1},
        [{"weight": "adaptive"}, {"weight": "adaptive", "advantage": "greedy_baseline"}],
    ),
    "an environment": ({"prompts": 5}, [{}]),
}


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(("training", "objectives"), CELLS.values(), ids=CELLS.keys())
def test_the_numbers_of_one_process(
    make_run: MakeRun,
    together: Together,
    training: dict[str, Any],
    objectives: list[dict[str, Any]],
    size: int,
    request: pytest.FixtureRequest,
) -> None:
    task = {"name": "letters:Echo"} if "environment" in request.node.callspec.id else None
    cells = [{**objective, **EXACT} for objective in objectives]
    training = {"updates": 4, "evaluate_every": 2, "evaluation_prompts": 5, **training}
    single = finished(make_run("single", training, cells, task=task))
    several = make_run("several", training, cells, task=task)
    assert set(together(several, size).values()) == {"finished"}
    assert_close(single, several)
