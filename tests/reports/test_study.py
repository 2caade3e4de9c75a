"""Studies: the summary says what other means compute, and odd runs are said to be odd."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from klab.grid import UserError
from klab.harness.store import Run
from klab.reports import Study, load_run
from klab.reports.comparison import compare
from klab.reports.figures.tasks import across_tasks
from klab.reports.schema import CELLS, SUMMARY
from klab.reports.study import load_runs
from tests.reports.synthetic import EFFECTS, write_run

Small = Callable[..., Run]


def _scores(run: Run) -> dict[str, dict[int, float | None]]:
    """By group and seed the final reward, None where the seed diverged or failed."""
    found: dict[str, dict[int, float | None]] = {}
    for identity in run.cells:
        result = run.cell(identity).result()
        ended = result is not None and result["state"] == "finished"
        found.setdefault(run.resolved(identity)["group"], {})[run.resolved(identity)["seed"]] = (
            result["reward_final"] if result is not None and ended else None
        )
    return found


def test_the_summary_is_what_plain_arithmetic_gives(run: Run, study: Study) -> None:
    scores = _scores(run)
    results = [run.cell(identity).result() for identity in run.cells]
    worst = min(result["reward_final"] for result in results if result is not None)
    table = study.summary().set_index("label")
    baseline = [scores[run.baseline or ""][seed] or worst for seed in range(5)]
    for group, by_seed in scores.items():
        row = table.loc[study.labels[group]]
        values = [worst if by_seed[seed] is None else by_seed[seed] for seed in range(5)]
        low, high = stats.t.interval(0.95, 4, loc=np.mean(values), scale=stats.sem(values))
        assert (row["mean"], row["low"], row["high"]) == pytest.approx((np.mean(values), low, high))
        assert row["finished"] == sum(value is not None for value in by_seed.values())
        if group == run.baseline:
            continue
        differences = np.subtract(values, baseline)
        assert row["difference"] == pytest.approx(differences.mean())
        flips = [abs(np.dot(signs, differences)) for signs in itertools.product([-1, 1], repeat=5)]
        assert row["p"] == pytest.approx(np.mean(np.asarray(flips) >= abs(differences.sum()) - 1e-12))
        wins = np.mean([(x > y) + 0.5 * (x == y) for x in values for y in baseline])
        assert row["improvement"] == pytest.approx(wins)


def test_lost_seeds_are_counted_and_never_dropped(study: Study) -> None:
    table = study.summary().set_index("label")
    assert table.loc["weight truncate", ["finished", "diverged", "failed", "n"]].tolist() == [3, 2, 0, 5]
    assert table.loc["estimator k1", ["finished", "diverged", "failed", "n"]].tolist() == [4, 0, 1, 5]
    assert table.loc["weight truncate", "mean"] < table.loc["weight truncate", "mean_finished"]
    assert not table.loc["weight truncate", "stable"]
    assert not table.loc["weight truncate", "best_group"]


def test_effects_find_what_was_put_in(study: Study) -> None:
    effects = {effect.axis: effect for effect in compare(study, study.tasks[0]).effects}
    levels = {(axis, level.value): level for axis, effect in effects.items() for level in effect.levels}
    for axis, value in (("placement", "none"), ("weight", "power"), ("estimator", "k2")):
        level = levels[axis, value]
        assert level.low - 0.01 <= EFFECTS[axis, value] <= level.high + 0.01
    assert effects["training.lr"].p_holm < 0.001
    assert effects["training.lr"].levels[1].estimate == pytest.approx(-0.22, abs=0.03)


def test_columns_are_documented(study: Study) -> None:
    assert list(study.cells) == list(CELLS)
    assert list(study.summary()) == list(SUMMARY)


def test_labels_say_how_a_cell_differs_from_the_baseline(study: Study) -> None:
    labels = set(study.labels.values())
    assert {"baseline", "estimator k1", "placement none", "weight power", "lr 0.0001"} <= labels


def test_another_metric_and_a_metric_that_does_not_exist(study: Study) -> None:
    table = study.summary("reverse_kl_final")
    assert table["mean"].is_monotonic_increasing
    with pytest.raises(UserError, match="accuracy_final"):
        study.summary("accuracy_finel")


def test_a_single_seed_has_no_interval_and_no_test(small: Small) -> None:
    study = load_run(small(seeds=1).path)
    table = study.summary()
    assert table["low"].isna().all()
    assert table["p"].isin([1.0]).sum() + table["p"].isna().sum() == len(table)
    assert any("One seed per cell" in note for note in study.notes)
    comparison = compare(study, study.tasks[0])
    assert np.isnan(comparison.critical)
    assert comparison.table["best_group"].sum() == 1


def test_constant_rewards_are_no_difference(small: Small) -> None:
    study = load_run(small(constant=True).path)
    table = study.summary()
    assert table["p"].dropna().tolist() == [1.0]
    assert table["improvement"].dropna().tolist() == [0.5]
    comparison = compare(study, study.tasks[0])
    assert [effect.p for effect in comparison.effects] == [1.0]
    assert table["best_group"].all()


def test_all_diverged_and_all_failed(small: Small) -> None:
    diverged = load_run(small("a", outcome=lambda cell: "diverged").path).summary()
    assert diverged["finished"].sum() == 0
    assert diverged["diverged"].sum() == 6
    failed = load_run(small("b", outcome=lambda cell: "failed").path).summary()
    assert failed["mean"].isna().all()
    assert failed["failed"].sum() == 6


def test_unfinished_seeds_are_open_not_lost(small: Small) -> None:
    study = load_run(small(outcome=lambda cell: {0: "stopped", 1: "missing"}.get(cell.seed, "finished")).path)
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
    assert all(pair.freedom == 1 for pair in comparison.interactions)
    assert sum(effect.share for effect in comparison.effects) <= 1.0


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
    table, _ = across_tasks([compare(study, task) for task in study.tasks])
    assert table["label"].tolist() == ["baseline", "estimator k1"]
    everything = study.cells[study.cells["label"] == "baseline"]["reward_final"]
    assert table["iqm"][0] == pytest.approx(stats.trim_mean(everything, 0.25))
    assert (table["iqm_low"] < table["iqm"]).all()
    assert (table["iqm"] < table["iqm_high"]).all()
