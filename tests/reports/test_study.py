"""Studies: the summary says what other means compute, and odd runs are said to be odd."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from klab.grid import UserError
from klab.harness.store import Run
from klab.reports import Study, load_run
from klab.reports.comparison import compare
from klab.reports.figures.profiles import across_tasks
from klab.reports.schema import CELLS, SUMMARY
from klab.reports.study import load_runs
from tests.reports.synthetic import EFFECTS, write_run

Small = Callable[..., Run]


def _scores(run: Run) -> dict[str, list[float | None]]:
    """By group, for every seed, the held-out reward over evaluations from update 54 of 60 on; None where it failed,
    the text "diverged" counts as the worst.
    """
    found: dict[str, list[float | None]] = {}
    for identity in run.cells:
        result = run.cell(identity).result()
        late = [row["reward"] for row in run.cell(identity).evaluations() if row["update"] >= 54]
        value = None if result is None else np.nan if result["state"] == "diverged" else float(np.mean(late))
        found.setdefault(run.resolved(identity)["group"], []).append(value)
    worst = min(value for row in found.values() for value in row if value is not None and value == value)
    return {
        group: [worst if value is not None and value != value else value for value in row]
        for group, row in found.items()
    }


def test_the_summary_is_what_plain_arithmetic_gives(run: Run, study: Study) -> None:
    scores = _scores(run)
    table = study.summary().set_index("label")
    baseline = scores[run.baseline or ""]
    for group, row in scores.items():
        found = table.loc[study.labels[group]]
        counted = [value for value in row if value is not None]
        assert found["mean"] == pytest.approx(np.mean(counted))
        assert found["n"] == len(counted)
        if group != run.baseline:
            pairs = [x - y for x, y in zip(row, baseline, strict=True) if x is not None and y is not None]
            assert (found["difference"], found["pairs"]) == (pytest.approx(np.mean(pairs)), len(pairs))
            excludes = found["difference_low"] > 0 or found["difference_high"] < 0
            assert excludes == (found["p"] < 0.05) == (found["verdict"] == "differs")
            assert found["better"] == (excludes and found["difference"] > 0)


def test_diverged_runs_count_as_the_worst_and_failed_ones_are_missing(study: Study) -> None:
    table = study.summary().set_index("label")
    assert table.loc["weight truncate", ["finished", "diverged", "failed", "n"]].tolist() == [3, 2, 0, 5]
    assert table.loc["estimator k1", ["finished", "diverged", "failed", "n", "pairs"]].tolist() == [4, 0, 1, 4, 4]
    assert not table.loc["weight truncate", "stable"]
    assert not table["better"].any() or table.loc[table["better"], "verdict"].eq("differs").all()


def test_effects_find_what_was_put_in(study: Study) -> None:
    analysis = compare(study, study.tasks[0]).analysis
    levels = analysis.levels.set_index(["axis", "value"])
    for axis, value in (("placement", "none"), ("weight", "power"), ("estimator", "k2")):
        row = levels.loc[(axis, value)]
        assert row["low"] <= EFFECTS[axis, value] <= row["high"]
    effects = analysis.effects.set_index("axis")
    assert effects.loc["training.lr", "verdict"] == "differs"
    assert levels.loc[("training.lr", "0.0001"), "difference"] == pytest.approx(-0.22, abs=0.03)


def test_columns_are_documented(study: Study) -> None:
    assert list(study.cells) == list(CELLS)
    assert list(study.summary()) == list(SUMMARY)


def test_labels_say_how_a_cell_differs_from_the_baseline(study: Study) -> None:
    labels = set(study.labels.values())
    assert {"baseline", "estimator k1", "placement none", "weight power", "lr 0.0001"} <= labels


def test_another_score_and_a_score_that_does_not_exist(study: Study) -> None:
    table = study.summary("reverse_kl_final")
    assert table["mean"].is_monotonic_increasing
    with pytest.raises(UserError, match="accuracy_final"):
        study.summary("accuracy_finel")


def test_a_single_seed_has_numbers_and_no_inference(small: Small) -> None:
    study = load_run(small(seeds=1).path)
    comparison = compare(study, study.tasks[0])
    table = comparison.table
    assert table["mean"].notna().all()
    assert table["difference"].notna().sum() == 1
    assert table[["low", "high", "difference_low", "p"]].isna().all(axis=None)
    assert "One seed per cell: nothing can be inferred" in comparison.analysis.headline
    assert not comparison.inferred


def test_constant_rewards_are_no_difference(small: Small) -> None:
    study = load_run(small(constant=True).path)
    comparison = compare(study, study.tasks[0])
    assert comparison.table["p"].dropna().tolist() == [1.0]
    assert comparison.table["verdict"].tolist() == ["", "equivalent"]
    assert comparison.analysis.headline.startswith("All cells are within ±0.05 of the baseline")


def test_all_diverged_and_all_failed(small: Small) -> None:
    diverged = load_run(small("a", outcome=lambda cell: "diverged").path).summary()
    assert diverged["finished"].sum() == 0
    assert diverged["diverged"].sum() == 6
    assert diverged["mean"].isna().all()
    failed = load_run(small("b", outcome=lambda cell: "failed").path).summary()
    assert failed["mean"].isna().all()
    assert failed["failed"].sum() == 6


def test_unfinished_seeds_are_open_not_lost(small: Small) -> None:
    study = load_run(small(outcome=lambda cell: {0: "interrupted", 1: "missing"}.get(cell.seed, "finished")).path)
    table = study.summary()
    assert table["unfinished"].tolist() == [2, 2]
    assert table["n"].tolist() == [1, 1]
    assert any("interim" in note for note in study.notes)


def test_a_run_that_nobody_started(small: Small) -> None:
    study = load_run(small(outcome=lambda cell: "missing").path)
    assert study.summary()["mean"].isna().all()
    assert (study.cells["state"] == "missing").all()


def test_runs_of_different_tasks_are_compared_within_a_task(small: Small) -> None:
    study = load_runs([small("two").path, small("three", digits=3).path])
    assert study.tasks == ("addition(digits=2)", "addition(digits=3)")
    assert study.names == ("small (1)", "small (2)")
    table = study.summary()
    assert len(table) == 4
    assert table.groupby("task")["rank"].min().tolist() == [1.0, 1.0]
    assert any("different tasks" in note for note in study.notes)


def test_runs_without_a_common_baseline_say_so_and_can_be_given_one(tmp_path: Path) -> None:
    text = (
        "name: {}\ntask: {{name: addition}}\ntraining: {{updates: 5}}\n"
        "objective: {{estimator: {}, placement: loss, beta: 0.05}}\nseeds: 3\n"
    )
    runs = [write_run(tmp_path / name, text.format(name, name)) for name in ("k1", "k3")]
    paths = [run.path for run in runs]
    study = load_runs(paths)
    assert study.baselines == {}
    assert any("different baselines" in note for note in study.notes)
    assert study.summary()["difference"].isna().all()
    assert [axis.key for axis in study.axes] == ["estimator"]
    given = load_runs(paths, baseline=runs[0].cells[0])
    assert given.summary()["difference"].notna().sum() == 1
    with pytest.raises(UserError, match="no such cell"):
        load_runs(paths, baseline="nothing")


def test_a_cell_in_two_runs_is_counted_once(small: Small) -> None:
    study = load_runs([small("a", seeds=2).path, small("b", seeds=3).path])
    assert study.cells["cell"].is_unique
    assert study.summary()["seeds"].tolist() == [3, 3]
    assert any("counted once" in note for note in study.notes)


def test_different_budgets_are_said(tmp_path: Path) -> None:
    text = (
        "name: budgets\ntask: {name: addition}\ndesign: one_at_a_time\ntraining: {updates: 5}\n"
        "axes: {training.updates: [5, 10]}\nseeds: 2\n"
    )
    study = load_run(write_run(tmp_path / "budgets", text).path)
    assert any("different budgets (5, 10 updates)" in note for note in study.notes)


def test_a_product_shows_interactions(tmp_path: Path) -> None:
    text = """
