"""The section `tune` of a grid file: which cells its two stages have, and what cannot be tuned."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from klab.grid import Grid, UserError, parse_grid
from klab.grid.tuning import FIRST_SEED, launched, stages
from klab.harness.dispatch.merging import _with_one_of_each, merge_equivalent


def grid_of(tune: Any, **sections: Any) -> Grid:
    data = {
        "name": "study",
        "task": {"name": "addition"},
        "training": {"updates_per_rollout": 2, "lr": 3e-4},
        "design": "one_at_a_time",
        "axes": {"estimator": ["k1", "k3"], "placement": ["none", "loss"]},
        "seeds": 3,
        "tune": tune,
        **sections,
    }
    return parse_grid(yaml.safe_dump(data, sort_keys=False), "study.yaml")


RATES = {"training.lr": [1e-4, 3e-4, 1e-3], "seeds": 2}


def test_every_configuration_tries_every_setting_on_seeds_of_their_own() -> None:
    grid = grid_of(RATES)
    found = stages(grid)
    assert found is not None
    assert len(grid.groups) == 3
    assert {cell.seed for cell in found.tuning} == {FIRST_SEED, FIRST_SEED + 1}
    assert len(found.tuning) == 3 * 3 * 2
    assert sorted({cell.training.lr for cell in found.tuning}) == [1e-4, 3e-4, 1e-3]
    assert found.untuned == grid.cells
    assert found.chosen == 3 * 3
    assert [cell.id for cell in launched(grid).cells] == [cell.id for cell in (*found.tuning, *grid.cells)]


def test_the_configurations_as_written_need_not_run() -> None:
    found = stages(grid_of({**RATES, "untuned": False}))
    assert found is not None
    assert found.untuned == ()


def test_several_fields_are_tuned_together() -> None:
    grid = grid_of({"training.lr": [1e-4, 1e-3], "training.weight_decay": [0.0, 0.1], "seeds": [70, 71]})
    assert grid.tuning is not None
    settings = next(iter(grid.tuning.arms.values()))
    assert [setting.words for setting in settings] == [
        "training.lr=0.0001, training.weight_decay=0",
        "training.lr=0.0001, training.weight_decay=0.1",
        "training.lr=0.001, training.weight_decay=0",
        "training.lr=0.001, training.weight_decay=0.1",
    ]
    assert grid.tuning.seeds == (70, 71)


def test_where_a_setting_does_nothing_there_is_nothing_to_choose() -> None:
    grid = grid_of({"beta": [0.01, 0.1], "seeds": 1, "untuned": False})
    found = stages(grid)
    assert grid.tuning is not None
    assert found is not None
    free = [arm for arm, settings in grid.tuning.arms.items() if len(settings) == 1]
    assert len(free) == 1  # the one without a KL term
    assert {cell.group for cell in found.kept} == set(free)
    assert len(found.tuning) == 2 * 2
    assert found.chosen == 2 * 3


def test_arms_that_were_merged_do_not_tune() -> None:
    grid = grid_of(RATES)
    first = {cell.group: cell for cell in reversed(grid.cells)}
    members = [[first[group].with_seeds([seed])[0] for group in grid.groups[:2]] for seed in grid.seeds]
    merged = _with_one_of_each(grid, members, keep=())
    found = stages(merged)
    assert found is not None
    assert len(found.tuning) == 2 * 3 * 2


def test_a_grid_that_tunes_the_objective_is_not_merged() -> None:
    grid = grid_of({"beta": [0.01, 0.1], "seeds": 1})
    assert grid.tuning is not None
    assert grid.tuning.changes_algorithms(grid)
    assert merge_equivalent(grid).grid is grid
    assert not grid_of(RATES).tuning.changes_algorithms(grid_of(RATES))  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("tune", "said"),
    [
        ({"training.lrr": [1, 2], "seeds": 1}, "did you mean 'training.lr'"),
        ({"training.lr": [1e-4, 1e-3]}, "tune.seeds: missing"),
        ({"seeds": 2}, "tunes nothing"),
        ({"training.lr": [1e-4], "seeds": 1}, "has one value only"),
        ({"training.lr": 1e-4, "seeds": 1}, "not a list of values"),
        ({"training.lr": [1e-4, 1e-4], "seeds": 1}, "duplicate value"),
        ({"training.lr": [1e-4, "fast"], "seeds": 1}, "a number belongs here"),
        ({"training.lr": [1e-4, 1e-3], "seeds": [0, 7]}, "is a seed of the study"),
        ({"training.lr": [1e-4, 1e-3], "seeds": 0}, "not a count of at least 1"),
        ({"training.lr": [1e-4, 1e-3], "seeds": 1, "untuned": "yes"}, "not true or false"),
        ({"estimator": ["k1", "k2"], "seeds": 1}, "is an axis of the study"),
        ({"task.digits": [1, 2], "seeds": 1}, "is what is compared"),
        ({"training": [{"lr": 1e-4}, {"lr": 1e-3}], "seeds": 1}, "is a whole section"),
        ({"cap": [1.0, 2.0], "seeds": 1}, "has no effect in any cell"),
    ],
)
def test_mistakes_are_named(tune: Any, said: str) -> None:
    with pytest.raises(UserError) as caught:
        grid_of(tune)
    assert said in str(caught.value)


def test_a_setting_must_not_tell_apart_what_is_one_configuration_as_written() -> None:
    with pytest.raises(UserError, match="tells configurations apart that are one as written"):
        grid_of(
            {"training.updates_per_rollout": [1, 4], "seeds": 1},
            training={"updates_per_rollout": 1},
            axes={"ratio": ["token", "sequence_mean"], "estimator": ["k1", "k3"]},
            design="product",
        )
