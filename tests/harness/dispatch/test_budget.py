"""Budgets: what attempts used, what fits, what is held beyond it, and taken up when it is raised."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from klab.grid import Grid, UserError, load_grid, parse_grid
from klab.grid.schema.budget import Budget
from klab.harness.cli.main import main
from klab.harness.dispatch.backends import Pack
from klab.harness.dispatch.budget import Forecast, Price, judge
from klab.harness.dispatch.launch import launch
from klab.harness.dispatch.local.inline import InlineExecutor
from klab.harness.dispatch.packing.balance import START_SECONDS
from klab.harness.dispatch.packing.estimate import cell_seconds
from klab.harness.dispatch.status import count, statuses
from klab.harness.store import Run
from klab.harness.store.usage import Usage, used

MakeGrid = Callable[..., Grid]
HOUR = 3600.0


def start(at: float, pid: int = 1, **more: Any) -> dict[str, Any]:
    plain = {"event": "started", "at": at * HOUR, "host": "n1", "pid": pid, "processes": 1, "threads": 1, "gpus": 0}
    return {**plain, **more}


def end(at: float, event: str = "ended") -> dict[str, Any]:
    return {"event": event, "at": at * HOUR, "state": "finished"}


@pytest.mark.parametrize(
    ("attempts", "gpu", "cpu", "clock"),
    [
        ([[start(1, gpus=2, threads=4), end(3)]], 4, 8, 2),
        ([[start(1, gpus=1, processes=3, threads=2), end(2)]], 1, 6, 1),
        # two cells of one process are one job; another process beside it is not
        ([[start(1, gpus=1), end(3)], [start(1.5, gpus=1), end(3)]], 2, 2, 2),
        ([[start(1, gpus=1), end(3)], [start(2, pid=2, gpus=1), end(4)]], 4, 4, 3),
        # interrupted, and again; the pause counts for nothing
        ([[start(1), end(2), start(5, pid=2), end(6)]], 0, 2, 2),
        ([[start(1), end(4, "cancelled")]], 0, 3, 3),
        # killed: until the last sign of life that the next attempt noted
        ([[start(1), start(9, pid=2, seen=2.5 * HOUR), end(10)]], 0, 2.5, 2.5),
        ([[start(1), start(9, pid=2), end(10)]], 0, 1, 1),
        # before the number of GPUs was recorded
        ([[{k: v for k, v in start(1, gpu="0,3").items() if k != "gpus"}, end(2)]], 2, 1, 1),
        ([[{k: v for k, v in start(1, gpu="-1").items() if k != "gpus"}, end(2)]], 0, 1, 1),
    ],
)
def test_what_attempts_used(
    make_grid: MakeGrid, place: Path, attempts: list[list[dict[str, Any]]], gpu: float, cpu: float, clock: float
) -> None:
    run = Run.create(place / "runs/little", make_grid(seeds=2))
    for identity, events in zip(run.cells, attempts, strict=False):
        for event in events:
            run.cell(identity).append_attempt(event)
    found = used(run, now=100 * HOUR)
    assert (found.gpu_hours, found.cpu_hours, found.hours) == pytest.approx((gpu, cpu, clock))


def test_a_cell_that_runs_counts_until_now_and_a_dead_one_until_its_heartbeat(make_grid: MakeGrid, place: Path) -> None:
    run = Run.create(place / "runs/little", make_grid(seeds=2))
    lives, died = map(run.cell, run.cells)
    lives.claim()
    try:
        holder = lives.claim_holder() or {}
        lives.append_attempt(start(0, pid=holder["pid"]))
        died.append_attempt(start(0, pid=-5))
        died.write_heartbeat({"update": 1})
        beat = (died.heartbeat() or {})["at"]
        found = used(run, now=beat + 2 * HOUR)
        assert found.cpu_hours == pytest.approx((beat + 2 * HOUR + beat) / HOUR)
    finally:
        lives.release_claim()


PACKS = [Pack((name,)) for name in "abcd"]


@pytest.mark.parametrize(
    ("limits", "spent", "going", "kept"),
    [
        ({"gpu_hours": 8.0}, Usage(), Usage(), 4),
        ({"gpu_hours": 7.9}, Usage(), Usage(), 3),
        ({"gpu_hours": 8.0}, Usage(gpu_hours=2.1), Usage(), 2),
        ({"gpu_hours": 8.0}, Usage(gpu_hours=2.0), Usage(gpu_hours=2.1), 1),
        ({"gpu_hours": 1.9}, Usage(), Usage(), 0),
        ({"gpu_hours": 8.0, "cpu_hours": 16.0}, Usage(), Usage(), 2),
        ({"hours": 2.0}, Usage(), Usage(), 4),  # two at a time
        ({"hours": 1.0}, Usage(), Usage(), 2),
        ({"gpu_hours": 8.0}, Usage(gpu_hours=9), Usage(), 0),
    ],
)
def test_packs_fit_in_order(limits: dict[str, float], spent: Usage, going: Usage, kept: int) -> None:
    expected = Forecast(Price(gpus=2, cores=8), (HOUR,) * 4, "measured", 2)
    found = judge(Budget(**limits), PACKS, expected, spent, going)
    assert found.kept == tuple(PACKS[:kept])
    assert found.beyond == tuple(PACKS[kept:])
    assert bool(found.needed) == (kept < 4)


def test_what_is_not_known_is_kept_until_the_budget_is_used_up() -> None:
    budget = Budget(gpu_hours=1.0)
    assert judge(budget, PACKS, None, Usage(gpu_hours=0.99)).kept == tuple(PACKS)
    assert judge(budget, PACKS, None, Usage(gpu_hours=1.0)).kept == ()


def with_budget(grid: Grid, **limits: float) -> Grid:
    text = json.dumps({**json.loads(grid.text), "budget": limits})
    Path(grid.file).write_text(text)
    return load_grid(grid.file)


def test_jobs_hold_their_cells_when_the_budget_is_used_up_and_a_larger_one_takes_them_up(
    make_grid: MakeGrid, place: Path
) -> None:
    plain = make_grid(seeds=3, resources={"cells_per_job": 1})
    run = Run.create(place / "runs/little", with_budget(plain, cpu_hours=1e-7))
    done = launch(run, InlineExecutor(), workers=1)
    assert len(done.packs) == 3  # what cells take was not known
    assert count(statuses(run)) == {"finished": 1, "held": 2}
    assert "beyond the budget of 1e-07 CPU-hours" in next(row.detail for row in statuses(run) if row.state == "held")
    with pytest.raises(UserError, match=r"budget\.cpu_hours: leaves no room for any of the 2 cells"):
        launch(run, InlineExecutor(), workers=1)
    assert count(statuses(run)) == {"finished": 1, "held": 2}
    run = Run.create(run.path, with_budget(plain, cpu_hours=10.0))
    launch(run, InlineExecutor(), workers=1)
    assert count(statuses(run)) == {"finished": 3}


def test_a_launch_submits_what_is_expected_to_fit(make_grid: MakeGrid, place: Path) -> None:
    measured = Run.create(place / "runs/measured", make_grid("measured", seeds=1))
    launch(measured, InlineExecutor(), workers=1)
    plain = make_grid(seeds=4, resources={"cells_per_job": 1})
    cells = {cell.id: cell.resolved() for cell in plain.cells}
    known = cell_seconds(cells, place / "runs")
    assert known is not None
    pack = (START_SECONDS + next(iter(known[0].values()))) / HOUR
    run = Run.create(place / "runs/little", with_budget(plain, cpu_hours=2.5 * pack))
    done = launch(run, InlineExecutor(), workers=1)
    assert done.verdict is not None
    assert [len(done.packs), len(done.verdict.beyond)] == [2, 2]
    assert done.verdict.needed["cpu_hours"] == pytest.approx(4 * pack, rel=1e-6)
    assert count(statuses(run)) == {"finished": 2, "held": 2}
    assert any("2 cells are beyond the budget and held. Raise budget.cpu_hours to" in x for x in done.verdict.lines())


def test_plan_and_status_show_it(make_grid: MakeGrid, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid = make_grid(seeds=4, resources={"cells_per_job": 1, "minutes": 60})
    with_budget(grid, cpu_hours=2.5)
    assert main(["plan", "little.yaml", "--no-check", "--no-merge", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["budget"]
    assert found["source"] == "at most: every job's time limit on Slurm"
    assert len(found["beyond"]) == 2
    assert found["needed"] == {"cpu_hours": 4.0}
    assert main(["plan", "little.yaml", "--no-check", "--no-merge"]) == 0
    shown = capsys.readouterr().out
    assert "2 cells would be beyond the budget and held. Raise budget.cpu_hours to 4" in shown
    run = Run.create(place / "runs/little", load_grid("little.yaml"))
    run.cell(run.cells[0]).append_attempt(start(1))
    run.cell(run.cells[0]).append_attempt(end(2.5))
    assert main(["status", "little"]) == 0
    assert "budget: 1.5 of 2.5 CPU-hours used" in capsys.readouterr().out
    assert main(["status", "little", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["budget"]["used"]["cpu_hours"] == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({}, "budget: limits nothing"),
        ({"gpu_hour": 3}, "did you mean 'gpu_hours'"),
        ({"gpu_hours": 0}, "budget.gpu_hours"),
        ({"gpu_hours": True}, "budget.gpu_hours"),
        (200, "budget: not a mapping"),
    ],
)
def test_mistakes_are_named(budget: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_grid(json.dumps({"name": "study", "task": "addition", "budget": budget}), "study.yaml")
    assert message in str(caught.value)


def test_a_budget_is_no_part_of_a_cell() -> None:
    text = json.dumps({"name": "study", "task": "addition"})
    plain = parse_grid(text, "study.yaml")
    limited = parse_grid(json.dumps({**json.loads(text), "budget": {"hours": 2}}), "study.yaml")
    assert [cell.id for cell in plain.cells] == [cell.id for cell in limited.cells]
    assert limited.budget is not None
    assert math.isclose(limited.budget.limits["hours"], 2.0)
    assert replace(limited, budget=None).budget is None
