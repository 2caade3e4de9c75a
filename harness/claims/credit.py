"""Claims C40-C43, C3B: credit assignment of the KL to tokens, discounting, and the limits of on-policy tests."""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

from klab.grid import Objective
from klab.harness.claims.claim import Evidence, claim
from klab.harness.claims.harness_loss import batch_of, loss_gradient
from klab.harness.claims.instances import (
    Setting,
    binary_reward,
    cosine,
    generator,
    relative,
    to_go,
    trace_variance,
    variance,
)
from klab.harness.exact.gradients import exact_kl, gradient_of
from klab.harness.objective import update_context

EXACT = 1e-12


@claim(
    "C3B", "T", "this book; TRL's documentation of GSPO",
    "At theta = old every (ratio, weight) with w(1) = 1 has the same gradient: one update per rollout "
"cannot test these axes.",
)  # fmt: skip
def on_policy_degeneracy(evidence: Evidence) -> None:
    setting = Setting.random(3, 4, 0, end=2)
    reward = binary_reward(len(setting.mask), 1)
    rows = setting.behaviour.sample(32, generator(0))
    groups = torch.arange(32) // 8
    ratios = ("none", "token", "sequence_mean", "future_mean", "sequence_product", "future_product", "prefix_product")
    weights = (
        "one",
        "ratio",
        "ppo_clip",
        "dual_clip",
        "truncate",
        "clamp",
        "truncate_clip",
        "power",
        "mask",
        "sigmoid",
        "adaptive",
    )
    gradients = {
        (ratio, weight): loss_gradient(
            Objective(placement="none", ratio=ratio, weight=weight), setting, reward, rows, groups
        )[1]
        for ratio, weight in product(ratios, weights)
    }
    first = gradients["token", "ppo_clip"]
    equal = sum(torch.equal(first, other) for other in gradients.values())
    evidence.headline("(ratio, weight) pairs with bit-equal gradients, of 77", equal, "77")
    aggregations = [
        loss_gradient(Objective(placement="none", aggregation=name), setting, reward, rows, groups)[1]
        for name in ("sequence_mean", "token_mean", "constant", "sequence_sum")
    ]
    distance = evidence.number(
        "cosine of sequence_mean to token_mean on the same data", cosine(aggregations[0], aggregations[1])
    )
    evidence.stated("all 77 pairs are bit-equal", equal == 77)
    evidence.stated("the aggregation still matters", distance < 1 - 1e-6)


@claim(
    "C40",
    "T",
    "Bai & Zhang 2026, step 5",
    "Causality: E[K_i s_j] = 0 for i < j, fixed length, on-policy: dropping past KL keeps the gradient "
    "and saves variance.",
)
def causality(evidence: Evidence) -> None:
    gaps, before, after = [], 0.0, 0.0
    for seed in range(20):
        setting = Setting.random(3, 4, seed)
        total = setting.kappa.sum(1, keepdim=True).expand_as(setting.kappa)
        future = to_go(setting.kappa)
        gaps.append(relative(setting.mean(total), setting.mean(future)))
        before += setting.spread(total) / 20
        after += setting.spread(future) / 20
    evidence.headline("largest relative change of the expected gradient", max(gaps))
    evidence.number("trace variance with the past, mean of 20 random policies", before)
    evidence.number("trace variance without the past", after)
    ended = Setting.random(3, 4, 0, end=2)
    with_end = relative(
        ended.mean(ended.kappa.sum(1, keepdim=True).expand_as(ended.kappa)), ended.mean(to_go(ended.kappa))
    )
    evidence.number("end symbol, constant beta / H_max: relative change", with_end)
    evidence.stated("the expectation is unchanged", max(gaps) < EXACT)
    evidence.stated("also with an end symbol under a constant factor", with_end < EXACT)
    evidence.stated("the variance drops", after < before)


