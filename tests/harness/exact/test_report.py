"""Gradient estimators of cells: trajectories, groups, Monte Carlo and a second enumeration agree with each other."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict

import pytest
import torch
from torch import Tensor

from klab.grid import Objective
from klab.grid.catalogue import AXES
from klab.harness.exact import TabularPolicy, estimator_report, exact_gradient
from klab.harness.exact.instance import Instance
from klab.harness.exact.tabular_setting import Setting
from tests.harness.exact.enumeration import (
    Gradient,
    Policy,
    add_scores,
    as_rows,
    coefficients,
    expected_group_update,
    expected_update,
    log_probs,
    policy_of,
    probability,
    sequences,
)

ESTIMATORS = ("k1", "k2", "k3", "abs", "k3_plus")
PLACEMENTS = tuple(AXES["placement"].values)
RATIOS = tuple(AXES["ratio"].values)
WEIGHTS = tuple(name for name, value in AXES["weight"].values.items() if value.statistics != "update")
SETTINGS = {"beta": 0.3, "kl_scale": "sum"}


def cell(**values: str) -> Objective:
    """Per-trajectory advantages, tokens summed; parameters where the placement has them."""
    known = AXES["placement"].values[values.get("placement", "none")].parameters
    chosen = {"placement": "none", "advantage": "raw", "aggregation": "sequence_sum", "weight": "one"}
    return Objective(**(chosen | values), **{key: value for key, value in SETTINGS.items() if key in known})


def lab(seed: int, vocabulary: int = 2, horizon: int = 3, drift: float = 0.4, end: int | None = None) -> Setting:
    return Instance(vocabulary, horizon, seed, end).perturbed(drift)


def trees(setting: Setting) -> tuple[Policy, Policy, Policy]:
    policies = (setting.policy, setting.behaviour, setting.reference)
    current, behaviour, reference = (policy_of(policy.logits.tolist()) for policy in policies)
    return current, behaviour, reference


def reward_of(setting: Setting):  # type: ignore[no-untyped-def]
    every = setting.trajectories
    table = {
        tuple(tokens[:length]): reward
        for tokens, length, reward in zip(
            every.tokens.tolist(), every.lengths.tolist(), setting.rewards.tolist(), strict=True
        )
    }
    return table.__getitem__


def measured(objective: Objective, setting: Setting, group_size: int = 2, samples: int | None = None):  # type: ignore[no-untyped-def]
    return estimator_report(
        objective, setting.policy, setting.behaviour, setting.reference, setting.reward, group_size, samples
    )


def as_tensor(rows: list[list[float]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


COMBINATIONS = list(
    dict.fromkeys(
        [
            *((estimator, placement, "token", "one") for estimator in ESTIMATORS for placement in PLACEMENTS),
            *(("k3", placement, ratio, "ratio") for placement in PLACEMENTS for ratio in RATIOS),
            *(("k1", "reward_to_go", ratio, weight) for ratio in RATIOS for weight in WEIGHTS),
        ]
    )
)


@pytest.mark.parametrize("end", [None, 1])
def test_expected_gradient_of_every_estimator_placement_ratio_and_weight(end: int | None) -> None:
    """Against plain Python loops over sequences: 200 cells, fixed and variable length."""
    setting = lab(3, end=end)
    current, behaviour, reference = trees(setting)
    reward = reward_of(setting)
    for estimator, placement, ratio, weight in COMBINATIONS:
        objective = cell(estimator=estimator, placement=placement, ratio=ratio, weight=weight)
        found = measured(objective, setting)
        written = "none" if placement == "log_ratio" else placement
        expected = expected_update(
            current, behaviour, reference, reward, end=end,
            estimator=estimator, placement=written, ratio=ratio, weight=weight, beta=0.3,
        )  # fmt: skip
        assert found.method == "trajectories"
        assert torch.allclose(found.expectation, as_tensor(expected), rtol=1e-11, atol=1e-13), objective


def test_variance_and_effective_sample_size_against_plain_loops() -> None:
    setting = lab(4)
    current, behaviour, reference = trees(setting)
    reward = reward_of(setting)
    found = measured(cell(placement="reward", estimator="k1", ratio="prefix_product", weight="ratio"), setting)
    mean: dict[tuple[tuple[int, ...], int], float] = {}
    second = weight_sum = weight_square = 0.0
    for sequence in itertools.product(range(2), repeat=3):
        share = probability(behaviour, sequence)
        parts = coefficients(
            sequence, current, behaviour, reference, reward(sequence), 0.0,
            estimator="k1", placement="reward", ratio="prefix_product", weight="ratio", beta=0.3,
        )  # fmt: skip
        gradient: dict[tuple[tuple[int, ...], int], float] = {}
        for j, c in enumerate(parts):
            for v in range(2):
                score = float(v == sequence[j]) - current[sequence[:j]][v]
                gradient[sequence[:j], v] = gradient.get((sequence[:j], v), 0.0) + c * score
        second += share * sum(value**2 for value in gradient.values())
        for key, value in gradient.items():
            mean[key] = mean.get(key, 0.0) + share * value
        ratios = [a - b for a, b in zip(log_probs(current, sequence), log_probs(behaviour, sequence), strict=True)]
        for j in range(3):
            weight = math.exp(sum(ratios[: j + 1]))
            weight_sum += share * weight
            weight_square += share * weight**2
    assert found.variance == pytest.approx(second - sum(value**2 for value in mean.values()), rel=1e-12)
    assert found.ess == pytest.approx(weight_sum**2 / (3 * weight_square), rel=1e-12)
    assert found.mse == pytest.approx(found.mean_squared_error(128), rel=1e-12)
    length = float(found.truth.norm())
    assert found.mean_squared_error(10) == pytest.approx(found.bias**2 + found.variance / 10 / length**2, rel=1e-12)


@pytest.mark.parametrize(
    ("advantage", "baselined"),
    [
        ("group_center", lambda rewards, i: rewards[i] - sum(rewards) / len(rewards)),
        ("leave_one_out", lambda rewards, i: rewards[i] - (sum(rewards) - rewards[i]) / (len(rewards) - 1)),
        (
            "group_norm",
            lambda rewards, i: (
                0.0
                if len(set(rewards)) == 1
                else (rewards[i] - sum(rewards) / len(rewards))
                / (math.sqrt(sum((r - sum(rewards) / len(rewards)) ** 2 for r in rewards) / len(rewards)) + 1e-6)
            ),
        ),
        ("positive", lambda rewards, i: float(rewards[i] > 0)),
    ],
)
def test_group_advantages_are_exact_over_multisets(advantage, baselined) -> None:  # type: ignore[no-untyped-def]
    """Ordered groups of three, one by one, against multisets with multinomial weights."""
    setting = Setting(*(lab(5, horizon=2).policy,) * 3, torch.tensor([1.0, -0.5, 0.0, 2.0]))
    found = measured(cell(advantage=advantage), setting, group_size=3)
    assert found.method == ("trajectories" if advantage == "positive" else "groups")
    tree = policy_of(setting.policy.logits.tolist())
    expected = expected_group_update(tree, tree, reward_of(setting), 3, baselined)
    assert torch.allclose(found.expectation, as_tensor(expected), rtol=1e-11, atol=1e-13)


def test_variance_of_a_group_estimator_is_per_trajectory() -> None:
    """Independent terms: the variance per trajectory is the same whatever the size of the update."""
    setting = lab(6, horizon=2)
    objective = cell(advantage="raw", ratio="token", weight="ratio")
    alone = measured(objective, setting)
    mapped = measured(objective, setting, group_size=3, samples=60_000)
    assert mapped.method == "monte carlo"
    assert mapped.variance == pytest.approx(alone.variance, rel=0.05)


MONTE_CARLO = [
    cell(advantage="group_norm", placement="loss", estimator="k3", weight="ppo_clip", ratio="token"),
    cell(advantage="leave_one_out", placement="reward", estimator="k1"),
    cell(advantage="batch_norm", placement="reward_to_go", estimator="k2", weight="sigmoid", ratio="future_mean"),
    cell(advantage="position_norm", weight="mask", ratio="sequence_mean"),
    cell(advantage="raw", weight="adaptive", ratio="token"),
    cell(advantage="length_baseline", placement="loss_corrected", estimator="k3", ratio="sequence_product"),
    cell(advantage="group_center_batch_norm", placement="loss", estimator="full"),
]


@pytest.mark.parametrize("end", [None, 0])
@pytest.mark.parametrize("objective", MONTE_CARLO, ids=lambda objective: objective.advantage)
def test_monte_carlo_agrees_with_enumeration_within_five_standard_errors(objective: Objective, end: int | None) -> None:
    setting = lab(7, vocabulary=3, horizon=2, end=end)
    exact = measured(objective, setting, group_size=3)
    drawn = measured(objective, setting, group_size=3, samples=12_000)
    assert exact.method == "groups"
    assert exact.standard_error == 0.0
    assert drawn.standard_error > 0.0
    distance = float((drawn.expectation - exact.expectation).norm() / exact.truth.norm())
    assert distance <= 5 * drawn.standard_error
    assert abs(drawn.bias - exact.bias) <= 5 * drawn.standard_error
    assert drawn.variance == pytest.approx(exact.variance, rel=0.1)
    assert drawn.ess == pytest.approx(exact.ess, rel=0.05)


def test_one_update_of_several_groups_shares_its_batch_statistics() -> None:
    setting = lab(8, horizon=2)
    objective = cell(advantage="batch_norm")

    def with_groups(groups: int) -> Tensor:
        return estimator_report(
            objective, setting.policy, setting.behaviour, setting.reference, setting.reward, 2, 40_000, groups=groups
        ).expectation

    alone, together = with_groups(1), with_groups(8)
    assert float(together.norm()) > 1.2 * float(alone.norm())  # half of the pairs have equal rewards and vanish


def test_aggregations_differ_by_their_documented_factor_when_lengths_are_fixed() -> None:
    setting = lab(9, horizon=3)
    reports = {
        name: measured(Objective(placement="none", advantage="raw", weight="one", aggregation=name), setting)
        for name in AXES["aggregation"].values
    }
    for name, found in reports.items():
        factor = 1.0 if name == "sequence_sum" else 1 / 3
        assert torch.allclose(found.expectation, factor * reports["sequence_sum"].expectation, atol=1e-15)
        assert found.bias == pytest.approx(reports["sequence_sum"].bias, rel=1e-12)


def test_per_token_mean_is_the_truth_where_the_cell_divides_its_returns_by_the_length() -> None:
    setting = lab(10, drift=0.0)
    objective = Objective(
        estimator="k1", placement="reward", advantage="raw", weight="one", aggregation="sequence_sum",
        beta=0.5, kl_scale="mean",
    )  # fmt: skip
    found = measured(objective, setting)
    expected = exact_gradient(setting.policy, setting.reference, setting.reward, 0.5, scale="mean")
    assert torch.equal(found.truth, expected)
    assert found.bias < 1e-14


def test_spellings_of_one_algorithm_have_one_truth() -> None:
    """`positive` looks at the reward only: a KL in the returns acts neither in the gradient nor in the truth."""
    setting = lab(10)
    silent = measured(cell(estimator="k1", placement="reward", advantage="positive"), setting)
    none = measured(cell(advantage="positive"), setting)
    assert silent.numbers() == none.numbers()


def test_scale_invariant_bias_ignores_a_factor_and_bias_does_not() -> None:
    setting = lab(11, drift=0.0)
    centred = measured(cell(advantage="group_center"), setting, group_size=4)
    assert centred.bias == pytest.approx(0.25, rel=1e-12)  # (G-1)/G of the gradient
    assert centred.bias_fitted < 1e-7
    assert centred.fitted_scale == pytest.approx(4 / 3, rel=1e-12)
    assert centred.cosine == pytest.approx(1.0, abs=1e-14)
    assert measured(cell(advantage="leave_one_out"), setting, group_size=4).bias < 1e-13


def test_greedy_baseline_uses_the_greedy_trajectory_of_the_behaviour_policy() -> None:
    setting = lab(12)
    shift = float(setting.rewards[setting.behaviour.greedy()])
    baselined = measured(cell(advantage="greedy_baseline"), setting).expectation
    shifted = Setting(setting.policy, setting.behaviour, setting.reference, setting.rewards - shift)
    assert torch.allclose(baselined, measured(cell(advantage="raw"), shifted).expectation, atol=1e-15)


def test_nothing_to_learn_is_no_bias_and_something_learned_from_nothing_is_infinite() -> None:
    policy = TabularPolicy(torch.zeros(1, 3))
    nothing = Setting(policy, policy, policy, torch.ones(3))
    report = measured(cell(advantage="group_center"), nothing)
    assert (report.bias, report.cosine, report.variance) == (0.0, 0.0, 0.0)
    drifted = Setting(policy, lab(13, 3, 1).policy, policy, torch.ones(3))
    assert measured(cell(advantage="raw"), drifted).bias == math.inf


def test_overflow_is_reported_as_such_and_never_as_agreement() -> None:
    far = TabularPolicy(torch.tensor([[800.0, 0.0, -800.0]]))
    near = TabularPolicy(torch.zeros(1, 3))
    report = estimator_report(cell(estimator="k3", placement="loss"), far, near, near, torch.arange(3.0), 2)
    assert not math.isfinite(report.bias)
    assert not math.isfinite(report.variance)
    assert math.isnan(report.cosine)
    assert not report.bias_fitted < 1


def test_token_mean_divides_by_the_tokens_of_the_whole_update() -> None:
    """Ordered pairs of trajectories of different lengths, one by one."""
    setting = lab(15, horizon=3, end=1)
    current, behaviour, reference = trees(setting)
    reward = reward_of(setting)
    walked = sequences(current, 1)
    total: Gradient = defaultdict(float)
    for first, second in itertools.product(walked, repeat=2):
        share = probability(behaviour, first) * probability(behaviour, second) / (len(first) + len(second))
        for sequence in (first, second):
            parts = coefficients(
                sequence, current, behaviour, reference, reward(sequence), 0.0,
                estimator="k3", placement="loss_corrected", ratio="prefix_product", weight="ppo_clip", beta=0.3,
            )  # fmt: skip
            add_scores(total, current, sequence, [share * c for c in parts])
    objective = cell(
        aggregation="token_mean", estimator="k3", placement="loss_corrected", ratio="prefix_product", weight="ppo_clip"
    )
    found = measured(objective, setting)
    assert found.method == "groups"
    assert torch.allclose(found.expectation, as_tensor(as_rows(total, current)), rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize(("group_size", "groups"), [(0, 1), (2, 0)])
def test_empty_updates_are_refused(group_size: int, groups: int) -> None:
    policy = TabularPolicy(torch.zeros(1, 2))
    with pytest.raises(ValueError, match="at least one group"):
        estimator_report(cell(), policy, policy, policy, torch.ones(2), group_size, groups=groups)


def own_advantage(returns):  # type: ignore[no-untyped-def]
    """A user's advantage: the return less the update's mean return, all in one."""
    return returns.returns - returns.trajectory_returns.mean()


def test_a_function_of_the_users_own_is_called_update_by_update() -> None:
    setting = lab(14, horizon=2)
    own = cell(advantage=f"{__name__}:own_advantage")
    built_in = measured(cell(advantage="group_center"), setting)
    found = measured(own, setting)
    assert torch.allclose(found.expectation, built_in.expectation, atol=1e-15)
    assert found.variance == pytest.approx(built_in.variance, rel=1e-12)


def test_whitened_gae_has_batch_statistics_and_the_gradient_of_batch_norm_up_to_verls_1e_8() -> None:
    setting = lab(12)
    whitened = measured(cell(advantage="gae", whiten="batch"), setting, group_size=3)
    assert whitened.method == "groups"
    normed = measured(cell(advantage="batch_norm", std="sample", eps=0.0), setting, group_size=3)
    assert torch.allclose(whitened.expectation, normed.expectation, rtol=1e-5, atol=1e-9)
    assert not torch.equal(whitened.expectation, normed.expectation)
