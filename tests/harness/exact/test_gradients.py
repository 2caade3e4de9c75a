"""Exact gradients against closed forms, published numbers and finite differences of an independent enumeration."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from klab.harness.exact import TabularPolicy, exact_entropy, exact_gradient, exact_kl, gradient_of
from tests.harness.exact.enumeration import Policy, log_probs, policy_of, probability, true_gradient

CATEGORICAL = (0.4, 0.3, 0.2, 0.1)


def bandit(*probabilities: float) -> TabularPolicy:
    return TabularPolicy(torch.tensor([probabilities], dtype=torch.float64).log())


def rows(gradient: list[list[float]]) -> Tensor:
    return torch.tensor(gradient, dtype=torch.float64)


def test_reverse_and_forward_kl_of_the_categorical_point_in_different_directions() -> None:
    """C13: the second component has the opposite sign, cosine 0.908."""
    policy, reference = bandit(*CATEGORICAL), bandit(*reversed(CATEGORICAL))
    nothing = torch.zeros(4)
    reverse = -exact_gradient(policy, reference, nothing, 1.0)[0]
    forward = -exact_gradient(policy, reference, nothing, 1.0, kl="forward")[0]
    assert reverse.tolist() == pytest.approx([0.3719, -0.0153, -0.1724, -0.1843], abs=5e-5)
    assert forward.tolist() == pytest.approx([0.3, 0.1, -0.1, -0.3], abs=1e-12)
    assert float(torch.cosine_similarity(reverse, forward, dim=0)) == pytest.approx(0.908, abs=5e-4)


def test_closed_form_of_the_bandit() -> None:
    policy, reference = bandit(0.5, 0.3, 0.2), bandit(0.2, 0.2, 0.6)
    reward = torch.tensor([1.0, -2.0, 0.5])
    p, q = [0.5, 0.3, 0.2], [0.2, 0.2, 0.6]
    kl = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    mean = sum(a * r for a, r in zip(p, reward.tolist(), strict=True))
    expected = [
        a * (r - mean) - 0.7 * a * (math.log(a / b) - kl) for a, b, r in zip(p, q, reward.tolist(), strict=True)
    ]
    assert exact_gradient(policy, reference, reward, 0.7)[0].tolist() == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("end", [None, 1])
@pytest.mark.parametrize("kl", ["reverse", "forward"])
@pytest.mark.parametrize("scale", ["sum", "mean"])
def test_gradient_of_the_regularised_reward_against_finite_differences(end: int | None, kl: str, scale: str) -> None:
    generator = torch.Generator().manual_seed(7)
    policy = TabularPolicy.random(2, 3, generator=generator, end=end)
    reference = TabularPolicy.random(2, 3, generator=generator, end=end)
    tree, anchor = policy_of(policy.logits.tolist()), policy_of(reference.logits.tolist())

    def task(sequence: tuple[int, ...]) -> float:
        return float(sum(sequence)) - 0.3 * len(sequence) + float(sequence[0])

    def value(moved: Policy, sequence: tuple[int, ...]) -> float:
        ratio = sum(log_probs(moved, sequence)) - sum(log_probs(anchor, sequence))
        share = probability(moved, sequence)
        penalty = -probability(anchor, sequence) * ratio if kl == "forward" else share * ratio
        return share * task(sequence) - 0.4 * penalty / (len(sequence) if scale == "mean" else 1)

    every = policy.trajectories
    reward = torch.tensor(
        [task(tuple(t[:n])) for t, n in zip(every.tokens.tolist(), every.lengths.tolist(), strict=True)]
    )
    exact = exact_gradient(policy, reference, reward, 0.4, kl=kl, scale=scale)  # type: ignore[arg-type]
    assert torch.allclose(exact, rows(true_gradient(tree, anchor, value, end=end)), atol=2e-9)


def test_entropy_and_its_gradient() -> None:
    policy = bandit(*CATEGORICAL)
    entropy = -sum(p * math.log(p) for p in CATEGORICAL)
    assert float(exact_entropy(policy)) == pytest.approx(entropy, abs=1e-15)
    expected = [-p * (math.log(p) + entropy) for p in CATEGORICAL]
    assert gradient_of(policy, exact_entropy)[0].tolist() == pytest.approx(expected, abs=1e-15)


def test_kl_values_are_directional_nonnegative_and_zero_at_the_reference() -> None:
    policy, reference = bandit(*CATEGORICAL), bandit(*reversed(CATEGORICAL))
    assert float(exact_kl(policy, reference)) == pytest.approx(0.4564, abs=5e-5)
    assert float(exact_kl(policy, policy)) == 0.0
    lopsided = bandit(0.7, 0.2, 0.05, 0.05)
    assert float(exact_kl(lopsided, reference)) != pytest.approx(float(exact_kl(lopsided, reference, "forward")))
    assert float(exact_kl(reference, lopsided)) == pytest.approx(float(exact_kl(lopsided, reference, "forward")))


def test_rows_that_no_trajectory_visits_have_gradient_zero() -> None:
    generator = torch.Generator().manual_seed(8)
    policy = TabularPolicy.random(2, 3, generator=generator, end=1)
    gradient = exact_gradient(policy, TabularPolicy.random(2, 3, generator=generator, end=1), torch.arange(4.0), 0.5)
    visited = policy.trajectories.contexts[policy.trajectories.mask].unique()
    unvisited = [row for row in range(7) if row not in visited]
    assert unvisited == [2, 4, 5, 6]
    assert (gradient[unvisited] == 0).all()
    assert (gradient[visited] != 0).all()


def test_policies_over_different_trajectories_are_refused() -> None:
    with pytest.raises(ValueError, match="different trajectories"):
        exact_kl(TabularPolicy(torch.zeros(1, 2)), TabularPolicy(torch.zeros(1, 3)))
    with pytest.raises(ValueError, match="different trajectories"):
        exact_kl(TabularPolicy(torch.zeros(3, 2)), TabularPolicy(torch.zeros(3, 2), end=0))
    with pytest.raises(ValueError, match="reverse or forward"):
        exact_kl(TabularPolicy(torch.zeros(1, 2)), TabularPolicy(torch.zeros(1, 2)), "sideways")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="sum or mean"):
        exact_entropy(TabularPolicy(torch.zeros(1, 2)), "total")  # type: ignore[arg-type]
