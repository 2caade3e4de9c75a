"""Claims C3D-C3I: weights that are capped, clipped by sequence, or masked."""

from __future__ import annotations

import math

import torch

from klab.harness.claims.claim import Evidence, claim
from klab.harness.claims.drift import log_ratios, random_drift
from klab.harness.claims.instances import Setting, binary_reward, relative
from klab.harness.exact.gradients import exact_gradient


def truncation(size: float, cap: float, count: int = 20) -> tuple[float, float]:
    """Largest E_old[min(rho, C)] and largest gap of the bias from -E_old[(rho - C)_+ R s] over random instances."""
    mass, gap = 0.0, 0.0
    for seed in range(count):
        setting, reward = Setting.random(3, 4, seed, drift=size), binary_reward(81, 1000 + seed)
        rho = log_ratios(setting)["sequence_product"]
        mass = max(mass, float(setting.sampling @ rho[:, 0].exp().clamp(max=cap)))
        truth = exact_gradient(setting.policy, setting.policy, reward, 0.0).flatten()
        bias = setting.mean(rho.exp().clamp(max=cap) * reward[:, None]) - truth
        predicted = -setting.mean((rho.exp() - cap).clamp(min=0) * reward[:, None])
        gap = max(gap, float((bias - predicted).abs().max()))
    return mass, gap


@claim(
    "C3D",
    "T",
    "Ionides 2008; this book",
    "Truncation: E[min(rho,C)] <= 1, bias -E[(rho-C)_+ f]; cap 2 on the full product trades little bias for variance.",
)
def truncated_weights(evidence: Evidence) -> None:
    mass, gap = truncation(0.3, 2.0)
    evidence.number("drift .3: largest E_old[min(rho, 2)]", mass)
    evidence.number("drift .3: largest gap of the bias from its closed form", gap)
    found = random_drift(0.3, baseline=True).quality
    bias = evidence.headline(
        "drift .3: relative bias, full product capped at 2", found["full product, cap 2"].bias, ".049", 0.4
    )
    spread = evidence.number(
        "drift .3: trace variance, full product capped at 2", found["full product, cap 2"].variance, ".488", 0.4
    )
    full = evidence.number("drift .3: trace variance, full product", found["full product"].variance, ".529", 0.4)
    biased = [quality.bias for name, quality in found.items() if name not in ("full product", "full product, cap 2")]
    evidence.stated("E[min(rho, C)] <= 1 and the bias has its closed form", mass <= 1 + 1e-12 and gap < 1e-12)
    evidence.stated(
        "less variance than the full product, less bias than every other weight", spread < full and bias < min(biased)
    )


@claim(
    "C3Db", "O", "verl, rollout correction documentation", "Truncated sequence-level importance sampling is unbiased."
)
def truncation_is_unbiased(evidence: Evidence) -> None:
    setting, reward = Setting.random(3, 4, 0, drift=1.0), binary_reward(81, 1000)
    truth = exact_gradient(setting.policy, setting.policy, reward, 0.0).flatten()
    rho = log_ratios(setting)["sequence_product"].exp()
    largest = evidence.number("largest sequence ratio", rho.max())
    biases = {
        cap: relative(setting.mean(rho.clamp(max=cap) * reward[:, None]), truth)
        for cap in (2.0, 5.0, 10.0, 1.01 * largest)
    }
    for cap, bias in biases.items():
        evidence.headline(f"drift 1: relative bias, cap {cap:.3g}", bias)
    evidence.stated("unbiased at caps 2, 5 and 10", max(list(biases.values())[:3]) < 1e-12)
    evidence.restricted("unbiased when no ratio exceeds the cap", biases[1.01 * largest] < 1e-12)


@claim(
    "C3Dc",
    "O",
    "Bai & Zhang 2026 ('The variance problem with PPO clipping')",
    "Upper clipping min(rho, 1 + eps) is symmetric, where PPO's clipping is asymmetric.",
)
def upper_clipping_is_symmetric(evidence: Evidence) -> None:
    rho = torch.linspace(0.1, 2.0, 191, dtype=torch.float64)
    capped = rho.clamp(max=1.2)
    above = evidence.headline("largest change of a ratio above 1", (rho - capped)[rho > 1].max())
    below = evidence.number("largest change of a ratio below 1", (rho - capped)[rho < 1].max(), "0")
    signs = [rho * ((rho - rho.clamp(0.8, 1.2)) * sign <= 0) for sign in (torch.ones_like(rho), -torch.ones_like(rho))]
    evidence.number("PPO: largest difference of the weights for A > 0 and A < 0", (signs[0] - signs[1]).abs().max())
    evidence.stated("ratios above and below 1 are treated alike", above == below)
    evidence.restricted("the sign of the advantage makes no difference", not torch.equal(*signs) and below == 0)
    evidence.remark("It is one-sided in rho and symmetric in the sign of A only.")


@claim(
    "C3Eb",
    "T",
    "Zheng et al. 2025a (GSPO)",
    "GSPO's clip (3e-4, 4e-4) zeroes a far larger share of tokens than GRPO's (.2, .27).",
)
def gspo_clips_more(evidence: Evidence) -> None:
    shares: dict[str, list[float]] = {"GSPO": [], "GRPO": []}
    for size in (0.02, 0.1):
        totals = {"GSPO": 0.0, "GRPO": 0.0}
        for seed in range(20):
            setting, reward = Setting.random(3, 4, seed, drift=size), binary_reward(81, 1000 + seed)
            advantage = (reward - setting.sampling @ reward)[:, None]
            for name, ratio, low, high in (("GSPO", "sequence_mean", 3e-4, 4e-4), ("GRPO", "token", 0.2, 0.27)):
                rho = log_ratios(setting)[ratio].exp()
                zero = ((rho - rho.clamp(1 - low, 1 + high)) * advantage > 0).to(torch.float64)
                totals[name] += float(setting.sampling @ zero.mean(1)) / 20
        for name, share in totals.items():
            shares[name].append(evidence.headline(f"drift {size:g}: clipped share of tokens, {name}", share))
    evidence.stated(
        "GSPO clips at least ten times as much",
        all(g > 10 * t for g, t in zip(shares["GSPO"], shares["GRPO"], strict=True)),
    )


@claim(
    "C3I",
    "T",
    "DeepSeek-AI 2025b (DeepSeek-V3.2); TRL off_policy_mask_threshold",
    "OPSM is a one-sided mask on the geometric mean: mean log(old/pi) > d <=> geo < e^-d, only for A < 0.",
)
def opsm(evidence: Evidence) -> None:
    threshold, disagreements, masked = 0.1, 0, 0.0
    for seed in range(10):
        setting, reward = Setting.random(3, 4, seed, drift=0.6), binary_reward(81, 1000 + seed)
        advantage = reward - setting.sampling @ reward
        opsm_mask = ((-setting.log_ratio).mean(1) > threshold) & (advantage < 0)
        geometric = log_ratios(setting)["sequence_mean"][:, 0].exp()
        one_sided = (geometric < math.exp(-threshold)) & (advantage < 0)
        disagreements += int((opsm_mask != one_sided).sum())
        masked += float(setting.sampling @ opsm_mask.to(torch.float64)) / 10
    evidence.headline("trajectories on which the two masks differ, 10 x 81", disagreements, "0")
    evidence.number("masked share at d = .1, drift .6", masked)
    evidence.stated("the same mask", disagreements == 0 and 0 < masked < 1)
