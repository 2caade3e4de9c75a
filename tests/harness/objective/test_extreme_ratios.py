"""Ratios that overflow or vanish: gradients are finite, or infinite where the weight has no bound; never NaN."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from klab.grid import Objective
from klab.harness.objective import TokenBatch, objective_loss
from klab.harness.objective.loss import UpdateContext, update_context
from klab.harness.objective.ratio import RATIOS as RATIO_FUNCTIONS
from klab.harness.objective.values import PENALTIES
from klab.harness.objective.weight import WEIGHTS as WEIGHT_FUNCTIONS

WEIGHTS = sorted(WEIGHT_FUNCTIONS)
RATIOS = sorted(name for name in RATIO_FUNCTIONS if name != "none")
UNBOUNDED = {
    "ratio", "power", "adaptive", "ppo_clip", "dual_clip", "sequence_kl_mask", "second_moment_mask", "future_kl",
    "clip_cov", "kl_cov", "cppo_tv", "drpo_tv", "tv_band",
}  # fmt: skip
"""Weights that grow with ρ without end, the clipped ones where A < 0 (`dual_clip` up to c)."""

log_ratios = st.sampled_from([-1e4, -750.0, -117.0, -1.0, 0.0, 1.0, 50.0, 88.8, 117.0, 750.0, 1e4]) | st.floats(
    -1e3, 1e3
)
advantages = st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-30]) | st.floats(-10, 10)


@pytest.mark.parametrize(("weight", "ratio"), list(itertools.product(WEIGHTS, RATIOS)))
@settings(max_examples=25)
@given(
    st.lists(log_ratios, min_size=6, max_size=6),
    st.lists(advantages, min_size=6, max_size=6),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_gradients_are_finite_or_the_weighted_advantage_is_infinite(
    weight: str, ratio: str, drift: list[float], given_advantages: list[float], dtype: torch.dtype
) -> None:
    logp = torch.full((2, 3), -2.0, dtype=dtype, requires_grad=True)
    batch = TokenBatch(
        logp,
        (logp - torch.tensor(drift, dtype=dtype).view(2, 3)).detach(),
        logp.detach(),
        mask=torch.ones(2, 3, dtype=torch.bool),
        rewards=torch.tensor([1.0, 0.0], dtype=dtype),
        groups=torch.tensor([0, 0]),
        max_new_tokens=3,
    )
    objective = Objective(weight=weight, ratio=ratio, path="score", placement="none")
    context = update_context(objective, batch)
    advantage = torch.tensor(given_advantages, dtype=dtype).view(2, 3)
    context = UpdateContext(advantage, context.totals, context.solved)
    out = objective_loss(objective, batch, context)
    (gradient,) = torch.autograd.grad(out.loss, logp)
    stats = out.token_stats
    assert not gradient.isnan().any()
    if weight not in PENALTIES:
        assert (gradient[(advantage == 0) | (stats.weight == 0)] == 0).all()
    overflowed = gradient.isinf()
    assert (stats.weight * advantage)[overflowed].isinf().all()
    assert (stats.ratio[overflowed] > 1e18).all()
    assert not overflowed.any() or weight in UNBOUNDED


@pytest.mark.parametrize("weight", ["ratio", "power", "sigmoid"])
def test_a_token_without_advantage_moves_nothing_however_far_the_policy_is(weight: str) -> None:
    """log ρ = 117 overflows float32."""
    logp = torch.tensor([[-1.0], [-1.0]], requires_grad=True)
    batch = TokenBatch(
        logp,
        logp.detach() - torch.tensor([[117.0], [0.0]]),
        logp.detach(),
        mask=torch.ones(2, 1, dtype=torch.bool),
        rewards=torch.tensor([1.0, 1.0]),
        groups=torch.tensor([0, 0]),
        max_new_tokens=1,
    )
    loss = objective_loss(Objective(weight=weight, ratio="token", advantage="group_center"), batch).loss
    assert math.isfinite(float(loss.detach()))
    assert torch.autograd.grad(loss, logp)[0].tolist() == [[0.0], [0.0]]


@pytest.mark.parametrize("weight", WEIGHTS)
def test_an_advantage_that_is_not_a_number_is_never_taken_for_zero(weight: str) -> None:
    logp = torch.full((2, 3), -2.0, requires_grad=True)
    batch = TokenBatch(
        logp,
        (logp + 0.1).detach(),
        logp.detach(),
        mask=torch.ones(2, 3, dtype=torch.bool),
        rewards=torch.tensor([math.nan, 0.0]),
        groups=torch.tensor([0, 0]),
        max_new_tokens=3,
    )
    loss = objective_loss(Objective(weight=weight, ratio="token", advantage="group_center"), batch).loss
    assert math.isnan(float(loss.detach()))