def end_symbol_failure(seed: int, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Gradient of E[(1/H(tau)) log pi/ref] with an end symbol: exact, and in Bai & Zhang's causal form with 1/H."""
    setting = Setting.random(3, 4, seed, scale=scale, end=2)
    exact = gradient_of(setting.policy, lambda moving: exact_kl(moving, setting.reference, scale="mean")).flatten()
    causal = setting.mean(to_go(setting.kappa) / setting.lengths[:, None])
    return exact, causal


@claim(
    "C40b",
    "F",
    "Bai & Zhang 2026 (beta/H with trajectories of different length)",
    "The causal form r_j = R - (beta/H) sum_{i>=j} K_i is the gradient of E[R - (beta/H) log pi/ref].",
)
def causality_with_variable_length(evidence: Evidence) -> None:
    cosines, missing = [], []
    for seed in range(20):
        exact, causal = end_symbol_failure(seed)
        cosines.append(cosine(causal, exact))
        missing.append(float((exact - causal).norm() / exact.norm()))
    evidence.number(
        "end symbol, V=3, H<=4, 20 policies: mean cosine of the causal form to the exact gradient", sum(cosines) / 20
    )
    evidence.number("smallest cosine", min(cosines))
    evidence.headline("mean norm of the missing term / norm of the gradient", sum(missing) / 20)
    evidence.number("largest", max(missing))
    fixed = Setting.random(3, 4, 0)
    exact = gradient_of(fixed.policy, lambda moving: exact_kl(moving, fixed.reference, scale="mean")).flatten()
    evidence.number("fixed length: relative error", relative(fixed.mean(to_go(fixed.kappa) / 4), exact))
    evidence.stated("equal for trajectories of variable length", max(missing) < EXACT)
    evidence.remark(
        "1/H(tau) is not known before the end: K_i/H is no constant given the past, and E[(1/H) s] = grad E[1/H] "
        "is not 0. The missing term is a hidden incentive on the length. The printed instance (.57, .995) is one "
        "draw; the spread over draws is wide."
    )


@claim(
    "C42",
    "T",
    "Bai & Zhang 2026 ('GAE implementation')",
    "GAE(1,1) with V = 0 on R at the end and -beta K/H at each step is r_j; gamma < 1 gives gamma^{H-j} "
    "R - (beta/H) sum gamma^{k-j} K_k.",
)
def gae_identity(evidence: Evidence) -> None:
    setting, beta = Setting.random(3, 4, 0, end=2), 0.3
    reward = binary_reward(len(setting.mask), 3)
    batch, _ = batch_of(setting, reward)

    def advantages(mode: str, **parameters: float) -> Tensor:
        objective = Objective(
            estimator="k1",
            placement={"name": "reward_to_go", "beta": beta, "kl_at": "current"},
            advantage={"name": mode, **parameters},
        )
        return update_context(objective, batch).advantages

    same = evidence.headline("GAE(1, 1) - r_j: largest difference", (advantages("gae") - advantages("raw")).abs().max())
    gamma, scaled = 0.9, beta / setting.lengths[:, None] * setting.kappa
    expected = torch.zeros_like(scaled)
    carried = torch.zeros(len(scaled), dtype=torch.float64)
    last = (setting.lengths - 1).long()
    for position in reversed(range(scaled.shape[1])):
        reward_here = torch.where(last == position, reward, 0.0) - scaled[:, position]
        carried = (reward_here + gamma * carried) * setting.mask[:, position]
        expected[:, position] = carried
    discounted = advantages("gae", gamma=gamma)
    gap = evidence.number(
        "gamma = .9: largest difference from gamma^{H-j} R - (beta/H) sum gamma^{k-j} K_k",
        (discounted - expected).abs().max(),
    )
    kept = evidence.number("gamma = .9: weight of R at the first token of the longest trajectories", gamma**3)
    evidence.stated("GAE(1,1) = r_j", same < 1e-14)
    evidence.stated("the discounted form", gap < 1e-14)
    evidence.stated("gamma = 1 is needed to give R the weight 1 everywhere", kept < 1)


@claim("C43", "O", "Bai & Zhang 2026", "Fusing the KL into the advantage gives a lower-variance advantage signal.")
def fused_advantage(evidence: Evidence) -> None:
    lower_advantage, lower_gradient = [], []
    for beta in (0.05, 0.3, 1.0):
        fused = plain = fused_gradient = separate_gradient = 0.0
        for seed in range(20):
            setting, reward = Setting.random(3, 4, seed), binary_reward(81, 1000 + seed)
            centred = (reward - setting.sampling @ reward)[:, None]
            returns = to_go(beta / 4 * setting.kappa)
            position_centred = centred - returns + setting.sampling @ returns
            plain += variance(setting.sampling, reward) / 20
            fused += float(setting.sampling @ position_centred.square().mean(1)) / 20
            fused_gradient += setting.spread(position_centred) / 20
            loss_term = beta / 4 * (1 - (-setting.kappa).exp())
            separate_gradient += trace_variance(setting.sampling, setting.samples(centred - loss_term)) / 20
        evidence.number(f"beta {beta:g}: variance of the advantage, reward only", plain)
        evidence.headline(f"beta {beta:g}: variance of the advantage, KL fused (mean over positions)", fused)
        evidence.number(f"beta {beta:g}: trace variance of the gradient, reward only and k3-loss", separate_gradient)
        evidence.number(f"beta {beta:g}: trace variance of the gradient, fused", fused_gradient)
        lower_advantage.append(fused < plain)
        lower_gradient.append(fused_gradient < separate_gradient)
    evidence.stated("the fused advantage has less variance than the reward-only advantage", all(lower_advantage))
    sequence = Setting.random(3, 4, 0)
    total = sequence.kappa.sum(1, keepdim=True).expand_as(sequence.kappa)
    evidence.restricted(
        "it has less variance than the same KL without position-dependent credit",
        sequence.spread(to_go(sequence.kappa)) < sequence.spread(total),
    )
    evidence.remark(
        f"The whole gradient is {'quieter' if all(lower_gradient) else 'not always quieter'} than with a separate "
        "k3-loss, whose coefficient 1 - delta is heavy-tailed (C15); but the advantage itself gains variance, "
        "since the KL is added to it."
    )
