"""Drift by random perturbation and by the cell's own inner updates."""

from __future__ import annotations

import math

import pytest
import torch

from klab.grid import Objective
from klab.harness.exact.drift import STEP, drift_size, inner_updates, random_drift
from klab.harness.exact.estimators import update_gradients
from klab.harness.exact.gradient_table import Observed, gradient_table
from klab.harness.exact.gradients import expected_reward
from klab.harness.exact.instance import Instance
from klab.harness.exact.tabular import TabularPolicy
from klab.harness.exact.updates import sampled_updates

GRPO = Objective(advantage="group_norm", weight="ppo_clip", placement="none")


def walk(objective: Objective, updates: int, seed: int = 0) -> list[TabularPolicy]:
    lab = Instance(seed=seed)
    return inner_updates(objective, lab.behaviour, lab.reference, lab.reward, 8, updates)


def test_the_first_inner_update_is_the_on_policy_gradient_of_the_rollout() -> None:
    lab = Instance()
    (first,) = walk(GRPO, 1)
    rollout = sampled_updates(lab.behaviour, 8, 1, torch.Generator().manual_seed(0), 16)
    gradient = update_gradients(GRPO, lab.at(lab.behaviour), rollout).ascent[0]
    moved = (first.logits - lab.behaviour.logits).flatten()
    assert float(moved.norm()) == pytest.approx(STEP, rel=1e-12)
    assert torch.allclose(moved, STEP * gradient / gradient.norm(), atol=1e-15)


def test_inner_updates_drift_away_and_raise_the_reward_of_the_rollout() -> None:
    lab = Instance()
    policies = walk(GRPO, 6)
    sizes = [drift_size(lab.behaviour, policy) for policy in policies]
    assert sizes == sorted(sizes)
    assert sizes[0] > 0
    assert float(expected_reward(policies[-1], lab.reward)) > float(expected_reward(lab.behaviour, lab.reward))


def test_cells_drift_apart_only_once_they_are_off_policy() -> None:
    """The first inner update is on-policy: weights and ratios cannot matter before the second."""
    unclipped = Objective(advantage="group_norm", weight="ratio", ratio="sequence_product", placement="none")
    here, there = walk(GRPO, 12), walk(unclipped, 12)
    assert torch.allclose(here[0].logits, there[0].logits, atol=1e-14)
    assert float((here[-1].logits - there[-1].logits).norm()) > 1e-3


def test_a_cell_without_gradient_does_not_drift() -> None:
    lab = Instance()
    constant = torch.ones(27)
    policies = inner_updates(GRPO, lab.behaviour, lab.reference, constant, 8, 3)
    assert [drift_size(lab.behaviour, policy) for policy in policies] == [0.0] * 3


def test_the_size_of_a_drift_is_the_kl_from_behaviour_to_policy() -> None:
    behaviour, policy = (TabularPolicy(torch.tensor([row]).log()) for row in ([0.5, 0.3, 0.2], [0.9, 0.05, 0.05]))
    expected = sum(b * math.log(b / p) for b, p in ((0.5, 0.9), (0.3, 0.05), (0.2, 0.05)))
    assert drift_size(behaviour, policy) == pytest.approx(expected, abs=1e-6)
    assert drift_size(policy, behaviour) != pytest.approx(expected, abs=1e-2)


def test_random_drift_is_reproducible_and_scales() -> None:
    behaviour = Instance().behaviour
    small, large = random_drift(behaviour, 0.1), random_drift(behaviour, 1.0)
    assert torch.equal(random_drift(behaviour, 0.1).logits, small.logits)
    assert torch.allclose(10 * (small.logits - behaviour.logits), large.logits - behaviour.logits, atol=1e-12)
    assert 0 < drift_size(behaviour, small) < drift_size(behaviour, large)


@pytest.mark.parametrize("kl", [1e-4, 0.02, 0.5])
def test_a_drift_as_large_as_training_showed_has_that_size_and_the_cells_direction(kl: float) -> None:
    instance = Instance(3, 2)
    objective = Objective(placement="none", weight="one", ratio="none", advantage="raw")
    drifted = instance.drifted(objective, 4, 3, kl).policy
    assert drift_size(instance.behaviour, drifted) == pytest.approx(kl, rel=1e-6)
    walked = instance.updated(objective, 4, 3)[-1].policy
    mine, theirs = drifted.logits - instance.behaviour.logits, walked.logits - instance.behaviour.logits
    assert float((mine * theirs).sum() / (mine.norm() * theirs.norm())) == pytest.approx(1.0)


def test_no_drift_stays_where_the_rollout_was_drawn() -> None:
    instance = Instance(3, 2)
    objective = Objective(placement="none", weight="one", ratio="none", advantage="raw")
    assert torch.equal(instance.drifted(objective, 4, 3, 0.0).policy.logits, instance.behaviour.logits)


def test_the_table_measures_every_configuration_at_its_own_observed_drift() -> None:
    configurations = {
        "near": (Objective(placement="none", weight="ratio", ratio="token", advantage="raw"), 2),
        "far": (Objective(placement="none", weight="ratio", ratio="token", advantage="raw"), 2),
        "fresh": (Objective(placement="none", weight="one", ratio="none", advantage="raw"), 2),
    }
    rows = gradient_table(
        configurations,
        instance=Instance(3, 2),
        random_drifts=(),
        inner_updates=(),
        samples=200,
        observed={"near": Observed(1, 0.001), "far": Observed(3, 0.05)},
    )
    assert [(row.group, row.drift) for row in rows] == [
        ("near", "on-policy"),
        ("near", "as trained"),
        ("far", "on-policy"),
        ("far", "as trained"),
        ("fresh", "on-policy"),
    ]
    sizes = {row.group: row.kl for row in rows if row.drift == "as trained"}
    assert sizes == pytest.approx({"near": 0.002, "far": 0.1}, rel=1e-6), "per token, over two steps"
    bias = {row.group: row.report.bias for row in rows if row.drift == "as trained"}
    assert bias["near"] < bias["far"]
