"""Critics' targets, losses and figures, by hand and by enumeration."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor

from klab.grid import Objective
from klab.harness.objective import TokenBatch, update_context, value_loss, value_metrics
from klab.harness.objective.aggregate import Totals
from klab.harness.objective.groups import Groups
from tests.harness.objective.enumeration import Enumeration
from tests.support.random_batches import gradient, random_batch, tokens, with_sampler

GAE = {"advantage": "gae", "placement": "none"}
SPACE = Enumeration(symbols=3, steps=3)


def row(*numbers: float) -> Tensor:
    return torch.tensor([numbers], dtype=torch.float64)


BATCH = tokens([[0.0] * 4], mask=[[True, False, True, True]], rewards=[2.0], values=row(0.5, 77.0, 1.0, -1.0))


def test_targets_are_advantages_and_values_over_own_tokens() -> None:
    targets = update_context(Objective(gamma=0.5, lam=0.5, **GAE), BATCH).value_targets
    d = [0.0, -1.5, 3.0]
    assert targets is not None
    assert targets[0].tolist() == pytest.approx([d[0] + d[1] / 4 + d[2] / 16 + 0.5, 0, d[1] + d[2] / 4 + 1, d[2] - 1])
    monte_carlo = update_context(Objective(gamma=0.5, **GAE), BATCH).value_targets
    assert monte_carlo is not None
    assert monte_carlo[0].tolist() == pytest.approx([0.5, 0.0, 1.0, 2.0])  # γ²R, γR, R
    assert update_context(Objective(**GAE), BATCH.replace(values=None)).value_targets is None


def test_a_kl_inside_the_returns_is_learned_and_one_after_them_is_not() -> None:
    batch = tokens([[-1.0] * 2], reference=[[-2.0, -5.0]], values=row(0.3, 0.1))
    inside = Objective(advantage="gae", placement="reward_to_go", estimator="k1", beta=0.1, kl_scale="sum")
    after = Objective(advantage="gae", placement="advantage_to_go", estimator="k1", beta=0.1)
    targets = [update_context(objective, batch).value_targets for objective in (inside, after)]
    assert targets[0] is not None
    assert targets[1] is not None
    assert targets[0][0].tolist() == pytest.approx([1 - 0.1 * 1 - 0.1 * 4, 1 - 0.1 * 4])
    assert targets[1][0].tolist() == pytest.approx([1.0, 1.0])


def test_whitening_moves_advantages_and_no_target() -> None:
    plain, whitened = (Objective(gamma=0.5, lam=0.5, whiten=name, **GAE) for name in ("none", "batch"))
    before, after = update_context(plain, BATCH), update_context(whitened, BATCH)
    a, b, c = (float(before.advantages[0, j]) for j in (0, 2, 3))
    mean = (a + b + c) / 3
    deviation = math.sqrt(((a - mean) ** 2 + (b - mean) ** 2 + (c - mean) ** 2) / 2 + 1e-8)
    expected = [(a - mean) / deviation, 0.0, (b - mean) / deviation, (c - mean) / deviation]
    assert after.advantages[0].tolist() == pytest.approx(expected, rel=1e-14)
    assert torch.equal(after.value_targets, before.value_targets)  # type: ignore[arg-type]


VALUES, OLD, TARGETS = row(0.5, 0.3, 0.9, -0.4), row(0.0, 0.25, 1.0, 0.0), row(1.0, 1.0, 0.0, 1.0)
OWN = torch.tensor([[True, True, True, True]])
TOTALS = Totals.of(OWN, Groups.from_labels(torch.tensor([0])), 4)


def test_the_clipped_value_loss_by_hand() -> None:
    values = VALUES.clone().requires_grad_()
    loss = value_loss(values, OLD, TARGETS, OWN, TOTALS, 0.2)
    # beyond the clip towards the target the error is that of V_old + 0.2; away from the target it is V's own
    errors = [0.8**2, 0.7**2, 0.9**2, 1.4**2]
    assert float(loss.detach()) == pytest.approx(0.5 * sum(errors) / 4, rel=1e-15)
    (slope,) = torch.autograd.grad(loss, values)
    assert slope[0].tolist() == pytest.approx([0.0, -0.7 / 4, 0.9 / 4, -1.4 / 4])
    assert value_metrics(VALUES, OLD, TARGETS, OWN, 0.2)["value_clip_fraction"] == 0.25
    free = value_loss(VALUES, OLD, TARGETS, OWN, TOTALS, None)
    assert float(free) == pytest.approx(0.5 * (0.5**2 + 0.7**2 + 0.9**2 + 1.4**2) / 4, rel=1e-15)
    assert value_metrics(VALUES, OLD, TARGETS, OWN, None)["value_clip_fraction"] == 0.0


def test_explained_variance_by_hand() -> None:
    own = torch.tensor([[True, True, False, True]])
    assert math.isnan(value_metrics(VALUES, OLD, TARGETS, own, None)["explained_variance"]), "all targets are 1"
    found = value_metrics(VALUES, OLD, TARGETS, OWN, None)["explained_variance"]
    errors = [0.5, 0.7, -0.9, 1.4]
    mean = sum(errors) / 4
    assert found == pytest.approx(1 - sum((e - mean) ** 2 for e in errors) / 4 / (3 / 16), rel=1e-14)
    assert value_metrics(TARGETS, OLD, TARGETS, OWN, None)["explained_variance"] == 1.0
    nothing = value_metrics(VALUES, OLD, TARGETS, torch.zeros_like(OWN), 0.2)
    assert nothing["value_clip_fraction"] == 0.0
    assert math.isnan(nothing["explained_variance"])


@pytest.mark.parametrize("seed", range(20))
def test_micro_batches_add_up_and_garbage_off_the_own_tokens_has_no_part(seed: int) -> None:
    source = random.Random(seed)
    batch = with_sampler(source, random_batch(source))
    n, t = batch.mask.shape
    noise = torch.Generator().manual_seed(seed)
    old, moved = (torch.randn(n, t, generator=noise, dtype=torch.float64) for _ in range(2))
    batch = batch.replace(values=torch.where(batch.mask, old, torch.nan))
    context = update_context(Objective(gamma=0.9, lam=0.8, whiten="batch", **GAE), batch)
    values = torch.where(batch.mask, old + 0.3 * moved, torch.nan).requires_grad_()

    def slope(rows: list[slice]) -> Tensor:
        losses = []
        for each in rows:
            part, within = batch.rows(each), context.rows(each)
            assert part.values is not None
            assert within.value_targets is not None
            losses.append(
                value_loss(values[each], part.values, within.value_targets, part.loss_mask, within.totals, 0.2)
            )
        return torch.autograd.grad(sum(losses), values)[0]  # type: ignore[arg-type]

    whole = slope([slice(0, n)])
    assert bool(whole.isfinite().all())
    assert not bool(whole[~batch.loss_mask].any())
    cut = source.randint(0, n)
    rows = [each for each in (slice(0, cut), slice(cut, n)) if each.start < each.stop]
    torch.testing.assert_close(slope(rows), whole, rtol=0, atol=1e-12)


def exact_values(policy: Tensor, rewards: Tensor) -> Tensor:
    """V of the prefix before each symbol of each sequence, `[S, steps]`: the mean reward of what may follow."""
    weight = SPACE.logp(policy).sum(1).exp()
    columns = []
    for j in range(SPACE.steps):
        prefix = SPACE.rows[:, j]
        total = torch.zeros(SPACE.prefixes, dtype=torch.float64).scatter_add(0, prefix, weight)
        worth = torch.zeros(SPACE.prefixes, dtype=torch.float64).scatter_add(0, prefix, weight * rewards)
        columns.append(worth[prefix] / total[prefix])
    return torch.stack(columns, 1)


def moments(policy: Tensor, rewards: Tensor, values: Tensor | None, lam: float) -> tuple[Tensor, float]:
    """Mean of the gradient of one trajectory's loss to the policy's logits, and the trace of its covariance."""
    logp, number = SPACE.logp(policy), len(SPACE.sequences)
    batch = TokenBatch(
        logp, logp, logp, torch.ones(number, SPACE.steps, dtype=torch.bool), rewards,
        torch.arange(number), SPACE.steps, values=values,
    )  # fmt: skip
    objective = Objective(ratio="none", weight="one", aggregation="sequence_sum", lam=lam, **GAE)
    coefficients = number * gradient(objective, batch)
    weight = logp.sum(1).exp()
    mean = SPACE.derivative(lambda z: (weight * (coefficients * SPACE.logp(z)).sum(1)).sum(), policy)
    # the symbols of a trajectory are drawn at different prefixes: their scores stand in different rows of the logits
    scores = torch.nn.functional.one_hot(SPACE.sequences, SPACE.symbols) - policy.softmax(-1)[SPACE.rows]
    square = (weight * (coefficients.square() * scores.square().sum(-1)).sum(1)).sum()
    return mean, float(square - mean.square().sum())


@pytest.mark.parametrize("lam", [0.0, 0.7, 1.0])
def test_with_exact_values_gae_is_unbiased_at_every_lambda_and_less_noisy_than_without(lam: float) -> None:
    policy, rewards = SPACE.policy(5), torch.arange(27).sin().double() + 1.0
    truth = -SPACE.derivative(lambda z: SPACE.expected_reward(z, rewards), policy)
    mean, noise = moments(policy, rewards, exact_values(policy, rewards), lam)
    plain, plain_noise = moments(policy, rewards, None, 1.0)
    torch.testing.assert_close(mean, truth, rtol=0, atol=1e-13)
    torch.testing.assert_close(plain, truth, rtol=0, atol=1e-13)
    assert noise < 0.5 * plain_noise


def test_wrong_values_leave_lambda_1_unbiased_and_bias_what_bootstraps() -> None:
    policy, rewards = SPACE.policy(5), torch.arange(27).sin().double() + 1.0
    truth = -SPACE.derivative(lambda z: SPACE.expected_reward(z, rewards), policy)
    wrong = exact_values(policy, rewards) + SPACE.rows.double().cos()
    torch.testing.assert_close(moments(policy, rewards, wrong, 1.0)[0], truth, rtol=0, atol=1e-13)
    assert float((moments(policy, rewards, wrong, 0.5)[0] - truth).abs().max()) > 0.01
