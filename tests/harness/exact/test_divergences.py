"""Exact divergences of policies, and which cells have the gradient of their own divergence."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from klab.grid import Objective
from klab.harness.exact.divergences import renyi_divergence, sequence_divergence, token_divergence
from klab.harness.exact.gradients import exact_kl, gradient_of
from klab.harness.exact.instance import Instance
from klab.harness.exact.kl_errors import OF_ANY, PLACEMENTS, kl_errors
from klab.harness.exact.report import estimator_report
from klab.harness.objective.divergence import DIVERGENCES, FORWARD, Divergence
from tests.harness.exact.enumeration import policy_of

GENERATORS: dict[str, Any] = {
    "reverse": lambda delta: -math.log(delta),
    "forward": lambda delta: delta * math.log(delta),
    "jeffreys": lambda delta: (delta - 1) * math.log(delta) / 2,
    "alpha": lambda delta: 4 - 4 * math.sqrt(delta),
}
OTHERS = tuple(name for name in GENERATORS if name != "reverse")


def made(name: str) -> Divergence:
    return DIVERGENCES[name](**({"alpha": 0.5} if name == "alpha" else {}))


@pytest.mark.parametrize("end", [None, 1])
@pytest.mark.parametrize("name", GENERATORS)
def test_the_divergence_of_tokens_is_that_of_the_states_that_the_policy_visits(name: str, end: int | None) -> None:
    """By a walk over prefixes, against the sum over trajectories."""
    lab = Instance(3, 3, 5, end)
    policy, reference = (policy_of(each.logits.tolist()) for each in (lab.behaviour, lab.reference))

    def walked(prefix: tuple[int, ...]) -> float:
        if len(prefix) == 3 or (prefix and prefix[-1] == end):
            return 0.0
        return sum(
            p * (GENERATORS[name](q / p) + walked((*prefix, v)))
            for v, (p, q) in enumerate(zip(policy[prefix], reference[prefix], strict=True))
        )

    found = token_divergence(lab.behaviour, lab.reference, made(name))
    assert float(found) == pytest.approx(walked(()), rel=1e-12)


def test_divergences_of_trajectories_add_up_over_tokens_for_reverse_kl_alone() -> None:
    lab = Instance(3, 3, 1)
    for name in GENERATORS:
        whole = float(sequence_divergence(lab.behaviour, lab.reference, made(name)))
        tokens = float(token_divergence(lab.behaviour, lab.reference, made(name)))
        assert (whole == pytest.approx(tokens, rel=1e-12)) == (name == "reverse")
    whole = float(sequence_divergence(lab.behaviour, lab.reference, FORWARD))
    assert whole == pytest.approx(float(exact_kl(lab.behaviour, lab.reference, "forward")), rel=1e-12)


def test_the_gradient_is_the_limit_of_differences() -> None:
    lab = Instance(2, 2, 3)
    for name in GENERATORS:

        def value(policy: Any, name: str = name) -> Any:
            return token_divergence(policy, lab.reference, made(name))

        slope = gradient_of(lab.behaviour, value)
        for row, column in itertools.product(range(3), range(2)):
            step = torch.zeros(3, 2, dtype=torch.float64)
            step[row, column] = 1e-6
            difference = float(value(lab.behaviour.moved(step)) - value(lab.behaviour.moved(-step))) / 2e-6
            assert float(slope[row, column]) == pytest.approx(difference, rel=1e-6, abs=1e-9)


def test_renyi_is_a_logarithm_of_a_divergence_of_trajectories() -> None:
    lab = Instance(3, 3, 1)
    hellinger = float(sequence_divergence(lab.behaviour, lab.reference, made("alpha")))
    assert float(renyi_divergence(lab.behaviour, lab.reference, 0.5)) == pytest.approx(
        -2 * math.log(1 - hellinger / 4), rel=1e-12
    )
    near = float(renyi_divergence(lab.behaviour, lab.reference, 1 - 1e-6))
    assert near == pytest.approx(float(exact_kl(lab.behaviour, lab.reference)), rel=1e-4)


@pytest.mark.parametrize("name", OTHERS)
def test_the_table_knows_the_exact_entries_of_every_divergence(name: str) -> None:
    entries = kl_errors(Instance(seed=1), (0.0, 0.3), [name])
    table = {(e.estimator, e.placement, e.ratio, e.drift): e.error for e in entries}
    assert {key[:2] for key in table} == set(itertools.product(OF_ANY, PLACEMENTS))
    exact = {key for key, error in table.items() if error < 1e-12}
    products = ("sequence_product", "prefix_product")
    corrected = {(e, "loss_corrected", ratio) for e in ("k1", "k3") for ratio in products}
    assert {key[:3] for key in exact if key[3] > 0} == corrected
    on_policy = {key[:2] for key in exact if key[3] == 0.0 and key[2] == "none"}
    assert on_policy == set(itertools.product(("k1", "k3"), ("reward_and_loss", "advantage_and_loss")))


@pytest.mark.parametrize("name", OTHERS)
def test_on_one_step_the_coefficient_in_the_return_is_exact_and_a_value_is_not(name: str) -> None:
    table = {(e.estimator, e.placement, e.ratio, e.drift): e for e in kl_errors(Instance(4, 1, 2), (0.0, 0.3), [name])}
    for placement, drift in itertools.product(("reward", "reward_to_go", "advantage", "advantage_to_go"), (0.0, 0.3)):
        assert table["reinforce", placement, "token", drift].error < 1e-12
        assert min(table[estimator, placement, "token", drift].error for estimator in ("k1", "k3")) > 0.5
    assert table["k3", "loss_corrected", "token", 0.3].error < 1e-12


@pytest.mark.parametrize("name", GENERATORS)
def test_beside_a_normalised_reward_the_divergence_keeps_its_own_gradient(name: str) -> None:
    """Groups of three, enumerated; inside the normalised returns it does not."""
    lab = Instance(2, 2, 1)
    settings: dict[str, Any] = {"estimator": "k3", "divergence": name, "beta": 0.5, "weight": "one"}

    def expected(placement: str, **more: Any) -> torch.Tensor:
        objective = Objective(placement=placement, aggregation="sequence_sum", advantage="group_norm", **more)
        return estimator_report(objective, lab.behaviour, lab.behaviour, lab.reference, lab.reward, 3).expectation

    truth = gradient_of(lab.behaviour, lambda policy: token_divergence(policy, lab.reference, made(name)))
    alone = expected("none", weight="one")
    after = expected("advantage_and_loss", **settings) - alone
    torch.testing.assert_close(after, -0.5 * truth, rtol=1e-10, atol=1e-13)
    inside = expected("reward_and_loss", kl_scale="sum", **settings) - alone
    assert float((inside + 0.5 * truth).norm() / (0.5 * truth).norm()) > 0.1


def test_the_exact_divergence_of_each_state_has_less_variance_and_the_same_expectation() -> None:
    setting = Instance(3, 3, 4).perturbed(0.0)
    for name in OTHERS:
        found = {}
        for estimator in ("k1", "k3", "full"):
            objective = Objective(
                estimator=estimator, divergence=name, placement="reward_and_loss", kl_scale="sum", beta=1.0,
                advantage="raw", weight="one", aggregation="sequence_sum",
            )  # fmt: skip
            found[estimator] = estimator_report(
                objective, setting.policy, setting.behaviour, setting.reference, 0.0 * setting.rewards, 1
            )
            assert found[estimator].bias < 1e-12
        assert found["full"].variance < found["k3"].variance
