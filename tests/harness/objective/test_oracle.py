"""Every combination of axis values has the gradient that plain loops give."""

from __future__ import annotations

import random

import pytest
import torch

from klab.grid.catalogue import AXES
from klab.harness.objective import objective_loss, update_context
from tests.harness.objective.oracle import solve
from tests.support.random_batches import random_batch, random_objective, trajectories, with_sampler

COMBINATIONS, PARTS = 1500, 6
TOLERANCE = 1e-9


def _differences(seed: int, **fixed: str) -> tuple[float, float, bool]:
    """Largest error against the loops, largest gap between whole and micro-batched, whether all is finite."""
    source = random.Random(seed)
    objective, batch = random_objective(source, **fixed), with_sampler(source, random_batch(source))
    leaves = [batch.logp, batch.logits]
    whole = objective_loss(objective, batch)
    gradients = torch.autograd.grad(whole.loss, leaves, materialize_grads=True)
    answer = solve(objective, trajectories(batch), batch.max_new_tokens)
    expected = [torch.zeros_like(batch.logp), torch.zeros_like(batch.logits)]
    for (n, j), value in answer.logp.items():
        expected[0][n, j] = value
    for (n, j, v), value in answer.logits.items():
        expected[1][n, j, v] = value
    finite = all(bool(g.isfinite().all()) for g in gradients) and bool(whole.loss.isfinite())
    error = abs(float(whole.loss.detach()) - answer.loss) / max(1.0, abs(answer.loss))
    for got, wanted in zip(gradients, expected, strict=True):
        error = max(error, float(((got - wanted).abs() / wanted.abs().clamp(min=1)).max()))

    context = update_context(objective, batch)
    order = list(range(len(batch.rewards)))
    source.shuffle(order)
    cut = source.randint(0, len(order))
    total = torch.zeros_like(whole.loss)
    for rows in (order[:cut], order[cut:]):
        if rows:
            index = torch.tensor(rows)
            total = total + objective_loss(objective, batch.rows(index), context.rows(index)).loss
    pieces = torch.autograd.grad(total, leaves, materialize_grads=True)
    apart = max(float((a - b).abs().max()) for a, b in zip(gradients, pieces, strict=True))
    return error, max(apart, float((total - whole.loss).abs().detach())), finite


@pytest.mark.parametrize("part", range(PARTS))
def test_random_combinations_agree_with_the_loops(part: int) -> None:
    for seed in range(part, COMBINATIONS, PARTS):
        error, apart, finite = _differences(seed)
        assert finite, seed
        assert error <= TOLERANCE, (seed, error)
        assert apart <= 1e-12, (seed, apart)


@pytest.mark.parametrize(("axis", "value"), [(axis, value) for axis in AXES for value in AXES[axis].values])
def test_every_value_agrees_with_the_loops(axis: str, value: str) -> None:
    for seed in range(3):
        error, apart, finite = _differences(10_000 + seed, **{axis: value})
        assert finite
        assert error <= TOLERANCE
        assert apart <= 1e-12
