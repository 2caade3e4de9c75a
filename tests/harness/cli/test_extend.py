"""`klab extend` adds seeds without losing the error rate; `klab confirm` judges the best cells on fresh seeds alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from klab.grid import Cell, Grid, parse_grid
from klab.harness.cli.main import main
from klab.harness.store import Run
from klab.harness.store.confirmation import confirms
from klab.harness.store.looks import extended, looks
from klab.reports import load_run, render
from klab.reports.comparison import compare_all
from klab.reports.confirmation import FIRST_SEED, confirmation
from klab.reports.extension import extension
from klab.reports.inference.error_rate import ALPHA, look_share
from tests.support import tuned_run
from tests.support.tuned_run import fill, settled

Ask = Callable[..., Any]

TEXT = """
name: study
task: {name: addition, digits: 1}
policy: {name: tiny}
training: {updates: 4}
objective: {algorithm: grpo, beta: 0.05}
design: one_at_a_time
axes:
  estimator: [k1, k2, k3]
  placement: [none, loss]
seeds: 4
"""


def _reward(cell: Cell, worse: float = 0.3) -> tuple[str, float]:
    """k1 is much worse than the others, which do not differ."""
    noise = int(hashlib.sha256(f"{cell.group} {cell.seed}".encode()).hexdigest()[:6], 16) / 2**24 * 0.02
    return "finished", 0.8 - worse * (cell.objective.estimator == "k1" and cell.objective.placement == "loss") + noise


def _run(path: Path, text: str = TEXT) -> Run:
    run = Run.create(path, parse_grid(text, "study.yaml"))
    fill(run, _reward)
    return run


def _extended(run: Run, ask: Ask, *options: str) -> Any:
    return ask("extend", str(run.path), "--dry-run", "--json", *options)


def test_all_cells_get_the_next_seeds(tmp_path: Path, ask: Ask) -> None:
    run = _run(tmp_path / "run")
    found = _extended(run, ask, "--seeds", "3")
    assert len(found["cells"]) == 4 * 3
    assert found["level"] == pytest.approx(ALPHA * look_share((4, 7), 7))
    study = load_run(run.path)
    assert extension(study, 3).seeds == (4, 5, 6)
    assert extension(study, 3, most=20).level < extension(study, 3).level
    assert looks(Run.open(run.path).manifest) == (4,)  # nothing was written


def test_only_open_comparisons_and_the_baseline_get_seeds_where_that_is_asked(tmp_path: Path) -> None:
    study = load_run(_run(tmp_path / "run", TEXT + "analysis: {delta: 0.001}\n").path)
    found = extension(study, 6, undecided=True)
    estimators = {cell.objective.estimator for cell in found.cells if cell.objective.placement == "loss"}
    assert found.open == 2
    assert estimators == {"k2", "k3"}
    assert study.baselines["addition(digits=1)"] in found.groups
    assert len(found.cells) == 3 * 6


def test_a_difference_that_only_stands_at_the_full_error_rate_is_still_open(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", parse_grid(TEXT, "study.yaml"))
    fill(run, lambda cell: _reward(cell, worse=0.05))
    study = load_run(run.path)
    (comparison,) = compare_all(study)
    assert comparison.table.set_index("label").loc["estimator k1", "verdict"] == "differs"
    far = extension(study, 1, most=500, undecided=True)
    assert any(cell.objective.estimator == "k1" for cell in far.cells)


def test_nothing_open_nothing_added(tmp_path: Path, ask: Ask) -> None:
    run = _run(tmp_path / "run", TEXT + "analysis: {delta: 0.5}\n")
    assert "no comparison is open" in ask("extend", str(run.path), "--seeds", "2", "--undecided")
    assert looks(Run.open(run.path).manifest) == (4,)


def test_no_more_seeds_than_were_stated(tmp_path: Path, ask: Ask) -> None:
    run = _run(tmp_path / "run", TEXT + "analysis: {stop: {seeds: 6}}\n")
    said = ask("extend", str(run.path), "--seeds", "3", code=2)
    assert "the error rate is spent by 6" in said
    assert "Add 2 at most" in said
    assert "the most seeds per cell are 6" in ask("extend", str(run.path), "--seeds", "1", "--most", "9", code=2)
    assert len(_extended(run, ask, "--seeds", "2")["cells"]) == 8


def test_a_tuned_run_is_extended_with_what_was_chosen_and_as_written(tmp_path: Path, ask: Ask) -> None:
    run = tuned_run.create(tmp_path / "run")
    assert "has not chosen its tuned settings yet" in ask("extend", str(run.path), "--seeds", "2", code=2)
    fill(run, lambda cell: ("finished", 0.9 - abs(cell.training.lr - 1e-3) * 10))
    settled(run)
    fill(run, _reward)
    found = extension(load_run(run.path), 2)
    rates = sorted((cell.objective.estimator, cell.training.lr, cell.seed) for cell in found.cells)
    assert rates == [(k, lr, seed) for k in ("k1", "k3") for lr in (3e-4, 1e-3) for seed in (3, 4)]


@pytest.fixture
def trained(make_grid: Callable[..., Grid], place: Path, ask: Ask) -> Path:
    """A run of three configurations that really trained."""
    make_grid(cells=[{}, {"estimator": "k1"}, {"placement": "none"}], seeds=2, updates=2)
    ask("launch", "little.yaml", "--on", "here", "--no-merge", "--no-check")
    return place / "runs" / "little"


def test_seeds_are_added_run_looked_at_and_never_lost(trained: Path, ask: Ask) -> None:
    ask("extend", "little", "--seeds", "2", "--on", "here")
    run = Run.open(trained)
    assert looks(run.manifest) == (2, 4)
    assert len(run.cells) == 3 * 4
    assert all(run.cell(identity).result() for identity in run.cells)
    study = load_run(trained)
    assert study.conduct.share == pytest.approx(look_share((2, 4), 4))
    assert any("2 and 4 of at most 4 seeds per cell" in note for note in study.notes)
    before = run.manifest
    ask("launch", "little.yaml", "--on", "here", "--no-merge", "--no-check")  # the grid file without the new seeds
    assert {**Run.open(trained).manifest, "cells": None} == {**before, "cells": None}
    assert "the error rate is spent by 4" in ask("extend", "little", "--seeds", "1", code=2)


def test_added_cells_go_on_after_an_interruption(trained: Path, ask: Ask) -> None:
    found = extension(load_run(trained), 1)
    run = Run.open(trained)
    with run.lock():
        run.grow(found.cells, **extended(run.manifest, found.seeds, found.most, len(found.cells), False))
    ask("launch", "little.yaml", "--on", "here", "--no-merge", "--no-check")
    assert all(run.cell(identity).result() for identity in Run.open(trained).cells)


def test_a_confirmation_is_a_run_of_its_own(trained: Path, ask: Ask) -> None:
    before = (trained / "manifest.json").read_bytes()
    ask("confirm", "little", "--top", "1", "--seeds", "2", "--on", "here")
    assert (trained / "manifest.json").read_bytes() == before
    run = Run.open(trained.parent / "little-confirm")
    record = confirms(run)
    assert record is not None
    assert (record["run"], record["of"], len(record["cells"])) == ("little", 3, 2)
    seeds = {run.resolved(identity)["seed"] for identity in run.cells}
    assert seeds == {FIRST_SEED, FIRST_SEED + 1}
    assert all(run.cell(identity).result() for identity in run.cells)
    study = load_run(run.path)
    (comparison,) = compare_all(study)
    assert len(comparison.analysis.contrasts) == 1
    assert comparison.analysis.contrasts["stated"].all()
    assert any("on fresh seeds: nothing of the exploration enters" in note for note in study.notes)
    assert any("reported apart: little-confirm" in note for note in load_run(trained).notes)
    page = render(run.path, trained.parent / "page", figures=False).read_text()
    assert "Exploration and confirmation" in page
    again = (run.path / "manifest.json").read_bytes()
    ask("confirm", "little", "--top", "1", "--seeds", "2", "--on", "here")
    assert (run.path / "manifest.json").read_bytes() == again
    assert "--seeds" in ask("confirm", "little", "--top", "1", "--seeds", "3", code=2)


def test_the_best_means_are_confirmed_with_their_baseline(tmp_path: Path) -> None:
    study = load_run(_run(tmp_path / "run").path)
    (comparison,) = compare_all(study)
    grid, record = confirmation(study, [comparison], 2, 5, "again")
    ranked = [group for group in comparison.table["group"] if group != comparison.baseline]
    assert list(grid.groups) == [comparison.baseline, *ranked[:2]]
    assert grid.stated == tuple(ranked[:2])
    assert record["confirms"]["cells"].keys() == set(grid.groups)
    assert json.dumps(record)
    assert main(["confirm", str(tmp_path / "run"), "--dry-run"]) == 0
