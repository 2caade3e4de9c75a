"""What objectives ask of an update reaches them in training: terms of rewards, entropy, the number of the update."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from klab.harness.training import run_cells
from tests.support.training_records import MakeRun, StopAfter, assert_same, finished, weights

HERE = "tests.support.custom_values"
TASK = {"name": "letters_task:TwoTerms"}
OBJECTIVES: list[dict[str, Any]] = [
    {"advantage": "term_norm", "placement": "none"},
    {"weight": "dppo_tv", "tv_low": 0.01, "tv_high": 0.01},
    {"weight": "second_moment_mask", "moment": 0.0001, "aggregation": "prompt_mean"},
    {"weight": f"{HERE}:everything", "advantage": "group_center"},
    {"weight": "clip_cov", "cov_low": -1.0, "cov_share": 0.1, "entropy_share": 0.3},
    {"weight": "kl_cov", "cov_share": 0.2, "entropy_bonus": 0.1, "entropy_share": 0.5},
]
TRAINING = {"updates": 4, "updates_per_rollout": 2, "micro_batch": 8}


def test_a_custom_gdpo_trains_as_the_built_in_one(make_run: MakeRun) -> None:
    built_in = finished(make_run("built-in", TRAINING, [{"advantage": "term_norm"}], task=TASK))
    custom = finished(make_run("custom", TRAINING, [{"advantage": f"{HERE}:gdpo"}], task=TASK))
    summed = finished(make_run("summed", TRAINING, [{"advantage": "group_norm"}], task=TASK))
    mine, theirs, other = (weights(run, run.cells[0]) for run in (built_in, custom, summed))
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert not all(torch.equal(mine[name], other[name]) for name in mine)


@pytest.mark.bits
def test_packed_is_alone_and_resumed_is_undisturbed(make_run: MakeRun) -> None:
    packed, alone = (make_run(name, TRAINING, OBJECTIVES, task=TASK) for name in ("packed", "alone"))
    finished(packed)
    for identity in alone.cells:
        assert run_cells(alone.path, [identity], stop=StopAfter(3)) == {identity: "interrupted"}
        assert run_cells(alone.path, [identity]) == {identity: "finished"}
        assert_same(packed, alone, identity)
