"""Exact facts about the objective, measured in the lab: which cells estimate the gradient they seem to."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from klab.grid import Objective
from klab.grid.catalogue import AXES
from klab.harness.exact import TabularPolicy, estimator_report, exact_gradient
from klab.harness.exact.estimators import loss_gradients, update_gradients
from klab.harness.exact.instance import Instance
from klab.harness.exact.kl_errors import ESTIMATORS, PLACEMENTS, kl_errors
from klab.harness.exact.report import EstimatorReport
from klab.harness.exact.tabular_setting import Setting
from klab.harness.exact.updates import every_trajectory

RATIOS = tuple(AXES["ratio"].values)
TINY = 1e-12


def kl_cell(estimator: str, placement: str, **values: Any) -> Objective:
    """The KL term alone: advantages are returns, tokens are summed, beta 1, detached KL at the current policy."""
    known = AXES["placement"].values[placement].parameters
    settings = {"beta": 1.0, "kl_scale": "sum", "kl_at": "current"}
    chosen = {"advantage": "raw", "aggregation": "sequence_sum", "weight": "one"}
    return Objective(
        estimator=estimator, placement=placement, **(chosen | values),
        **{name: value for name, value in settings.items() if name in known and name not in values},
    )  # fmt: skip


def unrewarded(setting: Setting) -> Setting:
    return Setting(setting.policy, setting.behaviour, setting.reference, torch.zeros(len(setting.trajectories)))


def measured(objective: Objective, setting: Setting, group_size: int = 2) -> EstimatorReport:
    return estimator_report(objective, setting.policy, setting.behaviour, setting.reference, setting.reward, group_size)


def per_sample(objective: Objective, setting: Setting) -> Tensor:
    """Gradient of every single trajectory."""
    return update_gradients(objective, setting, every_trajectory(setting.behaviour)).ascent


def bandit(seed: int, drift: float = 0.0) -> Setting:
    return unrewarded(Instance(4, 1, seed).perturbed(drift))


def sequences(seed: int, drift: float = 0.0, end: int | None = None) -> Setting:
    return unrewarded(Instance(3, 3, seed, end).perturbed(drift))


@pytest.mark.parametrize("seed", range(3))
def test_on_policy_every_ratio_and_weight_gives_the_same_bits(seed: int) -> None:
    setting = Instance(3, 3, seed).perturbed(0.0)
    batch = setting.batch(torch.arange(27), torch.arange(27) // 3, with_logits=False)
    expected, _, _ = loss_gradients(Objective(weight="one"), batch)
    # Clip-Cov drops tokens by their covariance, whatever the ratio.
    for ratio, weight in itertools.product(RATIOS, AXES["weight"].values.keys() - {"clip_cov"}):
        found, _, _ = loss_gradients(Objective(ratio=ratio, weight=weight), batch)
        assert torch.equal(found, expected), (ratio, weight)


@pytest.mark.parametrize("drift", [0.0, 0.5])
def test_k2_in_the_loss_is_k1_in_the_advantage_sample_by_sample(drift: float) -> None:
    setting = sequences(0, drift)
    loss, advantage = kl_cell("k2", "loss"), kl_cell("k1", "advantage")
    assert torch.allclose(per_sample(loss, setting), per_sample(advantage, setting), rtol=1e-14, atol=1e-15)


def test_k2_in_the_loss_is_the_kl_gradient_for_one_step_and_not_for_the_sum_over_tokens() -> None:
    assert measured(kl_cell("k2", "loss"), bandit(1)).bias < TINY
    assert measured(kl_cell("k2", "loss"), sequences(1)).bias > 0.02


def test_k1_in_the_loss_has_expectation_zero_on_policy_and_never_sees_the_reference() -> None:
    setting = sequences(2)
    assert float(measured(kl_cell("k1", "loss"), setting).expectation.abs().max()) < 1e-15
    drifted = sequences(2, 0.4)
    elsewhere = Setting(drifted.policy, drifted.behaviour, drifted.behaviour, drifted.reward)
    assert torch.equal(per_sample(kl_cell("k1", "loss"), drifted), per_sample(kl_cell("k1", "loss"), elsewhere))
    assert float(measured(kl_cell("k1", "loss"), drifted).expectation.norm()) > 0.05


def test_k3_in_the_loss_is_the_forward_kl_gradient_for_one_step() -> None:
    setting = bandit(3)
    forward = exact_gradient(setting.policy, setting.reference, setting.reward, 1.0, kl="forward")
    assert torch.allclose(measured(kl_cell("k3", "loss"), setting).expectation, forward, atol=1e-15)


def test_k3_in_the_reward_is_reverse_minus_forward_for_one_step() -> None:
    setting = bandit(4)
    reverse = exact_gradient(setting.policy, setting.reference, setting.reward, 1.0)
    forward = exact_gradient(setting.policy, setting.reference, setting.reward, 1.0, kl="forward")
    assert torch.allclose(measured(kl_cell("k3", "reward"), setting).expectation, reverse - forward, atol=1e-15)


def test_the_five_bernoulli_numbers() -> None:
    """C13, C16: P = (0.8, 0.2), reference (0.5, 0.5), derivative of the penalty with respect to p."""
    policy, reference = (TabularPolicy(torch.tensor([[p, 1 - p]]).double().log()) for p in (0.8, 0.5))
    setting = Setting(policy, policy, reference, torch.zeros(2))

    def slope(estimator: str, placement: str) -> float:
        gradient = measured(kl_cell(estimator, placement), setting).expectation[0]
        return -float(gradient[0]) / (0.8 * 0.2)  # d logit_0 at fixed logit_1 is p(1-p) d p

    assert slope("k1", "reward") == pytest.approx(1.38629, abs=5e-6)
    assert slope("k1", "loss") == pytest.approx(0.0, abs=1e-7)
    assert slope("k2", "loss") == pytest.approx(1.38629, abs=5e-6)
    assert slope("k3", "loss") == pytest.approx(1.875, abs=5e-6)
    assert slope("k3", "reward") == pytest.approx(-0.4887, abs=5e-5)
    assert slope("k2", "reward") == pytest.approx(-0.3093, abs=5e-5)


@pytest.mark.parametrize("drift", [0.0, 0.5])
def test_corrected_k3_is_reweighted_k2_sample_by_sample_for_token_ratios(drift: float) -> None:
    setting = sequences(5, drift)
    corrected = kl_cell("k3", "loss_corrected", ratio="token")
    reweighted = kl_cell("k2", "loss_reweighted", ratio="token")
    assert torch.allclose(per_sample(corrected, setting), per_sample(reweighted, setting), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("estimator", "placement", "values"),
    [
        ("k1", "reward", {"ratio": "sequence_product", "weight": "ratio"}),
        ("k1", "reward_to_go", {"ratio": "sequence_product", "weight": "ratio"}),
        ("k1", "advantage_to_go", {"ratio": "sequence_product", "weight": "ratio"}),
        ("k1", "loss_corrected", {"ratio": "sequence_product"}),
        ("k1", "loss_corrected", {"ratio": "prefix_product"}),
        ("k3", "loss_corrected", {"ratio": "sequence_product"}),
        ("k3", "loss_corrected", {"ratio": "prefix_product"}),
    ],
)
@pytest.mark.parametrize("drift", [0.1, 1.0])
def test_exact_reverse_kl_gradients_off_policy(
    estimator: str, placement: str, values: dict[str, str], drift: float
) -> None:
    for seed in range(3):
        setting = sequences(seed, drift)
        assert measured(kl_cell(estimator, placement, **values), setting).bias < TINY
        by_token = kl_cell(estimator, placement, **(values | {"ratio": "token"}))
        assert measured(by_token, setting).bias > 1e-3


def test_reward_and_loss_together_repair_unbiased_estimators() -> None:
    for estimator in ("k1", "k3", "full"):
        assert measured(kl_cell(estimator, "reward_and_loss"), sequences(6)).bias < TINY
    assert measured(kl_cell("k2", "reward_and_loss"), sequences(6)).bias > 0.02


@pytest.mark.parametrize("drift", [0.0, 0.5])
def test_the_rewarded_log_ratio_is_no_regularisation_bit_for_bit(drift: float) -> None:
    setting = Instance(3, 3, 7).perturbed(drift)
    for values in ({}, {"ratio": "sequence_mean"}, {"ratio": "sequence_mean", "path": "ratio"}, {"weight": "power"}):
        none = Objective(placement="none", advantage="raw", **values)
        relative = Objective(placement="log_ratio", advantage="raw", **values)
        assert torch.equal(per_sample(relative, setting), per_sample(none, setting))


def test_both_paths_agree_for_token_ratios_and_for_gspo() -> None:
    setting = Instance(3, 3, 8).perturbed(0.5)
    for ratio, same in (("token", True), ("sequence_mean", True), ("future_mean", False), ("prefix_product", False)):
        score, through = (
            per_sample(Objective(placement="none", advantage="raw", ratio=ratio, weight="ratio", path=path), setting)
            for path in ("score", "ratio")
        )
        assert torch.allclose(score, through, rtol=1e-12, atol=1e-14) is same, ratio


def bias_order(setting: Setting) -> dict[str, float]:
    """Relative bias of the policy gradient for the corrections of C30."""
    cells: dict[str, dict[str, str]] = {
        "full product": {"ratio": "sequence_product", "weight": "ratio"},
        "full product, q=0.5": {"ratio": "sequence_product", "weight": "power"},
        "prefix product": {"ratio": "prefix_product", "weight": "ratio"},
        "future product": {"ratio": "future_product", "weight": "ratio"},
        "sequence mean": {"ratio": "sequence_mean", "weight": "ratio"},
        "future mean": {"ratio": "future_mean", "weight": "ratio"},
        "token": {"ratio": "token", "weight": "ratio"},
        "none": {"ratio": "none", "weight": "one"},
        "ppo clip": {"ratio": "token", "weight": "ppo_clip"},
    }
    settings = {"placement": "none", "advantage": "raw", "aggregation": "sequence_sum"}
    return {
        name: measured(Objective(**settings, **values), setting).bias  # type: ignore[arg-type]
        for name, values in cells.items()
    }


def centred(instance: Instance, drift: float) -> Setting:
    """The instance less its mean reward under the behaviour policy: a baseline, as every group advantage has."""
    setting = instance.perturbed(drift)
    mean = (instance.behaviour.probabilities() * setting.rewards).sum()
    return Setting(setting.policy, setting.behaviour, setting.reference, setting.rewards - mean)


def mean_biases(drift: float, baseline: bool, instances: int = 20) -> dict[str, float]:
    total: dict[str, float] = {}
    for seed in range(instances):
        instance = Instance(3, 4, seed)
        setting = centred(instance, drift) if baseline else instance.perturbed(drift)
        for name, bias in bias_order(setting).items():
            total[name] = total.get(name, 0.0) + bias / instances
    return total


def test_order_of_the_biases_of_the_importance_ratios() -> None:
    """C30: only the product over the whole trajectory is exact; the token ratio removes the least of the bias."""
    for drift in (0.1, 0.3):
        biases = mean_biases(drift, baseline=True)
        assert biases["full product"] < TINY
        products = (biases["full product, q=0.5"], biases["prefix product"], biases["future product"])
        means = (biases["sequence mean"], biases["future mean"])
        assert max(products) < min(means), biases
        assert max(means) < biases["token"] < biases["none"] < biases["ppo clip"], biases


def test_without_a_baseline_the_token_ratio_beats_the_geometric_means() -> None:
    """C30 holds for centred rewards; with rewards 0 and 1 as they are, token and sequence mean change places."""
    biases = mean_biases(0.3, baseline=False)
    assert biases["token"] < biases["full product, q=0.5"] < min(biases["sequence mean"], biases["future mean"]), biases


def test_token_ratios_are_exact_where_prefixes_and_rewards_do_not_interact() -> None:
    """C30's exception: no prefix in the policy, reward a sum over positions; a parity reward breaks it."""
    generator = torch.Generator().manual_seed(9)
    tables = torch.randn(3, 3, 2, generator=generator, dtype=torch.float64)  # policy, position, symbol
    by_row = torch.tensor([0, 1, 1, 2, 2, 2, 2])
    current, behaviour, reference = (TabularPolicy(table[by_row]) for table in tables)
    tokens = current.trajectories.tokens
    additive = (tokens * torch.tensor([1.0, 2.0, -0.5])).sum(-1)
    objective = Objective(placement="none", advantage="raw", weight="ratio", aggregation="sequence_sum")
    share = torch.zeros(7, 7, dtype=torch.float64)
    for row, position in enumerate(by_row.tolist()):
        share[row] = (by_row == position).double()  # parameters are shared by the rows of a position

    def factored_bias(reward: Tensor) -> float:
        found = measured(objective, Setting(current, behaviour, reference, reward))
        return float((share @ (found.expectation - found.truth)).norm() / (share @ found.truth).norm())

    assert factored_bias(additive) < TINY
    assert factored_bias((tokens.sum(-1) % 2).double()) > 0.1