name: product
task: {name: addition}
training: {updates: 5, updates_per_rollout: 2}
objective: {algorithm: grpo, beta: 0.05}
axes: {estimator: [k1, k3], placement: [loss, reward], weight: [ppo_clip, power]}
seeds: 3
"""
    study = load_run(write_run(tmp_path / "product", text).path)
    comparison = compare(study, study.tasks[0])
    assert len(comparison.table) == 8
    pairs = comparison.analysis.interactions[["axis", "other"]]
    assert len(pairs) == 3
    assert comparison.analysis.interactions["p"].notna().all()


def test_not_a_run_an_older_schema_and_nothing_at_all(small: Small, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a run folder"):
        load_run(tmp_path)
    with pytest.raises(UserError, match="at least one"):
        load_runs([])
    run = small()
    manifest = run.path / "manifest.json"
    manifest.write_bytes(
        manifest.read_bytes().replace(b'"schema": 1', b'"schema": 0', 1).replace(b'"schema":1', b'"schema":0', 1)
    )
    with pytest.raises(UserError, match="schema 0"):
        load_run(run.path)


def test_where_the_task_is_an_axis_the_baseline_has_its_like_on_every_task(tmp_path: Path) -> None:
    text = """
name: tasks
task: {name: addition, digits: 2}
training: {updates: 4, updates_per_rollout: 2}
objective: {algorithm: grpo, beta: 0.05}
axes: {task.digits: [1, 2, 3], estimator: [k1, k3]}
seeds: 5
"""
    study = load_run(write_run(tmp_path / "tasks", text).path)
    assert set(study.baselines) == set(study.tasks)
    assert [axis.key for axis in study.axes] == ["estimator"]
    assert set(study.labels.values()) == {"baseline", "estimator k1"}
    everything = study.cells[study.cells["label"] == "baseline"]["reward_final"]
    comparisons = [compare(study, task, "training_reward") for task in study.tasks]
    table, _ = across_tasks(comparisons)
    assert table.set_index("label").loc["baseline", "iqm"] == pytest.approx(stats.trim_mean(everything, 0.25))
    assert [comparison.analysis.alpha for comparison in comparisons] == pytest.approx([0.05 / 4] * 3)
