"""Critics, moving coefficients and trust regions: where they act, where they are left off, what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from klab.grid import Cell, Grid, UserError, parse_grid
from klab.grid.schema.sections import TrainingSection


def grid_of(**sections: Any) -> Grid:
    return parse_grid(json.dumps({"name": "study", "task": "addition", **sections}), "study.yaml")


CONTROLS: dict[str, dict[str, Any]] = {
    "critic": {"critic": {"kind": "head"}},
    "beta_control": {"beta_control": {"target": 0.1}},
    "trust_region": {"trust_region": {}},
    "scheduled β": {"beta_control": {"schedule": "linear", "end": 0.04}},
    "reference": {"reference": {"update_every": 10}},
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
        ("reference", {"placement": "none"}, {"placement": "reward"}),
        ("reference", {"placement": "log_ratio"}, {"placement": "none", "training.behaviour": "reference"}),
        ("reference", {"beta": 0.0}, {"placement": "none", "weight": "own.module:weight"}),
        ("reference", {"training.updates": 10}, {"training.updates": 11}),
        ("reference", {"training.updates": 13, "training.lag": 3}, {"training.updates": 14, "training.lag": 3}),
        ("reference", {"training.updates": 12, "training.updates_per_rollout": 6}, {"training.updates": 13}),
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


HF = {"name": "hf", "model": "some/model"}
REUSED = {"updates_per_rollout": 2}


def ids(**sections: Any) -> list[str]:
    return [cell.id for cell in grid_of(**sections).cells]


@pytest.mark.parametrize(
    ("resources", "dtype"),
    [
        ({}, "float32"),
        ({"cpus": 4}, "float32"),
        ({"gpus": 1}, "bfloat16"),
        ({"gpus": "h100:8"}, "bfloat16"),
        ({"gpus": 2, "gpu_type": "rtx_6000_ada"}, "bfloat16"),
        ({"gpus": "v100:4"}, "float32"),
        ({"gpus": "nvidia_t4:1"}, "float32"),
        ({"gpus": "tesla-p100-pcie:1"}, "float32"),
    ],
)
def test_automatic_precision_is_part_of_the_cell(resources: dict[str, Any], dtype: str) -> None:
    """What a grid file asks for decides, not where it is read; the cell says which, and is that cell written out."""
    for unwritten in (HF, {**HF, "dtype": "auto"}):
        (cell,) = grid_of(policy=unwritten, resources=resources).cells
        assert cell.resolved()["policy"]["dtype"] == dtype
        assert [cell.id] == ids(policy={**HF, "dtype": dtype})
    axis = grid_of(policy=HF, resources=resources, axes={"policy.dtype": ["auto", "float32", "bfloat16"]})
    assert len(axis.cells) == 2
    (tiny,) = grid_of(policy="tiny", resources=resources).cells
    assert tiny.resolved()["policy"]["dtype"] == "float32"


def test_exclude_rules_see_the_precision_that_cells_have() -> None:
    both = grid_of(
        policy=HF,
        resources={"gpus": 1},
        axes={"policy.dtype": ["auto", "float32"], "training.lr": [0.1, 0.2]},
        exclude=[{"policy.dtype": "bfloat16", "training.lr": 0.1}],
    )
    assert [(cell.policy.dtype, cell.training.lr) for cell in both.cells] == [
        ("bfloat16", 0.2),
        ("float32", 0.1),
        ("float32", 0.2),
    ]


def test_float16_is_refused_for_training_and_taken_for_sampling() -> None:
    with pytest.raises(UserError, match=r"policy\.dtype: gradients below 6e-8 would be lost.*float16.*bfloat16"):
        grid_of(policy={**HF, "dtype": "float16"})
    grid_of(policy=HF, training={"sampler": {"dtype": "float16"}})


@pytest.mark.parametrize(
    ("dtype", "training", "found"),
    [
        ("bfloat16", REUSED, "trainer"),
        ("bfloat16", {"minibatches": 4}, "trainer"),
        ("bfloat16", {"lag": 1, "old_logprobs": "trainer"}, "trainer"),
        ("bfloat16", {**REUSED, "old_logprobs": "sampler"}, "sampler"),
        ("bfloat16", {}, "auto"),
        ("bfloat16", {**REUSED, "sampler": {"dtype": "float32"}}, "auto"),
        ("float32", REUSED, "auto"),
        ("float32", {**REUSED, "old_logprobs": "sampler"}, "auto"),
        ("float32", {**REUSED, "old_logprobs": "trainer"}, "trainer"),
    ],
)
def test_who_computes_the_old_policy(dtype: str, training: dict[str, Any], found: str) -> None:
    (cell,) = grid_of(policy={**HF, "dtype": dtype}, training=training).cells
    assert cell.training.old_logprobs == found
    assert cell.training.recomputes_old == (found == "trainer")
    assert ("old_logprobs" in cell.resolved()["training"]) == (found != "auto")
    assert type(cell).from_resolved(cell.resolved()) == cell


def test_who_computes_the_old_policy_is_refused_where_nobody_asks() -> None:
    for training in ({}, {**REUSED, "sampler": {"dtype": "float32"}}):
        with pytest.raises(UserError, match=r"training\.old_logprobs: has no effect in any cell"):
            grid_of(training={**training, "old_logprobs": "trainer"})


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


def test_completions_of_the_last_evaluation() -> None:
    plain, given = grid_of().cells[0], grid_of(training={"final_evaluation_samples": 64}).cells[0]
    assert plain.training.completions_at_the_end == 32
    assert grid_of(training={"evaluation_samples": 40}).cells[0].training.completions_at_the_end == 40
    assert given.training.completions_at_the_end == 64
    assert "final_evaluation_samples" not in plain.resolved()["training"]
    assert given.id != plain.id
    assert Cell.from_resolved(given.resolved()) == given
    with pytest.raises(UserError, match=r"training\.final_evaluation_samples.*training\.evaluation_samples"):
        grid_of(training={"evaluation_samples": 8, "final_evaluation_samples": 4})


def test_a_cell_without_later_settings_has_the_id_that_it_always_had() -> None:
    assert grid_of().cells[0].id == "k3-loss-group_norm-s0-26b6f972"


def test_an_adaptive_beta_is_written_as_before_there_were_schedules() -> None:
    (cell,) = grid_of(training={"beta_control": {"target": 0.1}}).cells
    assert cell.resolved()["training"]["beta_control"] == {"target": 0.1, "horizon": 10.0}
    assert cell.id == "k3-loss-group_norm-s0-e0a84c95"
    (other,) = grid_of(training={"beta_control": {"schedule": "cosine", "end": 0.01, "updates": 20}}).cells
    assert other.resolved()["training"]["beta_control"] == {"schedule": "cosine", "end": 0.01, "updates": 20}
    assert Cell.from_resolved(other.resolved()) == other


def test_a_beta_that_begins_where_it_ends_has_no_schedule() -> None:
    control = {"schedule": "cosine", "end": 0.04}
    cells = grid_of(training={"beta_control": control}, axes={"beta": [0.04, 0.1]}).cells
    assert [cell.training.beta_control is None for cell in cells] == [True, False]


def test_a_reference_in_a_word_and_as_a_section() -> None:
    rules = ["fixed", "rollout", {"update_every": 10}, {"ema": 0.9}, {"follows": "rollout"}, None]
    cells = grid_of(training={"updates_per_rollout": 2}, axes={"training.reference": rules}).cells
    assert len(cells) == 4
    assert len({cell.id for cell in cells}) == 4
    assert cells[0].training.reference is None
    assert "reference" not in cells[0].resolved()["training"]
    assert [cell.training.reference and cell.training.reference.follows for cell in cells[1:]] == [
        "rollout",
        "policy",
        "policy",
    ]
    assert all(Cell.from_resolved(cell.resolved()) == cell for cell in cells)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"reference": "rollouts"}, r"training\.reference: unknown reference policy.*did you mean 'rollout'"),
    ({"reference": {}}, r"training\.reference: says nothing of how the reference moves"),
    ({"reference": {"ema": 1.0}}, r"training\.reference\.ema"),
    ({"reference": {"ema": True}}, r"training\.reference\.ema: true and false"),
    ({"reference": {"update_every": 0}}, r"training\.reference\.update_every"),
    ({"reference": {"update_evry": 2}}, r"training\.reference: unknown key.*did you mean 'update_every'"),
    ({"reference": {"follows": "rollout", "ema": 0.5}}, r"training\.reference\.ema: has no effect beside"),
    ({"reference": "rollout", "behaviour": "reference"}, r"training\.reference\.follows: each is said to be the other"),
    ({"beta_control": {"schedule": "linear", "target": 1}}, r"training\.beta_control\.target: has no effect on"),
    ({"beta_control": {"schedule": "linear", "horizon": 5}}, r"training\.beta_control\.horizon: has no effect on"),
    ({"beta_control": {"target": 1, "end": 0.5}}, r"training\.beta_control\.end: has no effect on schedule: adaptive"),
    ({"beta_control": {"schedule": "cosine", "updates": 1}}, r"training\.beta_control\.updates"),
    ({"beta_control": {"schedule": "cosin"}}, r"did you mean 'cosine'"),
]


@pytest.mark.parametrize(("training", "message"), REFUSED)
def test_mistakes_in_the_kl_term(training: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        grid_of(training={"updates_per_rollout": 2, **training})


@pytest.mark.parametrize(
    ("training", "objective", "policy", "message"),
    [
        ({"reference": {"ema": 0.9}}, {}, {"lora": {"rank": 4}}, r"training\.reference\.ema: adapters are products"),
        (
            {"reference": {"update_every": 9}},
            {},
            {"sharding": "full"},
            r"training\.reference: the reference of a model",
        ),
        ({"reference": {"update_every": 9}}, {"estimator": "full"}, {}, r"reference\.update_every: .*multiple of 2"),
        (
            {"reference": {"update_every": 8}, "lag": 1},
            {"estimator": "full"},
            {},
            r"training\.lag: the estimator 'full'",
        ),
        (
            {"reference": "rollout"},
            {"estimator": "full"},
            {"sharding": "full"},
            r"training\.reference: the reference of",
        ),
    ],
)
def test_references_that_cannot_move_are_refused(
    training: dict[str, Any], objective: dict[str, Any], policy: dict[str, Any], message: str
) -> None:
    settings = {"updates_per_rollout": 2, **training}
    with pytest.raises(UserError, match=message):
        grid_of(training=settings, objective=objective, policy={**HF, **policy})
    (cell,) = grid_of(
        training={**settings, "lag": 0, "reference": {"update_every": 8}}, objective=objective, policy=HF
    ).cells
    assert cell.training.reference is not None


def test_what_never_reads_the_reference_is_refused_nothing() -> None:
    """Without a KL term the reference is left off, and with it what it cannot move beside."""
    policies = [{"policy.lora": {"rank": 4}, "placement": "none"}, {"placement": "loss"}]
    cells = grid_of(training={"reference": {"ema": 0.9}}, policy=HF, design="list", cells=policies).cells
    assert [cell.training.reference is None for cell in cells] == [True, False]


def test_rollouts_shared_with_one_update_are_drawn_from_the_reference() -> None:
    for given, expected in (
        ("rollout", True),
        ({"update_every": 1}, True),
        ({"update_every": 2}, False),
        ({"ema": 0.1}, False),
    ):
        (cell,) = grid_of(training={"reference": given}).cells
        assert cell.training.draws_from_reference == expected
    (cell,) = grid_of(training={"reference": "rollout", "lag": 1}).cells
    assert not cell.training.draws_from_reference
