"""Critics, moving coefficients and trust regions: where they act, where they are left off, what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from klab.grid import Grid, UserError, parse_grid
from klab.grid.schema.sections import TrainingSection


def grid_of(**sections: Any) -> Grid:
    return parse_grid(json.dumps({"name": "study", "task": "addition", **sections}), "study.yaml")


CONTROLS: dict[str, dict[str, Any]] = {
    "critic": {"critic": {"kind": "head"}},
    "beta_control": {"beta_control": {"target": 0.1}},
    "trust_region": {"trust_region": {}},
}


@pytest.mark.parametrize(
    ("section", "idle", "acting"),
    [
        ("critic", {"advantage": "raw"}, {"advantage": "gae"}),
        ("critic", {"advantage": "group_norm"}, {"advantage": "own.module:advantage"}),
        ("beta_control", {"placement": "none"}, {"placement": "reward"}),
        ("beta_control", {"placement": "log_ratio"}, {"placement": "own.module:placement"}),
        ("trust_region", {"weight": "one"}, {"training.updates_per_rollout": 2, "weight": "one"}),
        ("trust_region", {"weight": "one"}, {"training.lag": 1, "weight": "one"}),
        ("trust_region", {"weight": "one"}, {"training.behaviour": "reference", "weight": "one"}),
    ],
)
def test_a_setting_is_left_off_where_it_does_nothing_and_refused_where_it_never_acts(
    section: str, idle: dict[str, Any], acting: dict[str, Any]
) -> None:
    cells = grid_of(training=CONTROLS[section], design="list", cells=[idle, acting]).cells
    assert [getattr(cell.training, section) is None for cell in cells] == [True, False]
    with pytest.raises(UserError, match=rf"training\.{section}: has no effect in any cell"):
        grid_of(training=CONTROLS[section], design="list", cells=[idle])


def test_an_algorithm_brings_its_critic_which_the_grid_file_may_change_or_take_away() -> None:
    named: dict[str, Any] = {"objective": {"algorithm": "ppo_rlhf"}}
    (plain,) = grid_of(**named).cells
    assert plain.training.critic is not None
    assert (plain.training.critic.kind, plain.training.critic.clip) == ("model", 0.2)
    (other,) = grid_of(**named, training={"critic": {"kind": "head", "clip": None}}).cells
    assert other.training.critic is not None
    assert (other.training.critic.kind, other.training.critic.clip) == ("head", None)
    (without,) = grid_of(**named, training={"critic": None}).cells
    assert without.training.critic is None
    assert len({plain.id, other.id, without.id}) == 3


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"critic": {"coefficient": 0.1}}, "has no effect on a critic of kind 'model'"),
        ({"critic": {"kind": "heads"}}, "did you mean 'head'"),
        ({"critic": {"clip": 0.0}}, "training.critic.clip"),
        ({"beta_control": {}}, "training.beta_control.target"),
        ({"trust_region": {"target": -1.0}}, "training.trust_region.target"),
    ],
)
def test_mistakes(training: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        grid_of(objective={"advantage": "gae"}, training={"lag": 1, **training})


def test_the_default_training_section_has_none_of_them() -> None:
    section = TrainingSection()
    assert (section.critic, section.beta_control, section.trust_region) == (None, None, None)
