"""The losses of RPG (Zhang et al. 2025), copied from its released code, against klab's divergences.

From github.com/complex-reasoning/RPG (Apache-2.0), commit ec8e30b, verl/trainer/ppo/core_algos.py: `kl_penalty`,
`compute_policy_loss` and `compute_policy_loss_reinforce`. Its reference is the policy that drew the rollout.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from klab.grid import Objective
from klab.harness.objective import TokenBatch
from tests.support.random_batches import gradient

BETA, LOW, HIGH, C = 0.05, 0.2, 0.28, 10.0
FORMS: dict[str, dict[str, str]] = {
    "fkl": {"divergence": "forward", "estimator": "k1"},
    "rkl": {"divergence": "reverse", "estimator": "k1"},
    "ufkl": {"divergence": "forward", "estimator": "k3"},
    "urkl": {"divergence": "reverse", "estimator": "k3"},
    "js": {"divergence": "jeffreys", "estimator": "k1"},
    "ujs": {"divergence": "jeffreys", "estimator": "k3"},
}


def batch(drift: float, seed: int = 0) -> TokenBatch:
    """Two groups of four trajectories of six tokens; the reference is the behaviour policy."""
    noise = torch.Generator().manual_seed(seed)
    behaviour = -torch.rand(8, 6, generator=noise, dtype=torch.float64) - 3.0
    logp = behaviour + drift * torch.randn(8, 6, generator=noise, dtype=torch.float64)
    rewards = torch.tensor([1.0, 0, 0, 1, 0, 0, 0, 1], dtype=torch.float64)
    return TokenBatch(
        logp, behaviour, behaviour, torch.rand(8, 6, generator=noise) < 0.9, rewards, torch.arange(8) // 4, 6
    )


def advantages(data: TokenBatch) -> Tensor:
    """`compute_rpg_outcome_advantage`: the reward less the group's mean."""
    rewards = data.rewards.view(2, 4)
    return (rewards - rewards.mean(1, keepdim=True)).view(8, 1).expand(8, 6)


def kl_penalty(logprob: Tensor, ref_logprob: Tensor, kind: str) -> Tensor:
    log_ratio = logprob - ref_logprob
    w = torch.exp(log_ratio)
    if kind == "fkl":
        return -logprob + ref_logprob
    return torch.clamp(
        {
            "rkl": w * log_ratio,
            "js": 0.5 * ((w * log_ratio) - log_ratio),
            "ufkl": w - log_ratio - 1,
            "urkl": w * (log_ratio - 1) + 1,
            "ujs": 0.5 * (w * (log_ratio - 1) + 1 + (w - log_ratio - 1)),
        }[kind],
        min=-10,
        max=10,
    )


def token_mean(losses: Tensor, data: TokenBatch) -> Tensor:
    return losses[data.mask].sum() / data.mask.sum()


def differentiated(data: TokenBatch, kind: str) -> Tensor:
    """`compute_policy_loss` with the coefficient times `kl_penalty` added (`use_kl_loss`)."""
    logp, a = data.logp.detach().requires_grad_(), advantages(data)
    ratio = torch.exp(logp - data.logp_behaviour)
    clipped = torch.maximum(-a * ratio, -a * torch.clamp(ratio, 1 - LOW, 1 + HIGH))
    losses = torch.where(a < 0, torch.min(-a * C, clipped), clipped)
    total = token_mean(losses, data) + BETA * token_mean(kl_penalty(logp, data.logp_reference, kind), data)
    return torch.autograd.grad(total, logp)[0]


