"""Every configuration keeps its best setting, once and for all, and the second stage follows by itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from klab.grid import Cell, Grid, UserError, load_grid, parse_grid
from klab.grid.score import parse_score
from klab.grid.tuning import FIRST_SEED, launched
from klab.harness.cli.main import main
from klab.harness.dispatch.cancel import cancel
from klab.harness.dispatch.launch import launch
from klab.harness.dispatch.local.backend import LocalExecutor
from klab.harness.dispatch.local.inline import InlineExecutor
from klab.harness.dispatch.status import count, statuses
from klab.harness.dispatch.tuning import pending, resolved_cells, resume
from klab.harness.store import Run
from klab.harness.store.cell_score import cell_score
from klab.harness.store.tuning import choices
from klab.reports import load_run
from klab.reports.scores import run_scores
from tests.reports.synthetic import QUICKSTART, write_run
from tests.support.run_processes import wait_for
from tests.support.tuned_run import TEXT, create, fill, settled

MakeGrid = Callable[..., Grid]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return create(tmp_path / "run")


def _chosen(run: Run) -> dict[str, float]:
    """By estimator, the learning rate that was kept."""
    rates = {}
    for choice in choices(run.path).values():
        cell = next(run.cell(each).cell() for each in run.cells if run.resolved(each)["group"] == choice.group)
        rates[cell.objective.estimator] = cell.training.lr
    return rates


def _best_at(rate: float) -> Callable[[Cell], tuple[str, float]]:
    return lambda cell: ("finished", 0.9 - abs(cell.training.lr - rate) * 100 + 0.01 * (cell.seed % 2))


def test_the_best_mean_is_kept_and_its_cells_are_ordinary_ones(run: Run) -> None:
    fill(run, lambda cell: _best_at(1e-4 if cell.objective.estimator == "k1" else 1e-3)(cell))
    fresh = settled(run)
    assert _chosen(run) == {"k1": 1e-4, "k3": 1e-3}
    cells = [run.cell(identity).cell() for identity in fresh]
    assert {(cell.objective.estimator, cell.training.lr, cell.seed) for cell in cells} == {
        (estimator, rate, seed) for estimator, rate in (("k1", 1e-4), ("k3", 1e-3)) for seed in range(3)
    }
    plain = parse_grid(TEXT[: TEXT.index("tune:")].replace("lr: 3.0e-4", "lr: 1.0e-3"), "plain.yaml")
    assert {cell.id for cell in cells if cell.objective.estimator == "k3"} <= {cell.id for cell in plain.cells}
    assert Run.open(run.path).cells == run.cells


def test_nobody_chooses_before_the_whole_first_stage_has_ended(run: Run) -> None:
    last = run.cells[3]
    fill(run, lambda cell: None if cell.id == last else ("finished", 0.5))
    assert settled(run) == []
    assert len(pending(run)) == 2 * 3
    fill(run, lambda cell: ("finished", 0.9))
    assert len(settled(run)) > 0
    assert pending(run) == {}


@pytest.mark.parametrize(
    ("outcomes", "kept"),
    [
        ({1e-4: ("finished", 0.5), 3e-4: ("finished", 0.5), 1e-3: ("finished", 0.5)}, 1e-4),
        ({1e-4: ("finished", 0.1), 3e-4: ("diverged", 0.9), 1e-3: ("diverged", 0.9)}, 1e-4),
        ({1e-4: ("failed", None), 3e-4: ("finished", 0.2), 1e-3: ("finished", 0.1)}, 3e-4),
        ({1e-4: ("finished", None), 3e-4: ("finished", 0.2), 1e-3: ("diverged", None)}, 3e-4),
        ({1e-4: ("diverged", None), 3e-4: ("diverged", None), 1e-3: ("diverged", None)}, 1e-4),
    ],
)
def test_ties_go_to_the_first_divergence_loses_and_a_failure_is_missing(
    run: Run, outcomes: dict[float, Any], kept: float
) -> None:
    fill(run, lambda cell: outcomes[cell.training.lr])
    settled(run)
    assert _chosen(run) == {"k1": kept, "k3": kept}


def test_one_divergence_outweighs_a_better_mean(run: Run) -> None:
    def outcome(cell: Cell) -> tuple[str, float]:
        if cell.training.lr == 1e-3:
            return ("diverged", 0.0) if cell.seed == FIRST_SEED else ("finished", 1.0)
        return "finished", 0.3 if cell.training.lr == 3e-4 else 0.2

    fill(run, outcome)
    settled(run)
    assert _chosen(run) == {"k1": 3e-4, "k3": 3e-4}
    choice = next(iter(choices(run.path).values()))
    assert sorted(state for row in choice.states.values() for state in row.values()).count("diverged") == 1


def test_an_arm_without_a_run_that_counts_does_not_choose(run: Run) -> None:
    fill(run, lambda cell: ("failed", None) if cell.objective.estimator == "k1" else ("finished", 0.5))
    settled(run)
    assert set(_chosen(run)) == {"k3"}
    later = [row for row in statuses(run, []) if row.id in pending(run)]
    assert [(row.state, row.detail) for row in later] == [("waiting", "waits for tuning")] * 3


def test_a_choice_stays_whatever_happens_afterwards(run: Run) -> None:
    fill(run, _best_at(1e-4))
    manifest = (run.path / "manifest.json").read_bytes()
    settled(run)
    before, cells = (run.path / "tuning.json").read_bytes(), Run.open(run.path).cells
    (run.path / "manifest.json").write_bytes(manifest)  # as if the process had died between the two files
    again = Run.open(run.path)
    assert len(settled(again)) == 6
    assert again.cells == cells
    assert (run.path / "tuning.json").read_bytes() == before
    assert settled(again) == []


def test_a_lower_score_is_better_where_it_is(tmp_path: Path) -> None:
    run = create(tmp_path / "run", TEXT + "analysis: {score: gradient_spikes}\n")
    for identity in run.cells:
        cell = run.cell(identity).cell()
        spikes = {1e-4: 5, 3e-4: 1, 1e-3: 9}[cell.training.lr]
        run.cell(identity).write_result({"state": "finished", "updates": 4, "gradient_spikes": spikes})
    settled(run)
    assert _chosen(run) == {"k1": 3e-4, "k3": 3e-4}


@pytest.mark.parametrize(
    "score", ["reward", "accuracy", "pass_at_k", "objective", "objective(0.2)", "reward_at_kl(0.1)", "training_reward"]
)
def test_the_score_of_one_run_is_that_of_the_report(tmp_path: Path, score: str) -> None:
    text = QUICKSTART.replace("seeds: 5", "seeds: 1").replace("updates: 60", "updates: 12")
    study = load_run(write_run(tmp_path / "run", text).path)
    found = [cell_score(study.runs[0].cell(identity), score) for identity in study.cells["cell"]]
    expected = run_scores(study, parse_score(score))
    assert [float("nan") if value is None else value for value in found] == pytest.approx(list(expected), nan_ok=True)


def test_jobs_that_were_named_before_the_choice_find_their_cells(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    names = list(pending(run))
    assert resolved_cells(run, names) == []
    assert "6 cells wait for tuning runs that have not ended" in capsys.readouterr().err
    fill(run, _best_at(1e-3))
    found = resolved_cells(run, names)
    assert [run.cell(each).cell().seed for each in found] == [0, 1, 2, 0, 1, 2]
    assert resolved_cells(run, found) == found


def test_a_second_stage_that_was_cancelled_beforehand_does_not_begin(run: Run) -> None:
    names = list(pending(run))
    cancel(run, names, executors=[])
    assert {row.state for row in statuses(run, []) if row.id in names} == {"cancelled"}
    fill(run, _best_at(1e-3))
    assert settled(run) == []
    with run.lock():
        resume(run, names)
    assert len(settled(run)) == 6


def test_settings_cannot_change_once_they_were_chosen_from(run: Run) -> None:
    fill(run, _best_at(1e-4))
    settled(run)
    for change in (("1.0e-3], seeds", "2.0e-3], seeds"), ("tune: {", "#")):
        with pytest.raises(UserError, match=r"tune: (has other settings|is gone)"):
            create(run.path, TEXT.replace(*change))
    grown = create(run.path, TEXT.replace("[k1, k3]", "[k1, k2, k3]"))
    assert len(pending(grown)) == 3
    assert set(run.cells) < set(grown.cells)
    assert create(run.path).cells == grown.cells


def _tuned_grid(grid: Grid, place: Path, **more: Any) -> Grid:
    file = place / f"{grid.name}.yaml"
    tune = {"training.lr": [1e-5, 0.05], "seeds": 1, "untuned": False}
    file.write_text(json.dumps({**json.loads(file.read_text()), "tune": tune, **more}))
    return load_grid(file)


def test_here_both_stages_are_trained_and_a_tuned_cell_is_the_cell_alone(make_grid: MakeGrid, place: Path) -> None:
    grid = _tuned_grid(make_grid(cells=[{"estimator": "k3"}, {"placement": "none"}], updates=2), place)
    run = Run.create(place / "tuned", launched(grid))
    done = launch(run, InlineExecutor(), workers=1)
    run.refresh()
    assert count(statuses(run)) == {"finished": 4 + 2}
    assert sum(len(pack.cells) for pack in done.packs) == 6
    identity = next(iter(run.grown))
    alone = Run.create(place / "alone", replace(make_grid("alone"), cells=(run.cell(identity).cell(),)))
    launch(alone, InlineExecutor(), workers=1)

    def bare(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{key: value for key, value in row.items() if not key.startswith("seconds")} for row in rows]

    assert bare(alone.cell(identity).metrics()) == bare(run.cell(identity).metrics())
    launch(run, InlineExecutor(), workers=1)
    assert count(statuses(run)) == {"finished": 6}


@pytest.mark.faults
def test_the_local_pool_begins_the_second_stage_by_itself(make_grid: MakeGrid, place: Path) -> None:
    grid = _tuned_grid(make_grid(cells=[{"estimator": "k3"}, {"placement": "none"}], updates=2, seeds=2), place)
    run = Run.create(place / "runs" / "little", launched(grid))
    launch(run, LocalExecutor(max_parallel=2), workers=2)
    rows = statuses(run)
    assert {row.detail for row in rows if row.id in pending(run)} <= {"waits for tuning"}
    wait_for(lambda: set(count(statuses(run))) == {"finished"})
    assert len(run.cells) == 4 + 4  # it was never said to be done before the second stage was
    assert main(["launch", "little.yaml", "--no-merge", "--no-check", "--json"]) == 0
    assert len(Run.open(run.path).cells) == 8
