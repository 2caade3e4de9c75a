"""Several processes train a cell as one does: the same tokens, the same numbers but for rounding, and bits of their own
that do not depend on what happens to them. The other processes are real ones, which do one test after the other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from klab.harness.store import Run
from klab.harness.training import run_cells
from klab.harness.training.distributed.process_group import ProcessGroupLost
from klab.harness.training.distributed.rendezvous import rendezvous
from klab.harness.training.distributed.worker import release_workers
from tests.support.training_records import MakeRun, StopAfter, assert_same, finished, numbers, weights

HERE = Path(__file__).parent
Together = Callable[..., dict[str, str]]

EXACT: dict[str, Any] = {"policy.dtype": "float64"}


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Together]:
    """`run_cells` in two or three processes, of which this one leads."""
    folder = tmp_path_factory.mktemp("workers")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path.cwd())}
    workers = [
        subprocess.Popen([sys.executable, HERE / "worker_process.py", str(rank), str(folder)], env=environment)
        for rank in (1, 2)
    ]
    numbers = count()

    def announce(what: dict[str, Any]) -> Path:
        number = next(numbers)
        (folder / "partial").write_text(json.dumps(what))
        (folder / "partial").rename(folder / f"{number}.json")
        return folder / f"{number}.meeting"

    def run_together(run: Run, size: int, cells: Sequence[str] = (), **options: Any) -> dict[str, str]:
        meeting = announce({"run": str(run.path), "size": size, "path": [str(HERE.parents[1] / "support")]})
        process_group = rendezvous(0, size, meeting, device=torch.device("cpu"))
        try:
            states = run_cells(run.path, cells or run.cells, process_group=process_group, **options)
            release_workers(process_group)
        finally:
            process_group.close()
        return states

    yield run_together
    announce({})
    assert [worker.wait(600) for worker in workers] == [0, 0]


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
    "groups that are drawn again, by another sampler": (
        {"equal_groups": "refill", "group_size": 2, "sampler": {"temperature": 1.5, "correction": "tis"}, "lag": 1},
        [{}, {"advantage": "greedy_baseline"}],
    ),
    "a critic": ({"critic": {"kind": "model"}, "updates_per_rollout": 2}, [{"advantage": "gae"}]),
    "groups that leave the update": (
        {"equal_groups": "drop", "truncated": "mask", "prompts": 5, "group_size": 2, "overlong_buffer": 2},
        [{"placement": "loss", "aggregation": "token_mean"}, {"advantage": "batch_norm"}],
    ),
}


@pytest.mark.parametrize(
    ("training", "objectives", "size"),
    [(*cell, 2 + number % 2) for number, cell in enumerate(CELLS.values())],
    ids=CELLS.keys(),
)
def test_the_numbers_of_one_process(
    make_run: MakeRun,
    together: Together,
    training: dict[str, Any],
    objectives: list[dict[str, Any]],
    size: int,
    request: pytest.FixtureRequest,
) -> None:
    task = {"name": "letters_task:Echo"} if "environment" in request.node.callspec.id else None
    cells = [{**objective, **EXACT} for objective in objectives]
    training = {"updates": 4, "evaluate_every": 2, "evaluation_prompts": 5, **training}
    single = finished(make_run("single", training, cells, task=task))
    several = make_run("several", training, cells, task=task)
    assert set(together(several, size).values()) == {"finished"}
    assert_close(single, several)


def test_the_same_bits_whenever_as_many_processes_train(make_run: MakeRun, together: Together) -> None:
    """Repeated, and interrupted after every second update, alone and in a pack."""
    training = {"updates_per_rollout": 2, "prompts": 5, "updates": 5}
    through = make_run("through", training, seeds=2)
    assert set(together(through, 2).values()) == {"finished"}
    broken = make_run("broken", training, seeds=2)
    for _ in range(2):
        assert set(together(broken, 2, stop=StopAfter(2)).values()) == {"interrupted"}
    assert set(together(broken, 2, cells=broken.cells[:1]).values()) == {"finished"}
    assert set(together(broken, 2).values()) == {"finished"}
    for identity in through.cells:
        assert_same(through, broken, identity)
        assert through.cell(identity).result()["hardware"]["processes"] == 2


def test_more_processes_than_prompts(make_run: MakeRun, together: Together) -> None:
    training = {"prompts": 1, "group_size": 2, "evaluation_prompts": 1, "updates": 3}
    single = finished(make_run("single", training, [EXACT]))
    several = make_run("several", training, [EXACT])
    together(several, 3)
    assert_close(single, several)


def test_what_one_process_cannot_do_fails_the_guilty_cell_and_no_other(make_run: MakeRun, together: Together) -> None:
    """The reward of the broken cell raises in the last process only."""
    cells = [EXACT, {**EXACT, "task.fail_rank": 2}]
    run = make_run("broken", {"prompts": 3, "updates": 3}, cells)
    whole, broken = run.cells
    assert together(run, 3) == {whole: "finished", broken: "failed"}
    error = run.cell(broken).error() or ""
    assert "the reward is broken" in error
    assert "(process 2 of 3)" in error
    assert "in score" in error  # the traceback of that process
    alone = finished(make_run("alone", {"prompts": 3, "updates": 3}, [EXACT]))
    _close(numbers(alone, whole), numbers(run, whole), whole)


def test_processes_whose_weights_differ_end_without_a_result(make_run: MakeRun, together: Together) -> None:
    """One process skips the steps that the other makes."""
    run = make_run("torn", {"updates": 2}, [{"weight": {"name": "letters_task:torn", "process": 1}}])
    with pytest.raises(ProcessGroupLost, match="process 1 of 2 does not have the numbers of process 0 any more"):
        together(run, 2)
    folder = run.cell(run.cells[0])
    assert (folder.result(), folder.error(), len(folder.metrics())) == (None, None, 1)


@pytest.mark.parametrize("rank", [0, 1])
def test_out_of_memory_in_one_process_halves_the_pieces_of_all(
    make_run: MakeRun, together: Together, rank: int, capfd: pytest.CaptureFixture[str]
) -> None:
    training = {"updates": 3, "updates_per_rollout": 3}
    cells = [{**EXACT, "weight": {"name": "letters_task:hungry", "process": rank}}]
    run = make_run("short", training, cells)
    assert set(together(run, 2).values()) == {"finished"}
    assert "goes on with micro-batches of 4 rows" in capfd.readouterr().out
    assert_close(finished(make_run("single", training, cells)), run)