def test_per_token_mean_with_an_end_symbol_has_a_hidden_length_incentive() -> None:
    """C40: with 1/H(trajectory) E[score / H] is missing, a term as large as the gradient; with 1/H_max it is not."""
    causal = kl_cell("k1", "reward_to_go", kl_scale="mean")
    misses = []
    for seed in range(6):
        fixed, ending = sequences(seed), sequences(seed, end=-1)
        assert measured(causal, fixed).bias < TINY
        assert measured(kl_cell("k1", "reward_to_go"), ending).bias < TINY
        found = measured(causal, ending)
        lengths = ending.trajectories.lengths
        scores = ending.policy.token_scores().sum(1)
        hidden = -(ending.policy.probabilities() / lengths) @ scores
        every = kl_cell("k1", "reward", kl_scale="mean")
        assert torch.allclose(measured(every, ending).expectation.flatten() + hidden, found.truth.flatten(), atol=1e-14)
        misses.append(found.bias)
    assert min(misses) > 0.2
    assert max(misses) > 0.8


def test_causality_halves_the_variance_of_the_kl_term() -> None:
    setting = sequences(10)
    whole, causal = (measured(kl_cell("k1", placement), setting) for placement in ("reward", "reward_to_go"))
    assert torch.allclose(whole.expectation, causal.expectation, atol=1e-14)
    assert causal.variance < 0.75 * whole.variance


