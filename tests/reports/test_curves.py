"""Curves: means over the same runs from end to end, whatever became of some of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from klab.reports import load_run
from klab.reports.comparison import compare
from klab.reports.figures.curves import axis_curves, training_curves
from klab.reports.figures.effort import UNITS, efforts, positions
from klab.reports.figures.paths import reward_paths, root_kl_and_reward
from klab.reports.figures.series import Cube, RunStates, filled, mean_curve
from tests.reports.synthetic import write_run

UPDATES = np.arange(0, 50, 10)
LINE = np.array([0.2, 0.4, 0.6, 0.8, 1.0])
GONE = np.nan


def states(ended: list[bool], diverged: list[bool]) -> RunStates:
    return RunStates(np.array([ended]), np.array([diverged]))


def test_a_run_that_diverged_is_held_and_moves_the_mean_without_a_jump() -> None:
    values = np.array([[LINE, LINE + 0.1, [0.2, 0.1, GONE, GONE, GONE]]])
    curve = mean_curve(Cube(UPDATES, values), states([True] * 3, [False, False, True]), [0])
    assert curve is not None
    assert curve.mean == pytest.approx([0.7 / 3, 1.0 / 3, 1.4 / 3, 1.8 / 3, 2.2 / 3])
    assert (curve.ends.tolist(), curve.runs) == ([10], 3)
    by_seed = np.array([0.8, 0.9, 0.1])
    expected = stats.t.interval(0.95, 2, by_seed.mean(), by_seed.std(ddof=1) / np.sqrt(3))
    assert (curve.low[3], curve.high[3]) == pytest.approx(expected)


def test_the_last_evaluation_of_a_lost_run_is_no_point_of_the_mean() -> None:
    updates = np.array([0, 10, 13, 20])
    values = np.array([[[0.0, 1.0, GONE, 2.0], [0.0, 1.0, 1.5, GONE]]])
    curve = mean_curve(Cube(updates, values), states([True, True], [False, True]), [0])
    assert curve is not None
    assert curve.updates.tolist() == [0, 10, 20]
    assert curve.mean == pytest.approx([0.0, 1.0, 1.75])


def test_runs_that_failed_or_go_on_are_left_out_unless_there_is_no_other() -> None:
    data = Cube(UPDATES, np.array([[LINE, [9.0, 9.0, GONE, GONE, GONE], [GONE] * 5]]))
    curve = mean_curve(data, states([True, False, False], [False] * 3), [0])
    assert curve is not None
    assert curve.mean == pytest.approx(LINE)
    assert curve.kept.tolist() == [[True, False, False]]
    going = mean_curve(data, states([False] * 3, [False] * 3), [0])
    assert going is not None
    assert going.updates.tolist() == [0, 10]
    assert going.mean == pytest.approx((LINE[:2] + 9.0) / 2)
    assert mean_curve(Cube(UPDATES, np.full((1, 2, 5), GONE)), states([True] * 2, [False] * 2), [0]) is None


def test_runs_of_different_lengths_are_averaged_where_all_have_been() -> None:
    values = np.array([[[0.0, 2.0, 4.0, GONE, GONE]], [[0.0, GONE, 2.0, GONE, 4.0]]])
    curve = mean_curve(Cube(UPDATES, values), RunStates(np.ones((2, 1), bool), np.zeros((2, 1), bool)), [0, 1])
    assert curve is not None
    assert curve.updates.tolist() == [0, 10, 20]
    assert curve.mean == pytest.approx([0.0, 1.5, 3.0])
    assert np.isnan(curve.low).all()


@given(st.lists(st.lists(st.floats(0, 1) | st.none(), min_size=6, max_size=6), min_size=1, max_size=5))
def test_a_curve_stays_within_its_runs(rows: list[list[float | None]]) -> None:
    values = np.array([[GONE if value is None else value for value in row] for row in rows])
    held = np.zeros(len(rows), bool)
    lines = filled(np.arange(6), values, held)
    known = np.isfinite(values)
    assert (lines[known] == values[known]).all()
    curve = mean_curve(Cube(np.arange(6), values[None]), RunStates(~held[None], held[None]), [0])
    if curve is not None:
        kept = values[curve.kept[0]]
        assert (curve.mean >= np.nanmin(kept) - 1e-9).all()
        assert (curve.mean <= np.nanmax(kept) + 1e-9).all()
        assert len(kept) == known.any(axis=1).sum()


def test_tokens_and_samples_are_counted_up_to_every_update(tmp_path: Path) -> None:
    study = load_run(write_run(tmp_path / "quickstart").path)
    comparison = compare(study, study.tasks[0])
    found = efforts(study, comparison)
    for unit, of_first, of_last in (("tokens", 540, 60 * 540), ("samples", 128, 30 * 128)):
        assert found[unit].updates[:2].tolist() == [0, 1]
        assert (found[unit].values[:, :, 0] == 0).all()
        assert (found[unit].values[:, :, 1] == of_first).all()
        assert (found[unit].values[:, :, -1] == of_last).all()
    assert (found["samples"].values[:, :, 2] == 128).all()  # two updates use one rollout
    data = training_curves(study, comparison)
    curve = data.mean("reward", [0])
    assert curve is not None
    assert positions(curve, None, data.states).tolist() == curve.updates.tolist()
    assert data.at(curve, "tokens") == pytest.approx(540.0 * curve.updates)


def test_all_quantities_are_drawn_in_every_unit_with_bands_in_their_range(tmp_path: Path) -> None:
    study = load_run(write_run(tmp_path / "quickstart", noise=0.2).path)
    comparison = compare(study, study.tasks[0])
    data = training_curves(study, comparison)
    axis = study.axes[0]
    drawings = axis_curves(study, comparison, axis, 0, data, tuple(UNITS))
    assert [drawing.view for drawing in drawings] == list(UNITS)
    titles = [axes.get_title(loc="left") for axes in drawings[0].figure.axes]
    assert titles == [
        "held-out reward",
        "KL to reference, nats",
        "greedy accuracy",
        "training reward",
        "clip fraction",
        "entropy, nats per token",
        "gradient norm",
        "length, tokens",
    ]
    for drawing in drawings:
        assert "n = 5" in " ".join(text.get_text() for text in drawing.figure.legends[0].get_texts())
        for axes in drawing.figure.axes[-2:]:
            drawing.figure.draw_without_rendering()
            if drawing.view == "updates":
                assert all(label.get_text().isdigit() for label in axes.get_xticklabels())
    for column in ("reward", "accuracy", "reward_mean"):
        curve = data.mean(column, list(range(len(comparison.groups))))
        assert curve is not None
        assert curve.low.min() >= 0.0
        assert curve.high.max() <= 1.0


def test_reward_and_distance_meet_at_the_same_evaluations(tmp_path: Path) -> None:
    study = load_run(write_run(tmp_path / "quickstart").path)
    comparison = compare(study, study.tasks[0])
    data = training_curves(study, comparison)
    pair = root_kl_and_reward(data, [0])
    assert pair is not None
    distance, reward = pair
    assert (distance.updates == reward.updates).all()
    group = comparison.groups[0]
    cells = set(study.cells.loc[study.cells["group"] == group, "cell"])
    last = study.evaluations[study.evaluations["cell"].isin(cells) & (study.evaluations["update"] == 60)]
    assert distance.mean[-1] == pytest.approx(np.sqrt(last["reverse_kl"]).mean())
    assert reward.mean[-1] == pytest.approx(last["reward"].mean())
    drawing = reward_paths(study, comparison, study.axes[0], 0, data)
    assert drawing is not None
    assert "√" in drawing.figure.axes[0].get_xlabel()
