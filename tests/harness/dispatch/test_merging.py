import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from klab.grid import parse_grid
from klab.harness.dispatch.merging import merge_equivalent
from klab.harness.store import Run

STUDY = """
name: twins
task: addition
training: {updates: 2}
design: list
cells:
  - {estimator: k2, placement: loss}
  - {estimator: k1, placement: advantage}
  - {estimator: k1, placement: loss}
  - {estimator: k3, placement: loss}
seeds: 2
"""


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KLAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_equal_algorithms_are_run_once_and_the_survivor_remembers_both_spellings():
    grid = parse_grid(STUDY, "twins.yaml")
    counted = []
    merged = merge_equivalent(grid, progress=lambda done, total: counted.append((done, total))).grid
    assert len(grid.cells) == 8
    assert len(merged.cells) == 6
    assert counted[-1] == (4, 4)
    assert merged.cells[0].spellings == ("estimator=k2, placement=loss", "estimator=k1, placement=advantage")
    assert [equality.merged for equality in merged.equalities] == [(grid.cells[2].id,), (grid.cells[3].id,)]


def test_off_policy_they_are_different_algorithms():
    grid = parse_grid(STUDY.replace("updates: 2", "updates: 2, updates_per_rollout: 2"), "twins.yaml")
    assert len(merge_equivalent(grid).grid.cells) == 8


def test_too_many_unknown_objectives_are_left_unmeasured_and_known_ones_cost_nothing(cache):
    grid = parse_grid(STUDY, "twins.yaml")
    assert merge_equivalent(grid, at_most=3).unmeasured == 4
    assert len(merge_equivalent(grid, at_most=4).grid.cells) == 6
    (known,) = (cache / "fingerprints").glob("*.jsonl")
    before = known.read_bytes()
    assert len(merge_equivalent(grid, at_most=0).grid.cells) == 6
    assert known.read_bytes() == before


def test_a_cache_that_cannot_be_written_is_no_obstacle(cache):
    cache.write_text("a file where the folder should be")
    assert len(merge_equivalent(parse_grid(STUDY, "twins.yaml")).grid.cells) == 6


def test_cells_that_a_run_already_has_stay(tmp_path):
    grid = parse_grid(STUDY, "twins.yaml")
    kept = merge_equivalent(grid, keep=[grid.cells[2].id]).grid
    assert len(kept.cells) == 7
    run = Run.create(tmp_path / "run", kept)
    assert grid.cells[2].id in run.cells
    assert len(Run.open(run.path).manifest["equalities"]) == 2


def test_the_baseline_is_the_survivor():
    text = STUDY.replace("design: list", "objective: {estimator: k1, placement: advantage}\ndesign: list")
    grid = parse_grid(text, "twins.yaml")
    merged = merge_equivalent(grid).grid
    assert grid.baseline == grid.cells[2].group
    assert grid.baseline in merged.groups


def test_plan_merges_without_importing_torch(tmp_path):
    (tmp_path / "twins.yaml").write_text(STUDY)
    code = (
        "import sys; from klab.harness.cli.main import main; sys.argv = ['klab', 'plan', 'twins.yaml', '--json']\n"
        "try: main()\nexcept SystemExit: pass\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
        capture_output=True,
        text=True,
        check=True,
    )
    planned = json.loads(done.stdout)
    assert len(planned["cells"]) == 6
    assert len(planned["equalities"]) == 2


CRITIC = """
name: critics
task: addition
training: {updates: 2}
objective: {estimator: k1, advantage: gae}
design: list
cells:
  - {placement: reward_to_go, kl_scale: sum}
  - {placement: advantage_to_go}
  - {placement: reward_to_go, kl_scale: sum, training.critic: {kind: head}}
  - {placement: advantage_to_go, training.critic: {kind: head}}
  - {placement: advantage_to_go, training.critic: {kind: model}}
"""


def test_equal_gradients_do_not_make_equal_critics():
    """γ = λ = 1: a KL inside the returns or after them gives the same advantages from the same values, and other
    values."""
    grid = parse_grid(CRITIC, "critics.yaml")
    merged = merge_equivalent(grid).grid
    assert [equality.merged for equality in merged.equalities] == [(grid.cells[1].id,)]
    assert [cell.id for cell in merged.cells] == [cell.id for i, cell in enumerate(grid.cells) if i != 1]


@pytest.mark.parametrize(
    "settings",
    [
        {"trust_region": {}},
        {"beta_control": {"target": 0.1}},
        {"beta_control": {"schedule": "linear"}},
        {"critic": {}},
        {"reference": "rollout"},
        {"reference": {"ema": 0.9}},
    ],
    ids=lambda s: next(iter(s)),
)
def test_what_training_adds_makes_another_algorithm(settings):
    study = {
        "name": "added",
        "task": "addition",
        "training": {"updates": 4, "updates_per_rollout": 2},
        "objective": {"advantage": "gae"},
        "design": "list",
        "cells": [{}, {f"training.{key}": value for key, value in settings.items()}],
    }
    grid = parse_grid(json.dumps(study), "added.yaml")
    assert len(merge_equivalent(grid).grid.cells) == 2


def test_forms_that_share_no_surroundings_need_no_measurement(cache):
    study = {"name": "apart", "task": "addition", "training": {"updates_per_rollout": 2}, "design": "list"}
    grid = parse_grid(json.dumps(study | {"cells": [{"training.lr": 1e-3}, {"estimator": "k1"}]}), "apart.yaml")
    assert merge_equivalent(grid, at_most=0).unmeasured == 0
    assert not (cache / "fingerprints").exists()