def test_multiplying_by_the_ratio_may_remove_all_variance() -> None:
    """C35: behaviour (0.5, 0.5), policy (0.9, 0.1), advantages +1, -1: 0.18 per sample with q=1; biased with q=0."""
    policy, behaviour = (TabularPolicy(torch.tensor([[p, 1 - p]]).double().log()) for p in (0.9, 0.5))
    setting = Setting(policy, behaviour, behaviour, torch.tensor([1.0, -1.0]))
    shared = {"placement": "none", "advantage": "raw", "aggregation": "sequence_sum"}
    weighted = measured(Objective(weight="ratio", **shared), setting)  # type: ignore[arg-type]
    plain = measured(Objective(weight="one", **shared), setting)  # type: ignore[arg-type]
    half = measured(Objective(weight="power", **shared), setting)  # type: ignore[arg-type]
    assert weighted.expectation[0].tolist() == pytest.approx([0.18, -0.18], rel=1e-6)
    assert weighted.variance < 1e-14
    assert weighted.bias < 1e-7
    assert plain.variance / 2 == pytest.approx(0.16, rel=1e-6)  # two logits, opposite scores
    assert half.variance / 2 == pytest.approx(0.018, abs=5e-4)
    assert half.expectation[0, 0].item() == pytest.approx(0.268, abs=5e-4)


