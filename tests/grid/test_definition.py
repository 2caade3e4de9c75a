import contextlib
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from klab.grid import Cell, UserError, load_grid, parse_grid
from klab.grid.algorithms import algorithm_names, load_algorithm
from klab.grid.objective import Objective

STUDIES = Path(__file__).parents[2] / "grid" / "studies"


def grid_of(**sections):
    data = {"name": "study", "task": {"name": "addition"}, "training": {"updates_per_rollout": 2}, **sections}
    return parse_grid(yaml.safe_dump(data, sort_keys=False), "study.yaml")


def spelled(grid):
    return [cell.spellings for cell in grid.cells]


def test_product_is_the_default_design():
    grid = grid_of(axes={"estimator": ["k1", "k2"], "training.lr": [1e-4, 3e-4]}, seeds=2)
    assert len(grid.cells) == 8
    assert [cell.seed for cell in grid.cells[:2]] == [0, 1]
    assert grid.baseline is None
    assert len(grid.groups) == 4


def test_one_at_a_time_has_the_baseline_once():
    grid = grid_of(design="one_at_a_time", axes={"estimator": ["k1", "k3"], "weight": ["ppo_clip", "one"]})
    assert spelled(grid) == [("baseline", "estimator=k3", "weight=ppo_clip"), ("estimator=k1",), ("weight=one",)]
    assert grid.baseline == grid.cells[0].group


def test_zip_and_list():
    grid = grid_of(design="zip", axes={"estimator": ["k1", "k2"], "placement": ["reward", "loss"]})
    assert [(cell.objective.estimator, cell.objective.placement) for cell in grid.cells] == [
        ("k1", "reward"),
        ("k2", "loss"),
    ]
    grid = grid_of(design="list", cells=[{"weight": "one"}, {"weight": {"name": "power", "q": 0.25}, "beta": 0.1}])
    assert grid.cells[1].objective == Objective(weight="power", q=0.25, beta=0.1)


def test_any_dotted_field_is_an_axis():
    grid = grid_of(
        axes={"task.digits": [1, 2], "policy.hidden": [16, 32], "objective.beta": [0.1], "training": [{"lag": 1}]}
    )
    assert {(cell.task.digits, cell.policy.hidden) for cell in grid.cells} == {(1, 16), (1, 32), (2, 16), (2, 32)}
    assert {cell.training.lag for cell in grid.cells} == {1}
    assert {cell.training.updates_per_rollout for cell in grid.cells} == {2}


def test_a_field_of_a_nested_section_is_set_beside_the_others():
    critic = {"kind": "head", "coefficient": 0.3}
    grid = grid_of(
        objective={"advantage": "gae"},
        training={"updates_per_rollout": 2, "critic": critic},
        axes={"training.critic.lr": [1e-3, 2e-3]},
    )
    assert [cell.training.critic.model_dump(exclude_unset=True) for cell in grid.cells] == [
        {**critic, "lr": 1e-3},
        {**critic, "lr": 2e-3},
    ]


def test_algorithms_are_baselines_and_axis_values():
    grid = grid_of(objective={"algorithm": "dapo"}, axes={"advantage": ["raw", "group_norm"]})
    assert all(cell.objective.eps_high == 0.28 for cell in grid.cells)
    grid = grid_of(axes={"algorithm": ["grpo", "gspo", {"name": "dapo", "eps_high": 0.3}]}, objective={"beta": 0.1})
    assert [cell.algorithm for cell in grid.cells] == ["grpo", "gspo", "dapo"]
    assert grid.cells[0].objective.beta == 0.1
    assert grid.cells[2].objective.eps_high == 0.3


def test_every_named_algorithm_is_a_valid_objective_with_a_source():
    assert len(algorithm_names()) >= 30
    for name in algorithm_names():
        algorithm = load_algorithm(name)
        assert algorithm.source
        assert Objective(**algorithm.objective).settings().items() >= algorithm.objective.items()


def test_exclude_matches_partially_and_sees_the_algorithm():
    axes = {"estimator": ["k1", "k3"], "placement": ["reward", "loss"]}
    assert len(grid_of(axes=axes, exclude=[{"estimator": "k1", "placement": "loss"}]).cells) == 3
    assert len(grid_of(axes=axes, exclude=[{"estimator": ["k1", "k2"]}]).cells) == 2
    grid = grid_of(axes={"algorithm": ["grpo", "dapo", "gspo"]}, exclude=[{"aggregation": "token_mean"}])
    assert [cell.algorithm for cell in grid.cells] == ["grpo", "gspo"]


