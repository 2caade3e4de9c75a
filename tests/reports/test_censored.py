"""Stopped runs: how they count, what depends on them, and where that is said."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest

from klab.grid.score import parse_score
from klab.harness.store import Run
from klab.harness.store.cell_score import cell_score
from klab.reports import Study, analyse, load_run, render
from klab.reports.censored import sensitivity
from klab.reports.comparison import compare
from klab.reports.scores import run_scores

Small = Callable[..., Run]


def frame_of(**cells: list[tuple[float, str]]) -> pd.DataFrame:
    rows = [(name, seed, *run) for name, runs in cells.items() for seed, run in enumerate(runs)]
    return pd.DataFrame(rows, columns=["cell", "seed", "score", "state"])


def done(*scores: float) -> list[tuple[float, str]]:
    return [(score, "finished") for score in scores]


def bounds(frame: pd.DataFrame, higher: bool = True) -> Any:
    def again(runs: pd.DataFrame) -> Any:
        return analyse(runs, {"cell": "base"}, 0.05, higher=higher)

    return sensitivity(frame, (frame["cell"] == "base").to_numpy(), again(frame), again, higher)


def test_a_stopped_run_counts_with_its_score_and_a_diverged_one_with_the_worst_of_all() -> None:
    other = [(0.1, "stopped"), (0.6, "finished"), (0.9, "diverged")]
    found = analyse(frame_of(base=done(0.5, 0.5, 0.51), other=other), {"cell": "base"})
    row = found.cells.set_index("cell").loc["other"]
    assert (row["n"], row["stopped"], row["diverged"]) == (3, 1, 1)
    assert row["mean"] == pytest.approx((0.1 + 0.6 + 0.1) / 3)
    assert any("1 run stopped as hopeless" in note and "censored" in note for note in found.notes)


def test_cells_with_stopped_runs_lend_their_variance_to_no_other() -> None:
    cells = {"base": done(0.5, 0.51, 0.52), "a": done(0.61, 0.6, 0.62), "b": done(0.7, 0.72, 0.7)}
    scores = [(0.05, "stopped"), (0.8, "finished"), (0.8, "finished")]
    alone, beside = (
        analyse(frame_of(**cells, **more), {"cell": "base"}).cells.set_index("cell") for more in ({}, {"odd": scores})
    )
    width = [each.loc["a", "high"] - each.loc["a", "low"] for each in (alone, beside)]
    assert width[1] < 1.5 * width[0]
    assert beside.loc["odd", "high"] - beside.loc["odd", "low"] > 5 * width[1]


def test_without_stopped_runs_there_is_no_bound() -> None:
    assert bounds(frame_of(base=done(0.5, 0.6), other=[*done(0.5), (0.1, "failed")])) is None
    assert bounds(frame_of(base=done(0.5, 0.6), other=[*done(0.5), (np.nan, "stopped")])) is None


def test_the_bounds_are_the_differences_at_the_worst_and_the_best_scores_that_were_seen() -> None:
    cells = {"base": done(0.5, 0.52, 0.48), "some": [(0.1, "stopped"), *done(0.5, 0.5)], "none": done(0.9, 0.88, 0.9)}
    found = bounds(frame_of(**cells))
    assert (found.worst, found.best, found.runs) == (0.1, 0.9, 1)
    assert found.low[0] == pytest.approx((0.1 + 0.5 + 0.5) / 3 - 0.5)
    assert found.high[0] == pytest.approx((0.9 + 0.5 + 0.5) / 3 - 0.5)
    assert np.isnan(found.low[1])
    lower = bounds(frame_of(**cells), higher=False)
    assert (lower.worst, lower.best) == (0.9, 0.1)
    assert (lower.low[0], lower.high[0]) == pytest.approx((found.low[0], found.high[0]))


def test_a_stopped_baseline_moves_every_difference_the_other_way() -> None:
    cells = {"base": [(0.1, "stopped"), *done(0.5, 0.5)], "one": done(0.6, 0.9, 0.6), "two": done(0.4, 0.5, 0.4)}
    found = bounds(frame_of(**cells))
    assert found.low == pytest.approx([0.7 - 1.9 / 3, 1.3 / 3 - 1.9 / 3])
    assert found.high == pytest.approx([0.7 - 1.1 / 3, 1.3 / 3 - 1.1 / 3])


def test_a_verdict_that_hangs_on_stopped_runs_is_marked_and_one_that_does_not_is_not() -> None:
    base, firm = done(0.5, 0.51, 0.5, 0.49, 0.5), done(0.9, 0.91, 0.9, 0.92, 0.9)
    loose = [(0.1, "stopped"), (0.11, "stopped"), (0.1, "stopped"), (0.12, "stopped"), (0.1, "stopped")]
    found = bounds(frame_of(base=base, firm=firm, loose=loose))
    assert found.depends.tolist() == [False, True]
    assert "1 of 2 verdicts against the baseline change" in found.words("held-out reward")
    many = [(0.9, "stopped"), *done(*np.linspace(0.88, 0.92, 19))]
    sure = bounds(frame_of(base=done(*np.linspace(0.1, 0.14, 20)), many=many))
    assert not sure.depends.any()
    assert "every verdict is the same" in sure.words("held-out reward")


@pytest.fixture
def study(small: Small) -> Study:
    outcome: Any = lambda cell: "stopped" if cell.objective.estimator == "k1" and cell.seed > 0 else "finished"  # noqa: E731
    return load_run(small(seeds=4, outcome=outcome).path)


def test_the_score_of_a_stopped_run_is_its_last_evaluation(study: Study) -> None:
    found = run_scores(study, parse_score("reward"))
    stopped = np.flatnonzero((study.cells["state"] == "stopped").to_numpy())
    assert len(stopped) == 3
    for place in stopped:
        folder = study.runs[0].cell(study.cells["cell"].iloc[place])
        assert found[place] == pytest.approx(folder.evaluations()[-1]["reward"])
        assert folder.evaluations()[-1]["update"] == 5
        assert cell_score(folder, "reward") == pytest.approx(found[place])
    finished = study.runs[0].cell(study.cells["cell"][study.cells["state"] == "finished"].iloc[0])
    assert cell_score(finished, "reward") is not None


def test_the_page_and_the_tables_say_what_is_censored(study: Study) -> None:
    comparison = compare(study, study.tasks[0])
    row = comparison.table.set_index("label")["stopped"]
    assert row.sum() == 3
    assert comparison.censored is not None
    assert comparison.table["bound_low"].notna().sum() == 1
    assert not comparison.table.loc[comparison.table["stopped"] > 0, "stable"].any()
    page = render(study.runs[0].path, figures=False).read_text()
    assert "stopped as hopeless (training.stop)" in page
    assert "3 stopped of 8 runs." in page
    assert "a stopped one counts with its last evaluation (censored)" in page
    assert "With stopped runs at" in page
    assert comparison.table["depends"].any()
    assert "undecided †" in page or "differs †" in page or "equivalent †" in page


def test_a_study_without_stopped_runs_says_nothing_of_them(small: Small) -> None:
    page = render(small(seeds=2).path, figures=False).read_text()
    assert "stopped as hopeless" not in page
    assert "carried forward" not in page
    assert "†" not in page
