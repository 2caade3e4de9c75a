"""Coefficients that move during training: a multiple of β, and that of the trust region."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from klab.grid import Objective
from klab.grid.catalogue import AXES
from klab.harness.objective import LossCoefficients, TokenBatch, objective_loss, update_context
from tests.harness.objective.enumeration import Enumeration
from tests.support.random_batches import random_batch, random_objective, tokens

WITH_BETA = [name for name, value in AXES["placement"].values.items() if "beta" in value.parameters]


def slopes(objective: Objective, batch: TokenBatch, coefficients: LossCoefficients) -> tuple[Tensor, Tensor]:
    """The loss, and its gradient to the log-probabilities and logits as one vector."""
    leaves = [batch.logp.detach().requires_grad_(), batch.logits.detach().requires_grad_()]  # type: ignore[union-attr]
    moved = batch.replace(logp=leaves[0], logits=leaves[1])
    loss = objective_loss(objective, moved, update_context(objective, moved, coefficients)).loss
    found = torch.autograd.grad(loss, leaves, materialize_grads=True)
    return loss.detach(), torch.cat([each.flatten() for each in found])


@pytest.mark.parametrize("placement", WITH_BETA)
def test_a_multiple_of_beta_is_another_beta(placement: str) -> None:
    for seed in range(5):
        source = random.Random(f"{placement} {seed}")
        objective, batch = random_objective(source, placement=placement), random_batch(source)
        once = objective_loss(objective, batch.replace(logp=batch.logp.detach()))
        plain = slopes(objective, batch, LossCoefficients())
        assert torch.equal(plain[0], once.loss)
        larger = Objective(**objective.settings() | {"beta": 2.5 * objective.beta})
        for found, wanted in zip(
            slopes(objective, batch, LossCoefficients(kl=2.5)), slopes(larger, batch, LossCoefficients()), strict=True
        ):
            torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_the_trust_region_by_hand() -> None:
    batch = tokens(
        [[-1.0, -1.5], [-0.5, 0.0]], behaviour=[[-1.2, -1.0], [-0.5, 0.0]], mask=[[True, True], [True, False]]
    )
    objective = Objective(placement="none", aggregation="sequence_mean")
    without, beside = (
        objective_loss(objective, batch, update_context(objective, batch, LossCoefficients(trust=trust)))
        for trust in (0.0, 3.0)
    )
    ratio = torch.tensor([0.2, -0.5], dtype=torch.float64).exp()
    penalty = 3.0 * (float(ratio.sum()) - 2 + 0.3) / 2 / 2
    assert float((beside.loss - without.loss).detach()) == pytest.approx(penalty, rel=1e-13)
    assert torch.equal(beside.policy_loss, without.policy_loss)
    found = [torch.autograd.grad(each.loss, batch.logp, retain_graph=True)[0] for each in (without, beside)]
    expected = [3.0 / 4 * (float(r) - 1) for r in ratio]
    assert (found[1] - found[0]).flatten().tolist() == pytest.approx([*expected, 0.0, 0.0])


@pytest.mark.parametrize("seed", range(5))
def test_the_penalty_has_the_value_and_the_gradient_of_the_kl_of_trajectories(seed: int) -> None:
    """E under π_old of Σ_j (e^λ − 1 − λ) = KL(π_old‖π), and of its gradient ∇KL(π_old‖π)."""
    space = Enumeration(symbols=3, steps=3)
    policy, old = space.policy(seed), space.policy(seed + 100)
    number, behaviour = len(space.sequences), space.logp(old)
    batch = TokenBatch(
        space.logp(policy).requires_grad_(), behaviour, behaviour,
        torch.ones(number, space.steps, dtype=torch.bool), torch.zeros(number, dtype=torch.float64),
        torch.arange(number), space.steps,
    )  # fmt: skip
    objective = Objective(placement="none", advantage="raw", aggregation="sequence_sum")
    weight = behaviour.sum(1).exp()
    penalties, coefficients = [], []
    for n in range(number):
        row = batch.rows(slice(n, n + 1))
        loss = objective_loss(objective, row, update_context(objective, row, LossCoefficients(trust=1.0))).loss
        penalties.append(loss.detach())
        coefficients.append(torch.autograd.grad(loss, batch.logp, retain_graph=True)[0][n])
    value = (weight * torch.stack(penalties)).sum()
    slope = torch.stack(coefficients)
    torch.testing.assert_close(value, space.divergence(old, policy), rtol=0, atol=1e-13)
    got = space.derivative(lambda z: (weight * (slope * space.logp(z)).sum(1)).sum(), policy)
    torch.testing.assert_close(got, space.derivative(lambda z: space.divergence(old, z), policy), rtol=0, atol=1e-13)


@pytest.mark.parametrize("aggregation", list(AXES["aggregation"].values))
def test_the_penalty_is_aggregated_like_the_objective_and_adds_up_over_micro_batches(aggregation: str) -> None:
    source = random.Random(aggregation)
    objective, drawn = random_objective(source, aggregation=aggregation), (random_batch(source, 0.5) for _ in range(50))
    batch = next(each for each in drawn if int(each.mask.sum()) > 3)
    context = update_context(objective, batch, LossCoefficients(kl=0.7, trust=1.3))
    whole = objective_loss(objective, batch, context).loss
    rows = [slice(n, n + 1) for n in range(len(batch.rewards))]
    parts = sum(objective_loss(objective, batch.rows(each), context.rows(each)).loss for each in rows)
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-12)
    without = objective_loss(objective, batch, update_context(objective, batch, LossCoefficients(kl=0.7))).loss
    assert float(whole.detach()) > float(without.detach())