@pytest.mark.parametrize(
    ("rule", "left"),
    [
        ({"name": "power"}, ["one", "mask"]),
        ("power", ["one", "mask"]),
        ({"name": "power", "q": 0.25}, ["one", "power 0.5", "mask"]),
        ({"name": "power", "q": [0.25, 0.5]}, ["one", "mask"]),
        ({"q": 0.5}, ["one", "power 0.25", "mask"]),
        (["one", {"name": "mask", "low": 0.5}], ["power 0.25", "power 0.5"]),
    ],
    ids=str,
)
def test_a_mapping_in_a_rule_matches_values_that_have_its_entries(rule, left):
    weights = ["one", {"name": "power", "q": 0.25}, "power", {"name": "mask", "high": 3.0}]
    grid = grid_of(axes={"weight": weights}, exclude=[{"weight": rule}])
    found = [cell.objective for cell in grid.cells]
    assert [f"power {each.q:g}" if each.weight == "power" else each.weight for each in found] == left


def test_a_rule_sees_defaults_and_what_the_algorithm_brings():
    rates = grid_of(axes={"training.lr": [1e-4, 3e-4], "beta": [0.1, 0.2]}, exclude=[{"training.lag": 0, "beta": 0.1}])
    assert [cell.objective.beta for cell in rates.cells] == [0.2, 0.2]
    clipped = grid_of(axes={"training.clip_norm": [None, 1.0, 2.0]}, exclude=[{"training.clip_norm": 1.0}])
    assert [cell.training.clip_norm for cell in clipped.cells] == [None, 2.0]
    drawn = grid_of(axes={"algorithm": ["grpo", "dapo"]}, exclude=[{"training.equal_groups": "refill"}])
    assert [cell.algorithm for cell in drawn.cells] == ["grpo"]
    tasks = grid_of(axes={"task": ["addition", "countdown"]}, exclude=[{"task.digits": 2}])
    assert [cell.task.name for cell in tasks.cells] == ["countdown"]
    named = grid_of(axes={"algorithm": ["grpo", {"name": "dapo", "eps_high": 0.3}]}, exclude=[{"algorithm": "dapo"}])
    assert [cell.algorithm for cell in named.cells] == ["grpo"]


def test_cells_of_one_canonical_form_are_one_cell_and_remember_their_spellings():
    grid = grid_of(axes={"placement": ["none", "loss"], "estimator": ["k1", "k2"]})
    assert spelled(grid)[0] == ("placement=none, estimator=k1", "placement=none, estimator=k2")
    assert len(grid.cells) == 3


def test_checkpoint_settings_are_no_part_of_the_identity_and_seeds_are():
    plain = grid_of(seeds=[3]).cells[0]
    other = grid_of(seeds=[3], training={"updates_per_rollout": 2, "checkpoint_updates": 7}).cells[0]
    assert plain.id == other.id
    assert plain.group == grid_of(seeds=[4]).cells[0].group
    assert plain.id != grid_of(seeds=[4]).cells[0].id


def test_ids_are_the_same_in_every_process_and_known_for_ever():
    code = "from klab.grid import load_grid; print([c.id for c in load_grid('grid/studies/quickstart.yaml').cells][:1])"
    printed = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "PATH": ""},
            cwd=STUDIES.parents[1],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "1")
    }
    assert len(printed) == 1
    power = {"name": "power", "q": 0.3}
    (cell,) = grid_of(training={"updates": 5, "updates_per_rollout": 2}, axes={"weight": [power]}).cells
    assert cell.id == "k3-loss-token-power-q0.3-group_norm-s0-a42aa74b"


