"""Over-optimisation in numbers: where gold is most, what it cost in KL, and what is lost behind it."""

from __future__ import annotations

import json
from pathlib import Path as File

import numpy as np
import pandas as pd
import pytest

from klab.harness.store import Run
from klab.reports import load_run, render
from klab.reports.comparison import compare_all
from klab.reports.figures.gold_paths import Path, paths
from klab.reports.figures.series import Curve
from klab.reports.over_optimisation import COLUMNS, matched_distance, sentence, table
from tests.reports.synthetic import write_run

TEXT = """
name: over
task: {name: addition, digits: 2}
training: {updates: 4, evaluate_every: 1}
objective: {algorithm: rloo, placement: none}
design: list
cells:
  - {}
  - {placement: reward, beta: 0.1}
seeds: 3
"""
KL = {"none": [0.0, 1.0, 4.0, 9.0, 16.0], "reward": [0.0, 0.25, 1.0, 2.25, 2.25]}
GOLD = {"none": [0.3, 0.5, 0.6, 0.4, 0.1], "reward": [0.3, 0.4, 0.55, 0.58, 0.58]}
PROXY = {"none": [0.0, 1.0, 2.0, 3.0, 4.0], "reward": [0.0, 0.5, 1.0, 1.5, 1.5]}


def over(path: File, gap: bool = True, gold: bool = True) -> Run:
    """A run whose held-out rewards and KL are the tables above, gold moved by ±0.01 between seeds."""
    run = write_run(path, TEXT, samples=0)
    for identity in run.cells:
        cell = run.cell(identity).cell()
        name = cell.objective.placement
        file = run.cell(identity).path / "evaluations.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        for place, row in enumerate(rows):
            row.pop("crc", None)
            value = GOLD[name][place] + 0.01 * (cell.seed - 1)
            row |= {"reverse_kl": KL[name][place], "reward": PROXY[name][place]}
            row["parts"] = {"gold": value} if gold else {}
            row["parts"] |= {"gap": PROXY[name][place] - 5 * (value - 0.3)} if gap else {}
        file.unlink()
        run.cell(identity).append_evaluations(rows)
    return run


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    study = load_run(over(tmp_path_factory.mktemp("runs") / "over").path)
    (comparison,) = compare_all(study)
    return table(study, comparison)


def test_the_numbers_by_hand(rows: pd.DataFrame) -> None:
    assert list(rows.columns) == list(COLUMNS)
    none, reward = rows.to_dict("records")
    assert none["label"] == "baseline"
    assert (none["runs"], reward["runs"]) == (3, 3)
    expected = {"gold_start": 0.3, "gold_most": 0.6, "update_most": 2, "root_kl_most": 2.0, "gold_per_nat": 0.3 / 4}
    expected |= {"gold_final": 0.1, "root_kl_final": 4.0, "gold_lost": 0.5, "proxy_final": 4.0, "gap_final": 5.0}
    assert {name: none[name] for name in expected} == pytest.approx(expected)
    expected = {"gold_most": 0.58, "root_kl_most": 1.5, "gold_per_nat": 0.28 / 2.25, "gold_lost": 0.0}
    assert {name: reward[name] for name in expected} == pytest.approx(expected)
    half = 4.302653 * 0.01 / np.sqrt(3)
    assert (none["gold_most_low"], none["gold_most_high"]) == pytest.approx((0.6 - half, 0.6 + half))


def test_gold_at_the_distance_that_all_reach(rows: pd.DataFrame) -> None:
    none, reward = rows.to_dict("records")
    assert none["root_kl_matched"] == reward["root_kl_matched"] == pytest.approx(1.5)
    assert none["gold_matched"] == pytest.approx(0.55), "half-way between √KL 1 and 2"
    assert reward["gold_matched"] == pytest.approx(0.58), "where it first gets there, not where it stays"


def test_the_sentence(rows: pd.DataFrame) -> None:
    assert sentence(rows, rows["group"][0]) == (
        "Most gold: the baseline, 0.600 at √KL 2.00. Most at √KL 1.50, which is as far as all get: "
        "“placement reward”, 0.580. Most lost again: the baseline, −0.500 by the end, at √KL 4.00."
    )
    assert sentence(rows[1:], None).count("Most") == 1, "with one row there is nothing to compare, and nothing was lost"
    assert sentence(rows[:0], None) == ""


def test_a_path_that_turns_back_counts_where_it_first_gets_so_far() -> None:
    def curve(*values: float) -> Curve:
        mean = np.asarray(values)
        flags = np.ones((1, 1), dtype=np.bool_)
        return Curve(np.arange(mean.size), mean, mean, mean, flags, np.empty(0, dtype=np.int64))

    path = Path("a", "a", curve(0, 2, 1, 3), curve(0, 1, 1, 1), curve(0.2, 0.4, 0.9, 0.6), None)
    assert path.gold_at(1.0) == pytest.approx(0.3)
    assert path.gold_at(2.5) == pytest.approx(0.675)
    assert path.gold_at(0.0) == pytest.approx(0.2)
    assert np.isnan(path.gold_at(3.1))
    short = Path("b", "b", curve(0, 0.5), curve(0, 1), curve(0.2, 0.3), None)
    assert matched_distance([path, short]) == 0.5


def test_the_report_has_table_figure_and_sentence(tmp_path: File) -> None:
    run = over(tmp_path / "over", gap=False)
    page = render(run.path, tmp_path / "out", figures=False).read_text()
    assert "Most gold: the baseline, 0.600 at √KL 2.00" in page
    assert "Proxy and gold reward along training" in page
    tables = tmp_path / "out" / "tables"
    written = pd.read_csv(tables / "over_optimisation.csv")
    assert written["gold_most"].tolist() == pytest.approx([0.6, 0.58])
    assert written["gap_final"].isna().all()
    lines = (tables / "over_optimisation.md").read_text().splitlines()
    assert "| gold at √KL 1.50 |" in lines[2]
    assert lines[4].startswith("| baseline | 0.600 [0.575, 0.625] | 2.00 | 0.075 | 0.550 | 0.100")
    latex = (tables / "over_optimisation.tex").read_text()
    assert latex.count(r" \\") == 3
    assert r"at $\surd$KL" in latex


def test_without_a_gold_reward_there_is_none_of_it(tmp_path: File) -> None:
    run = over(tmp_path / "over", gap=False, gold=False)
    study = load_run(run.path)
    (comparison,) = compare_all(study)
    assert paths(study, comparison) == []
    assert table(study, comparison).empty
    page = render(run.path, tmp_path / "out", figures=False).read_text()
    assert "Most gold" not in page
    assert not list((tmp_path / "out" / "tables").glob("over_optimisation.*"))