def reinforced(data: TokenBatch, kind: str, clip: bool, low: float, high: float) -> Tensor:
    """`compute_policy_loss_reinforce`, with `clip_ppo` or without."""
    log_prob, a = data.logp.detach().requires_grad_(), advantages(data)
    negative_approx_kl = log_prob - data.logp_behaviour
    w = torch.exp(negative_approx_kl)
    w_ = torch.clamp(w, 1 - low, 1 + high)
    kl_term = {
        "fkl": BETA * torch.ones_like(w_),
        "rkl": -BETA * w_ * (torch.log(w_) + 1),
        "ufkl": BETA * (1 - w_),
        "urkl": -BETA * w_ * torch.log(w_),
    }[kind]
    if not clip:
        return torch.autograd.grad(token_mean(-(a * w_ + kl_term).detach() * log_prob, data), log_prob)[0]
    branch = a * log_prob + kl_term.detach() * torch.exp(-negative_approx_kl).detach() * log_prob
    weighted = branch * w.detach()
    a_high = a * log_prob.detach() * (1 + high) - kl_term.detach() * log_prob.detach()
    a_low = a * log_prob.detach() * (1 - low) - kl_term.detach() * log_prob.detach()
    a_c = a * log_prob.detach() * C + kl_term.detach() * log_prob.detach()
    loss_1 = torch.where(w < 1 + high, weighted, a_high)
    loss_2 = torch.where(w < C, torch.where(w < 1 - low, a_low, weighted), a_c)
    losses = torch.where(a > 0, -loss_1, -loss_2)
    return torch.autograd.grad(token_mean(losses, data), log_prob)[0]


def objective(**settings: Any) -> Objective:
    return Objective(advantage="group_center", aggregation="token_mean", beta=BETA, **settings)


DUAL_CLIP = {"name": "dual_clip", "eps_low": LOW, "eps_high": HIGH, "c": C}


@pytest.mark.parametrize("drift", [0.05, 0.5])
@pytest.mark.parametrize("kind", FORMS)
def test_fully_differentiable_losses(kind: str, drift: float) -> None:
    data = batch(drift)
    ours = gradient(objective(placement="loss_corrected", weight=DUAL_CLIP, **FORMS[kind]), data)
    torch.testing.assert_close(ours, differentiated(data, kind), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("kind", ["fkl", "rkl", "ufkl", "urkl"])
def test_reinforce_style_losses_have_the_gradient_of_the_differentiable_ones(kind: str) -> None:
    """Without a clip, sample by sample; and the unnormalised ones are `reinforce` in the advantage."""
    data = batch(0.5)
    theirs = reinforced(data, kind, False, 1.0, 1e9)
    corrected = objective(placement="loss_corrected", weight="ratio", **FORMS[kind])
    torch.testing.assert_close(gradient(corrected, data), theirs, rtol=1e-8, atol=1e-12)
    if kind in ("ufkl", "urkl"):
        charged = objective(
            placement="advantage", kl_at="current", weight="ratio", estimator="reinforce",
            divergence=FORMS[kind]["divergence"],
        )  # fmt: skip
        torch.testing.assert_close(gradient(charged, data), theirs, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("kind", ["ufkl", "urkl"])
def test_reinforce_style_losses_with_the_clip(kind: str) -> None:
    """Equal but for the clamp: the code clamps w in the KL term also where the gradient of A remains."""
    data = batch(0.5, seed=1)
    charged = objective(
        placement="advantage", kl_at="current", weight=DUAL_CLIP, estimator="reinforce",
        divergence=FORMS[kind]["divergence"],
    )  # fmt: skip
    ours, theirs = gradient(charged, data), reinforced(data, kind, True, LOW, HIGH)
    w, a = (data.logp - data.logp_behaviour).exp(), advantages(data)
    inside = (w > 1 - LOW) & (w < 1 + HIGH)
    cut = torch.where(a > 0, w > 1 + HIGH, w < 1 - LOW)
    torch.testing.assert_close(ours[inside | cut], theirs[inside | cut], rtol=1e-8, atol=1e-12)
    assert bool((ours[cut] == 0).all())
    kept = data.mask & ~inside & ~cut
    assert int(kept.sum()) > 3
    term = {"ufkl": lambda x: x - 1, "urkl": lambda x: x * torch.log(x)}[kind]
    clamped = BETA * (term(w) - term(w.clamp(1 - LOW, 1 + HIGH))) / data.mask.sum()
    torch.testing.assert_close((ours - theirs)[kept], clamped[kept], rtol=1e-8, atol=1e-12)