def test_resolved_cells_round_trip_and_notice_tampering():
    for cell in grid_of(axes={"weight": ["ppo_clip", "adaptive"], "task.digits": [1, 2]}).cells:
        assert Cell.from_resolved(cell.resolved()) == cell
        tampered = {**cell.resolved(), "seed": 99}
        with pytest.raises(UserError, match="does not belong to these settings"):
            Cell.from_resolved(tampered)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: a\ntask: addition\naxis: {}", "did you mean 'axes'"),
        ("name: a\ntask: addition\naxes: {weigth: [one]}", "did you mean 'weight'"),
        ("name: a\ntask: addition\naxes: {weight: [ppo_clp]}", "did you mean 'ppo_clip'"),
        ("name: a\ntask: addition\naxes: {weight: one}", "not a list"),
        ("name: a\ntask: addition\naxes: {weight: []}", "needs at least one value"),
        ("name: a\ntask: addition\naxes: {weight: [one, one]}", "duplicate value"),
        ("name: a\ntask: additon", "did you mean 'addition'"),
        ("name: a\ntask: {name: addition, digit: 2}", "did you mean 'digits'"),
        ("name: a\ntask: {name: addition, digits: two}", "task.digits"),
        ("name: a\ntask: {name: addition, digits: 0}", "task.digits"),
        ("name: a\ntask: addition\ntraining: {lr: -1}", "training.lr"),
        ("name: a\ntask: addition\ntraining: {schedule: cosin}", "did you mean 'cosine'"),
        ("name: a\ntask: addition\ntraining: {prompts: 3, minibatches: 2}", "whole groups"),
        ("name: a\ntask: addition\npolicy: {name: tiny, hidden: 30}", "policy.hidden"),
        ("name: a\ntask: addition\npolicy: {name: hf}", "policy.model: missing"),
        ("name: a\ntask: addition\nobjective: {algorithm: grop}", "did you mean 'grpo'"),
        ("name: a\ntask: addition\nobjective: {beta: 0.1, placement: none}", "has no effect in any cell"),
        ("name: a\ntask: addition\naxes: {ratio: [token, sequence_mean]}", "every ratio is 1"),
        ("name: a\ntask: addition\ndesign: products", "did you mean 'product'"),
        ("name: a\ntask: addition\ndesign: zip\naxes: {estimator: [k1], beta: [0.1, 0.2]}", "one length"),
        ("name: a\ntask: addition\nexclude: [{estimator: k3}]", "the grid is empty"),
        ("name: a\ntask: addition\nexclude: [{estimator: k1}]", "matches no cell"),
        ("name: a\ntask: addition\nseeds: 0", "seeds"),
        ("name: a\ntask: addition\nseeds: [1, 1]", "duplicate seed"),
        ("name: a\ntask: addition\ndesign: list\ncells: [{beta: 0.1}, {beta: 0.1}]", "duplicate cell"),
        ("name: ../a\ntask: addition", "is a folder's name"),
        ("task: addition", "name: missing"),
        ("name: a", "task: missing"),
        ("name: a\nname: b\ntask: addition", "line 2, column 1: duplicate key 'name'"),
        ("name: a\ntask: &t addition\npolicy: *t", "aliases are not supported"),
        ("name: [a", "line"),
        ("- a", "not a mapping"),
        ("name: a\ntask: addition\nresources: {gpu: 1}", "did you mean 'gpus'"),
        ("name: a\ntask: addition\ntrack: [wandbb]", "did you mean 'wandb'"),
    ],
)
def test_mistakes_in_a_grid_file_name_the_file_and_the_nearest(text, message):
    with pytest.raises(UserError) as caught:
        parse_grid(text, "bad.yaml")
    assert str(caught.value).startswith("bad.yaml: ")
    assert message in str(caught.value)


def test_unreadable_files_are_mistakes(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        load_grid(tmp_path / "absent.yaml")
    with pytest.raises(UserError, match="directory"):
        load_grid(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="UTF-8"):
        load_grid(tmp_path / "binary.yaml")


SCALARS = st.none() | st.booleans() | st.integers(-10, 10**6) | st.floats() | st.text(max_size=8)
TREES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
)
KEYS = st.sampled_from(
    ["name", "task", "policy", "training", "objective", "design", "axes", "cells", "exclude", "seeds"]
)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(KEYS, TREES, max_size=5))
def test_no_grid_file_makes_a_traceback(data):
    base = {"name": "a", "task": "addition", **data}
    with contextlib.suppress(UserError):
        assert parse_grid(yaml.safe_dump(base, allow_unicode=True), "fuzzed.yaml").cells


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=200))
def test_no_text_makes_a_traceback(text):
    with pytest.raises(UserError):
        parse_grid("a: {b: c\n" + text, "fuzzed.yaml")


@pytest.mark.parametrize("study", sorted(STUDIES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_ready_study_loads(study):
    grid = load_grid(study)
    assert grid.cells
    assert grid.name == study.stem


@pytest.mark.parametrize(
    "advantage", ["group_norm", "group_center", "leave_one_out", "position_norm", "length_baseline"]
)
def test_groups_of_one_are_refused_where_the_reward_would_cancel(advantage):
    with pytest.raises(UserError, match=r"training\.group_size.*group of one does not depend on the reward"):
        grid_of(objective={"advantage": advantage}, axes={"training.group_size": [1, 4]})
    assert len(grid_of(objective={"advantage": "batch_norm"}, axes={"training.group_size": [1, 4]}).cells) == 2