def test_group_normalisation_scales_the_gradient_by_the_difficulty() -> None:
    """C44: E g = c_G(p) grad p with c_G(p) = E sqrt(K(G-K)) / (G p(1-p)), K ~ Binomial(G, p)."""
    for p, size in ((0.5, 4), (0.1, 8), (0.01, 16)):
        policy = TabularPolicy(torch.tensor([[p, 1 - p]], dtype=torch.float64).log())
        setting = Setting(policy, policy, policy, torch.tensor([1.0, 0.0]))
        found = measured(Objective(placement="none", weight="one", eps=0.0), setting, size)
        expected = sum(
            math.comb(size, k) * p**k * (1 - p) ** (size - k) * math.sqrt(k * (size - k)) for k in range(size + 1)
        )
        expected /= size * p * (1 - p)
        assert found.method == "groups"
        assert torch.allclose(found.expectation, expected * found.truth, rtol=1e-10)


def test_the_kl_table_covers_every_entry_and_knows_the_exact_ones() -> None:
    table = {(e.estimator, e.placement, e.ratio, e.drift): e for e in kl_errors(Instance(seed=1))}
    assert len(table) == 3 * 9 * len(RATIOS) * 2
    assert {key[:2] for key in table} == set(itertools.product(ESTIMATORS["reverse"], PLACEMENTS))
    plain = {key[:2]: entry.error for key, entry in table.items() if key[2:] == ("none", 0.0)}
    exact_on_policy = {key for key, error in plain.items() if error < TINY}
    assert exact_on_policy == {
        ("k1", "reward"), ("k1", "reward_to_go"), ("k1", "advantage_to_go"), ("k1", "reward_and_loss"),
        ("k3", "reward_and_loss"), ("k1", "advantage_and_loss"), ("k3", "advantage_and_loss"),
    }  # fmt: skip
    exact_off_policy = {key[:3] for key, entry in table.items() if key[3] > 0 and entry.error < TINY}
    assert exact_off_policy == {
        ("k1", "reward", "sequence_product"),
        ("k1", "reward_to_go", "sequence_product"),
        ("k1", "advantage_to_go", "sequence_product"),
        ("k1", "loss_corrected", "sequence_product"),
        ("k1", "loss_corrected", "prefix_product"),
        ("k3", "loss_corrected", "sequence_product"),
        ("k3", "loss_corrected", "prefix_product"),
    }
