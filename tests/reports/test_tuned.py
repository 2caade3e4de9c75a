"""The report of a tuned study compares what was chosen, and shows how it was chosen and what that changed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from klab.grid import Cell
from klab.harness.store import Run
from klab.reports import load_run, render
from klab.reports.comparison import compare_all
from klab.reports.figures.sensitivity import sensitivity
from klab.reports.methods import methods
from klab.reports.study import load_runs
from klab.reports.tuned import tuned_parts, tuning_table
from tests.support.tuned_run import TEXT, create, fill, settled


def _reward(cell: Cell) -> tuple[str, float]:
    """k1 is as good as k3 with a learning rate of its own, and worse with that of the grid file."""
    best = 1e-4 if cell.objective.estimator == "k1" else 3e-4
    noise = np.random.default_rng([cell.seed, int(cell.training.lr * 1e6)]).normal() * 0.004
    return "finished", 0.8 - 0.15 * abs(np.log10(cell.training.lr / best)) + noise


def _tuned(path: Path, text: str = TEXT.replace("seeds: 3", "seeds: 6")) -> Run:
    run = create(path, text)
    fill(run, _reward)
    settled(run)
    fill(run, _reward)
    return run


def test_the_report_compares_what_was_chosen(tmp_path: Path) -> None:
    study = load_run(_tuned(tmp_path / "run").path)
    (comparison,) = compare_all(study)
    assert [axis.key for axis in study.axes] == ["estimator"]
    assert sorted(comparison.seeds) == list(range(6))
    assert sorted(cell.training.lr for cell in study.configurations.values()) == [1e-4, 3e-4]
    assert study.configurations[str(comparison.baseline)].objective.estimator == "k3"
    table = comparison.table.set_index("label")
    assert table.loc["estimator k1", "verdict"] == "equivalent"


def test_without_tuning_the_verdict_is_another(tmp_path: Path) -> None:
    run = _tuned(tmp_path / "run")
    study = load_run(run.path)
    (part,) = tuned_parts(study, compare_all(study))
    (change,) = part.changes["addition(digits=1)"]
    assert (change.verdict, change.untuned_verdict, change.changed) == ("equivalent", "differs", True)
    plain = load_runs([run.path], stage="untuned")
    assert {cell.training.lr for cell in plain.configurations.values()} == {3e-4}
    assert {arm.label: arm.choice for arm in part.arms} == {
        "baseline": "training.lr=0.0003",
        "estimator k1": "training.lr=0.0001",
    }
    table = tuning_table([part])
    assert len(table) == 6
    assert table["chosen"].sum() == 2
    best = table[table["label"] == "estimator k1"].set_index("setting")["mean"]
    scores = [_reward(run.cell(each).cell())[1] for each in run.cells if "k1" in each and "s100000" in each]
    assert best.mean() == pytest.approx(np.mean(scores))


def test_the_page_shows_the_sensitivity_and_the_methods_say_it(tmp_path: Path) -> None:
    run = _tuned(tmp_path / "run")
    page = render(run.path, tmp_path / "report").read_text()
    for words in ("Tuning", "Without tuning", "tuning changes the verdict", "2 different settings were chosen"):
        assert words in page
    assert 'data-figure="sensitivity"' in page
    assert (tmp_path / "report/figures/sensitivity.pdf").exists()
    assert (tmp_path / "report/tables/tuning.csv").read_text().count("\n") == 7
    study = load_run(run.path)
    text = " ".join(methods(study, compare_all(study)))
    assert "every configuration chose training.lr from 0.0001, 0.0003, 0.001" in text
    assert "over 2 tuning seeds that are used for nothing else" in text
    assert "learning rate as every configuration chose it" in text


def test_a_study_without_tuning_says_so(tmp_path: Path) -> None:
    run = create(tmp_path / "run", TEXT[: TEXT.index("tune:")])
    fill(run, _reward)
    study = load_run(run.path)
    assert tuned_parts(study, compare_all(study)) == []
    assert "No setting was tuned" in " ".join(methods(study, compare_all(study)))


def test_before_the_choice_there_is_nothing_to_compare(tmp_path: Path) -> None:
    run = create(tmp_path / "run")
    fill(run, lambda cell: _reward(cell) if cell.objective.estimator == "k1" else None)
    page = render(run.path, tmp_path / "report", figures=False).read_text()
    assert "there is nothing to report" in page
    assert "2 configurations have not chosen yet" in page


def test_without_the_configurations_as_written_nothing_is_said_of_them(tmp_path: Path) -> None:
    run = _tuned(tmp_path / "run", TEXT.replace("seeds: 2}", "seeds: 2, untuned: false}"))
    study = load_run(run.path)
    (part,) = tuned_parts(study, compare_all(study))
    assert (part.changes, part.untuned) == ({}, False)
    assert sensitivity(part) is not None
