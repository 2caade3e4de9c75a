"""Identities between objectives that hold exactly, on-policy, per sample or in expectation."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from torch import Tensor

from klab.grid import Objective
from klab.grid.catalogue import AXES
from tests.harness.objective.enumeration import Enumeration
from tests.support.random_batches import gradient, random_batch, random_objective

EXACT = {"rtol": 0.0, "atol": 1e-13}
PLAIN = {"ratio": "none", "weight": "one", "advantage": "raw", "aggregation": "sequence_sum"}
IN_REWARD = {"kl_scale": "sum", "kl_at": "current"}
STEP = Enumeration(symbols=4, steps=1)
SEQUENCES = Enumeration(symbols=3, steps=3)


def _same(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, **EXACT)


def test_on_policy_every_ratio_and_weight_gives_the_same_bits() -> None:
    source = random.Random(0)
    batches = [random_batch(source, drift=0.0) for _ in range(4)]
    expected = [gradient(Objective(ratio="none", weight="one"), batch) for batch in batches]
    assert any(bool(wanted.any()) for wanted in expected)
    weights = [name for name in AXES["weight"].values if name != "clip_cov"]  # which drops tokens at any ratio
    for ratio, weight in itertools.product(AXES["ratio"].values, weights):
        for path in ["score", "ratio"] if ratio in ("none", "token") else ["score"]:
            for batch, wanted in zip(batches, expected, strict=True):
                assert torch.equal(gradient(Objective(ratio=ratio, weight=weight, path=path), batch), wanted)


@pytest.mark.parametrize("seed", range(20))
def test_log_ratio_placement_is_no_placement_bit_for_bit(seed: int) -> None:
    source = random.Random(seed)
    none = random_objective(source, placement="none")
    batch = random_batch(source)
    log_ratio = Objective(**none.settings() | {"placement": "log_ratio"})
    assert torch.equal(gradient(none, batch), gradient(log_ratio, batch))


@pytest.mark.parametrize("seed", range(20))
def test_k2_in_the_loss_is_k1_in_the_advantage_per_sample(seed: int) -> None:
    source = random.Random(seed)
    others = {name: source.choice(list(AXES[name].values)) for name in ("advantage", "aggregation", "ratio")}
    batch = random_batch(source)
    in_loss = Objective(estimator="k2", placement="loss", weight="one", beta=0.7, **others)
    in_advantage = Objective(estimator="k1", placement="advantage", weight="one", beta=0.7, kl_at="current", **others)
    _same(gradient(in_loss, batch), gradient(in_advantage, batch))


@pytest.mark.parametrize("seed", range(20))
def test_corrected_k3_is_reweighted_k2_per_sample_for_token_ratios(seed: int) -> None:
    source = random.Random(seed)
    batch = random_batch(source, drift=0.5)
    corrected = Objective(estimator="k3", placement="loss_corrected", beta=0.7)
    reweighted = Objective(estimator="k2", placement="loss_reweighted", beta=0.7)
    _same(gradient(corrected, batch), gradient(reweighted, batch))


def test_k3_plus_has_the_gradient_of_k2() -> None:
    batch = random_batch(random.Random(3), drift=0.5)
    assert torch.equal(gradient(Objective(estimator="k3_plus"), batch), gradient(Objective(estimator="k2"), batch))


def _zero(space: Enumeration) -> Tensor:
    return torch.zeros(len(space.sequences), dtype=torch.float64)


def test_k1_in_the_loss_has_no_expected_gradient_on_policy_and_no_reference_in_it() -> None:
    objective = Objective(estimator="k1", placement="loss", beta=1.0, **PLAIN)
    policy, reference, other = (SEQUENCES.policy(seed) for seed in (1, 2, 3))
    expected = SEQUENCES.loss_gradient(objective, policy, policy, reference, _zero(SEQUENCES))
    _same(expected, torch.zeros_like(expected))
    batch = random_batch(random.Random(0), drift=0.5)
    elsewhere = batch.replace(logp_reference=batch.logp_reference + 1.5)
    assert torch.equal(gradient(objective, batch), gradient(objective, elsewhere))
    # off-policy the mean is that of KL(old‖π), away from the behaviour policy
    drifted = SEQUENCES.loss_gradient(objective, policy, other, reference, _zero(SEQUENCES))
    _same(drifted, -SEQUENCES.derivative(lambda z: SEQUENCES.divergence(other, z), policy))


def test_k3_in_the_loss_is_the_forward_kl_in_expectation() -> None:
    objective = Objective(estimator="k3", placement="loss", beta=1.0, **PLAIN)
    policy, reference = STEP.policy(1), STEP.policy(2)
    expected = STEP.loss_gradient(objective, policy, policy, reference, _zero(STEP))
    _same(expected, STEP.derivative(lambda z: STEP.divergence(reference, z), policy))


def test_k3_in_the_reward_is_reverse_less_forward_kl_in_expectation() -> None:
    objective = Objective(estimator="k3", placement="reward", beta=1.0, **PLAIN, **IN_REWARD)
    policy, reference = STEP.policy(1), STEP.policy(2)
    expected = STEP.loss_gradient(objective, policy, policy, reference, _zero(STEP))
    reverse = STEP.derivative(lambda z: STEP.divergence(z, reference), policy)
    forward = STEP.derivative(lambda z: STEP.divergence(reference, z), policy)
    _same(expected, reverse - forward)


def _truth(space: Enumeration, policy: Tensor, reference: Tensor, rewards: Tensor, beta: float) -> Tensor:
    return space.derivative(lambda z: beta * space.divergence(z, reference) - space.expected_reward(z, rewards), policy)


@pytest.mark.parametrize(
    ("estimator", "placement", "ratio"),
    [
        ("k1", "reward", "sequence_product"),
        ("k1", "reward_to_go", "sequence_product"),
        ("k1", "loss_corrected", "sequence_product"),
        ("k1", "loss_corrected", "prefix_product"),
        ("k3", "loss_corrected", "sequence_product"),
        ("k3", "loss_corrected", "prefix_product"),
    ],
)
def test_these_are_the_exact_reverse_kl_gradient_off_policy(estimator: str, placement: str, ratio: str) -> None:
    policy, behaviour, reference = (SEQUENCES.policy(seed) for seed in (1, 2, 3))
    settings = PLAIN | {"weight": "ratio", "ratio": ratio} | (IN_REWARD if placement.startswith("reward") else {})
    objective = Objective(estimator=estimator, placement=placement, beta=0.6, **settings)
    # the policy term itself is exact with the whole product only
    rewards = torch.arange(27).sin().double() if ratio == "sequence_product" else _zero(SEQUENCES)
    got = SEQUENCES.loss_gradient(objective, policy, behaviour, reference, rewards)
    _same(got, _truth(SEQUENCES, policy, reference, rewards, 0.6))


@pytest.mark.parametrize("ratio", ["token", "future_product", "sequence_mean"])
def test_other_ratios_are_biased_off_policy(ratio: str) -> None:
    policy, behaviour, reference = (SEQUENCES.policy(seed) for seed in (1, 2, 3))
    settings = PLAIN | {"weight": "ratio", "ratio": ratio} | IN_REWARD
    objective = Objective(estimator="k1", placement="reward", beta=0.6, **settings)
    got = SEQUENCES.loss_gradient(objective, policy, behaviour, reference, _zero(SEQUENCES))
    truth = _truth(SEQUENCES, policy, reference, _zero(SEQUENCES), 0.6)
    assert float((got - truth).norm() / truth.norm()) > 0.05


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_reward_and_loss_is_the_exact_reverse_kl_gradient_on_policy(estimator: str) -> None:
    policy, reference = SEQUENCES.policy(1), SEQUENCES.policy(3)
    objective = Objective(estimator=estimator, placement="reward_and_loss", beta=0.6, **PLAIN, kl_scale="sum")
    got = SEQUENCES.loss_gradient(objective, policy, policy, reference, _zero(SEQUENCES))
    _same(got, _truth(SEQUENCES, policy, reference, _zero(SEQUENCES), 0.6))


@pytest.mark.parametrize("seed", range(10))
def test_gae_without_critic_or_discount_is_the_return_to_go(seed: int) -> None:
    batch = random_batch(random.Random(seed)).replace(values=None)
    settings = {"placement": "reward_to_go", "beta": 0.5, "kl_scale": "sum"}
    _same(
        gradient(Objective(advantage="gae", **settings), batch), gradient(Objective(advantage="raw", **settings), batch)
    )


@pytest.mark.parametrize("aggregation", list(AXES["aggregation"].values))
def test_paths_agree_for_token_and_for_sequence_mean_where_a_trajectory_has_one_advantage(aggregation: str) -> None:
    batch = random_batch(random.Random(5), drift=0.5)
    for ratio in AXES["ratio"].values:
        settings = {"ratio": ratio, "weight": "power", "placement": "none", "advantage": "raw"}
        by_score, by_ratio = (
            gradient(Objective(path=path, aggregation=aggregation, **settings), batch) for path in ("score", "ratio")
        )
        agree = torch.allclose(by_score, by_ratio, **EXACT)
        assert agree == (ratio in ("none", "token", "sequence_mean")), ratio


def test_paths_differ_for_sequence_mean_where_the_advantage_varies_along_the_trajectory() -> None:
    batch = random_batch(random.Random(5), drift=0.5)
    settings = {"ratio": "sequence_mean", "weight": "power", "placement": "reward_to_go", "advantage": "raw"}
    by_score, by_ratio = (gradient(Objective(path=path, **settings), batch) for path in ("score", "ratio"))
    assert not torch.allclose(by_score, by_ratio, **EXACT)
