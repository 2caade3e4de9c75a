"""The section `analysis` of a grid file: what is stated beforehand, checked against the study."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from klab.grid import Grid, UserError, parse_grid
from klab.harness.dispatch.merging import _with_one_of_each


def grid_of(analysis: Any, **sections: Any) -> Grid:
    data = {
        "name": "study",
        "task": {"name": "addition"},
        "training": {"updates_per_rollout": 2},
        "design": "one_at_a_time",
        "axes": {"estimator": ["k1", "k2", "k3"], "weight": ["ppo_clip", {"name": "power", "q": 0.5}]},
        "seeds": 3,
        "analysis": analysis,
        **sections,
    }
    return parse_grid(yaml.safe_dump(data, sort_keys=False), "study.yaml")


def test_a_stated_analysis_is_read() -> None:
    contrasts = [{"estimator": "k1"}, {"weight": {"name": "power", "q": 0.5}}]
    grid = grid_of({"score": ["reward", "accuracy"], "delta": 0.02, "contrasts": contrasts, "stop": {"seeds": 9}})
    plan = grid.analysis
    assert plan is not None
    assert (plan.scores, plan.delta) == (("reward", "accuracy"), 0.02)
    assert plan.stop is not None
    assert (plan.stop.seeds, plan.stop.spending) == (9, "obrien_fleming")
    cells = {cell.group: cell.objective for cell in grid.cells}
    assert [(cells[group].estimator, cells[group].weight) for group in grid.stated] == [
        ("k1", "ppo_clip"),
        ("k3", "power"),
    ]


def test_a_grid_without_the_section_states_nothing() -> None:
    grid = parse_grid("name: a\ntask: addition\n", "a.yaml")
    assert (grid.analysis, grid.stated) == (None, ())


@pytest.mark.parametrize(
    ("analysis", "key", "said"),
    [
        ({"scor": "reward"}, "analysis", "did you mean 'score'"),
        ({"score": "rewart"}, "analysis.score", "did you mean 'reward'"),
        ({"score": []}, "analysis.score", "not a list of different scores"),
        ({"delta": -0.1}, "analysis.delta", "greater than or equal to 0"),
        ({"stop": {"seeds": 2}}, "analysis.stop.seeds", "fewer than the 3 seeds"),
        ({"stop": {"seeds": 5, "spending": "pococ"}}, "analysis.stop.spending", "did you mean 'pocock'"),
        ({"contrasts": {"estimator": "k1"}}, "analysis.contrasts", "not a list of cells"),
        ({"contrasts": [{"estimator": "k9"}]}, "analysis.contrasts.0", "'k9'"),
        ({"contrasts": [{"estimater": "k1"}]}, "analysis.contrasts.0", "did you mean 'estimator'"),
        ({"contrasts": [{"weight": "ratio"}]}, "analysis.contrasts.0", "no cell of this grid is the baseline with"),
        ({"contrasts": [{"estimator": "k3"}]}, "analysis.contrasts.0", "is the baseline itself"),
        ({"contrasts": [{"estimator": "k1"}, {"estimator": "k1"}]}, "analysis.contrasts.1", "duplicate contrast"),
    ],
)
def test_mistakes_name_the_key_and_the_nearest_valid_value(analysis: Any, key: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        grid_of(analysis)
    assert said in str(caught.value)
    assert str(caught.value.key).startswith(key)
    assert caught.value.file == "study.yaml"


def test_a_contrast_needs_a_baseline() -> None:
    with pytest.raises(UserError, match="there is no baseline to compare with"):
        grid_of({"contrasts": [{"estimator": "k1"}]}, design="product", axes={"estimator": ["k1", "k2"]})


def test_a_contrast_follows_its_cell_into_the_one_that_is_run_for_it() -> None:
    grid = grid_of({"contrasts": [{"estimator": "k1"}, {"estimator": "k2"}]})
    first = {cell.group: cell for cell in reversed(grid.cells)}
    members = [first[grid.stated[1]], first[grid.stated[0]]]
    merged = _with_one_of_each(grid, [members], keep=())
    assert merged.stated == (grid.stated[1],)
    assert _with_one_of_each(grid, [[first[str(grid.baseline)], *members]], keep=()).stated == ()
