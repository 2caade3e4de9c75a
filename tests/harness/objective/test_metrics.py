"""The metrics of a small update, by hand."""

from __future__ import annotations

import math

import pytest

from klab.grid import Objective
from klab.grid.catalogue import AXES
from klab.harness.objective import LossCoefficients, objective_loss, update_context
from tests.support.random_batches import tokens

LOG2 = math.log(2.0)

BATCH = tokens(
    [[-1.0, -1.0], [-1.0, -1.0], [-1.0, -1.0]],
    behaviour=[[-1.0 - 2 * LOG2, -1.0], [-1.0 + LOG2, -50.0], [-1.0, -1.0]],  # ρ: 4, 1 | ½, · | 1, 1
    reference=[[-1.0 - LOG2, -1.0], [-1.0, -50.0], [-1.0, -1.0]],  # κ: log 2, 0 | 0, · | 0, 0
    mask=[[True, True], [True, False], [True, True]],
    rewards=[1.0, 0.0, 5.0],
    groups=[0, 0, 1],
)
OBJECTIVE = Objective(estimator="k3", beta=0.1, weight="ppo_clip", advantage="group_center")


def test_every_number() -> None:
    metrics = objective_loss(OBJECTIVE, BATCH).metrics
    # A: ½, ½ | −½ | 0, 0; clipped are ρ = 4 with A > 0 and ρ = ½ with A < 0, so that w: 0, 1 | 0 | 1, 1
    k3 = 0.5 - 1 + LOG2
    policy_loss = -(0.5 * (1 * 0.5 * -1.0)) / 3  # the surrogate is w·A·ℓ
    kl_loss = 0.1 * (k3 / 2) / 3
    assert metrics == pytest.approx(
        {
            "loss": policy_loss + kl_loss,
            "policy_loss": policy_loss,
            "kl_loss": kl_loss,
            "k1": LOG2 / 5,
            "k2": LOG2**2 / 2 / 5,
            "k3": k3 / 5,
            "kl_behaviour": ((4 - 1 - 2 * LOG2) + (0.5 - 1 + LOG2)) / 5,
            "ratio_mean": (4 + 1 + 0.5 + 1 + 1) / 5,
            "ratio_max": 4.0,
            "ess": 3**2 / (5 * 3),
            "weight_mean": 3 / 5,
            "clip_fraction": 2 / 5,
            "informative_groups": 1 / 2,
            "advantage_mean": 0.1,
            "advantage_std": math.sqrt((0.25 * 3) / 5 - 0.01),
        },
        abs=1e-12,
    )
    assert all(type(value) is float for value in metrics.values())


def test_weights_that_are_all_zero_have_no_effective_sample() -> None:
    metrics = objective_loss(Objective(weight="mask", low=1.5, high=1.6, advantage="raw"), BATCH).metrics
    assert metrics["ess"] == 0.0
    assert metrics["clip_fraction"] == 1.0
    assert metrics["informative_groups"] == 1.0


def test_the_kl_stands_in_the_term_where_its_placement_puts_it() -> None:
    """k3 = log 2 − ½ at the first token alone, whose ρ is 4. PPO clips that token, so only the second one counts."""
    k3 = LOG2 - 0.5
    without = (0.5 * 1.0 + 5.0) / 3  # −agg(w·A·ℓ) with A = R: ½·1 of the first trajectory, 5 of the third
    expected = {
        "none": (without, 0.0),
        "loss": (without, 0.1 * (k3 / 2) / 3),
        "loss_reweighted": (without, 0.1 * (4 * k3 / 2) / 3),
        "loss_corrected": (without, 0.1 * (4 * k3 / 2) / 3),
        "reward": ((0.5 * (1.0 - 0.1 * k3) + 5.0) / 3, 0.0),
        "reward_to_go": (without, 0.0),  # the second token comes after the KL
        "reward_and_loss": (without, 0.1 * (k3 / 2) / 3),
        "advantage_and_loss": (without, 0.1 * (k3 / 2) / 3),
    }
    for placement, terms in expected.items():
        takes = AXES["placement"].values[placement].parameters
        settings = {"beta": 0.1, "kl_scale": "sum", "kl_at": "current"}
        objective = Objective(
            placement=placement, advantage="raw", **{name: settings[name] for name in settings if name in takes}
        )
        out = objective_loss(objective, BATCH)
        assert (float(out.policy_loss.detach()), float(out.kl_loss.detach())) == pytest.approx(terms, abs=1e-12)
        assert float(out.loss.detach()) == pytest.approx(sum(terms), abs=1e-12)


def test_the_coefficients_of_an_update_scale_the_kl_and_add_the_trust_region() -> None:
    objective = Objective(estimator="k3", beta=0.1, weight="ppo_clip", advantage="raw")
    context = update_context(objective, BATCH, LossCoefficients(kl=3.0, trust=0.5))
    out = objective_loss(objective, BATCH, context)
    kl = 3 * 0.1 * ((LOG2 - 0.5) / 2) / 3
    trust = 0.5 * ((4 - 1 - 2 * LOG2) / 2 + (0.5 - 1 + LOG2)) / 3  # e^λ − 1 − λ: 1st trajectory's mean, the 2nd's token
    assert float(out.kl_loss.detach()) == pytest.approx(kl, abs=1e-12)
    assert float((out.loss - out.policy_loss - out.kl_loss).detach()) == pytest.approx(trust, abs=1e-12)


def test_metrics_do_not_touch_the_graph() -> None:
    out = objective_loss(OBJECTIVE, BATCH)
    assert out.metrics is out.metrics
    assert not any(value.requires_grad for value in vars(out.token_stats).values())
    out.loss.backward()
    assert BATCH.logp.grad is not None
    assert BATCH.logp.grad.any()
