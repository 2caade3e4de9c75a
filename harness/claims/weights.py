"""Claims C35-C3C: powers and clips of the ratio, and the family of objectives f(rho) A."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from klab.harness.claims.claim import Evidence, claim
from klab.harness.claims.drift import DRIFTS, WEIGHTS, random_drift
from klab.harness.claims.instances import Setting, variance

HALF = torch.tensor([0.5, 0.5], dtype=torch.float64)


@claim(
    "C35", "F", "Bai & Zhang 2026 ('The power family')",
    "Var(rho A) >= Var(A): multiplying by rho can only increase the variance; q = 0 has the lowest, q = "
"1 the highest variance.",
)  # fmt: skip
def ratio_only_adds_variance(evidence: Evidence) -> None:
    policy = torch.tensor([0.9, 0.1], dtype=torch.float64)
    rho = policy / HALF
    advantage = torch.tensor([0.0, -1.0], dtype=torch.float64)
    plain = evidence.number("old (.5,.5), pi (.9,.1), A (0,-1): Var A", variance(HALF, advantage), ".25")
    weighted = evidence.headline("the same: Var(rho A)", variance(HALF, rho * advantage), ".01")
    score = torch.stack([1 - policy[0], -policy[0]])
    advantage = torch.tensor([1.0, -1.0], dtype=torch.float64)
    truth = float(policy @ (advantage * score))
    noise = {}
    for power, (mean, spread) in {0.0: (".5", ".16"), 0.5: (".268", ".018"), 1.0: (".18", "0")}.items():
        gradient = rho**power * advantage * score
        evidence.number(f"A (1,-1), q = {power:g}: expected gradient", HALF @ gradient, mean)
        noise[power] = evidence.number(
            f"A (1,-1), q = {power:g}: variance of a sample's gradient",
            variance(HALF, gradient),
            spread if power else ".16",
        )
    evidence.number("A (1,-1): true gradient", truth, ".18")
    evidence.stated("Var(rho A) >= Var(A)", weighted >= plain)
    evidence.stated("q = 1 has more variance than q = 0", noise[1.0] >= noise[0.0])
    evidence.remark(
        "Training moves mass exactly so that bad actions have rho < 1 and good ones have a small score: the "
        "unbiased weight can be the one without variance. What does grow is E[rho^2] = 1 + chi^2(pi || old)."
    )


@claim("C36", "T*", "Bai & Zhang 2026", "Var_old(rho^q) <= Var_old(rho) for q in [0, 1], given E_old[rho] = 1.")
def powers_have_less_variance(evidence: Evidence) -> None:
    powers = torch.linspace(0, 1, 21, dtype=torch.float64)
    worst = -math.inf
    for seed in range(200):
        setting = Setting.random(6, 1, seed, drift=0.2 + 0.02 * seed)
        rho = setting.log_ratio[:, 0].exp()
        worst = max(worst, *(variance(setting.sampling, rho**q) - variance(setting.sampling, rho) for q in powers))
    evidence.headline("largest Var(rho^q) - Var(rho), 200 policies x 21 powers", worst)
    small = torch.tensor([0.05, 0.15], dtype=torch.float64)
    excess = evidence.number(
        "ratios (.05, .15), mean .1: Var(rho^.5) / Var(rho)", variance(HALF, small.sqrt()) / variance(HALF, small)
    )
    evidence.stated("for any positive weights", excess <= 1)
    evidence.restricted("for ratios with mean 1", worst <= 1e-14)
    evidence.remark("It says nothing about the variance of the estimator, which contains A and the score (C35).")


def _differentiated(surrogate: Callable[[Tensor], Tensor], rho: Tensor) -> Tensor:
    """d surrogate(rho) / d log pi, elementwise: the weight on the score."""
    logp = rho.log().requires_grad_()
    return torch.autograd.grad(surrogate(logp.exp()).sum(), logp)[0]


@claim(
    "C38",
    "T",
    "Bai & Zhang 2026 ('PPO-style clipping as a choice of w')",
    "PPO's gradient is the weight rho 1[(rho - clip rho) A <= 0] on A s.",
)
def ppo_is_an_indicator(evidence: Evidence) -> None:
    rho = torch.cat([torch.tensor([1.0, 1.5, 1.5, 0.5, 0.5]), torch.linspace(0.05, 4.0, 1000)]).to(torch.float64)
    advantage = torch.cat(
        [torch.tensor([1.0, 1.0, -1.0, 1.0, -1.0]), torch.randn(1000, generator=torch.Generator().manual_seed(0))]
    ).to(torch.float64)
    clipped = rho.clamp(0.8, 1.2)
    indicator = rho * ((rho - clipped) * advantage <= 0)
    autograd = _differentiated(lambda r: torch.minimum(r * advantage, r.clamp(0.8, 1.2) * advantage), rho)
    gap = evidence.headline(
        "largest difference of w A from autograd of min(rho A, clip(rho) A), 1005 points",
        (indicator * advantage - autograd).abs().max(),
    )
    for row, (name, weight) in enumerate(
        zip(
            ("inside", "above, A > 0", "above, A < 0", "below, A > 0", "below, A < 0"),
            ("1", "0", "1.5", ".5", "0"),
            strict=True,
        )
    ):
        evidence.number(f"the source's table: w {name}", indicator[row], weight)
    evidence.stated("equal everywhere off the tie", gap < 1e-14)


@claim(
    "C39",
    "T",
    "Bai & Zhang 2026; Ye et al. 2020",
    "PPO clipping is biased, and its weight is unbounded for A < 0, rho >> 1; dual clip or a cap bounds it.",
)
def clipping_is_a_filter(evidence: Evidence) -> None:
    rho = torch.logspace(-3, 3, 61, dtype=torch.float64)
    ppo = rho * ((rho - rho.clamp(0.8, 1.2)) * -1.0 <= 0)
    dual = ppo * (rho <= 3.0)
    evidence.number("A < 0, rho up to 1000: largest PPO weight", ppo.max(), "1000")
    evidence.number("A < 0, rho up to 1000: largest dual-clip weight (c = 3)", dual.max())
    biased, quiet = [], []
    for size in DRIFTS:
        found = random_drift(size, baseline=True).quality
        weights = list(WEIGHTS)[:9]
        biased.append(max(weights, key=lambda name: found[name].bias) == "PPO clip .2")
        quiet.append(min(weights, key=lambda name: found[name].variance) == "PPO clip .2")
        evidence.headline(f"drift {size:g}: relative bias, PPO clip .2", found["PPO clip .2"].bias)
        evidence.number(f"drift {size:g}: trace variance, PPO clip .2", found["PPO clip .2"].variance)
    evidence.stated("the PPO weight is unbounded, the dual-clip weight is not", ppo.max() > 999 and dual.max() <= 3)
    evidence.stated("largest bias of the nine weights at every drift", all(biased))
    evidence.stated("lowest variance of the nine weights at every drift", all(quiet))


@claim(
    "C3A", "F", "Bai & Zhang 2026 ('A general family of off-policy correction')",
    "Objectives f(rho) A with f between 1 and rho: f = 1 is policy improvement, f = 1 + log rho "
"belongs, f = rho^q has the weight rho^q.",
)  # fmt: skip
def family_of_objectives(evidence: Evidence) -> None:
    rho = torch.linspace(0.2, 3.0, 57, dtype=torch.float64)
    ones = torch.ones_like(rho)
    at_one = _differentiated(lambda r: 0 * r + 1, rho)
    evidence.headline("f = 1: largest weight", at_one.abs().max(), "0")
    identity = float((_differentiated(lambda r: r, rho) - rho).abs().max())
    power = _differentiated(lambda r: r**0.5, rho)
    evidence.number("f = rho^.5: weight / rho^.5", (power / rho**0.5).mean(), ".5")
    logarithm = 1 + rho.log()
    evidence.number("f = 1 + log rho: weight (constant)", _differentiated(lambda r: 1 + r.log(), rho).mean(), "1")
    shortfall = evidence.number(
        "f = 1 + log rho: largest shortfall below min(rho, 1)", (torch.minimum(rho, ones) - logarithm).max()
    )
    clip = _differentiated(lambda r: r.clamp(0.8, 1.2), rho)
    inside = (rho > 0.8) & (rho < 1.2)
    tau = 1.05
    sapo = 4 / tau * torch.sigmoid(tau * (ones[:1] - 1))
    evidence.number("SAPO: f(1), tau = 1.05", sapo[0])
    soft = _differentiated(lambda r: torch.sigmoid(tau * (r - 1)) * 4 / tau, rho)
    gate = torch.sigmoid(tau * (rho - 1))
    general = max(identity, float((clip - rho * inside)[(rho - 0.8).abs().minimum((rho - 1.2).abs()) >
    1e-9].abs().max()),
                  float((soft - 4 * rho * gate * (1 - gate)).abs().max()))  # fmt: skip
    evidence.number("rho f'(rho) against autograd (rho, clip, SAPO)", general)
    evidence.stated("f = 1 has a gradient", bool(at_one.abs().max() > 0))
    evidence.stated("f = rho^q has the weight rho^q", bool((power - rho**0.5).abs().max() < 1e-12))
    evidence.stated("f = 1 + log rho lies between min(rho, 1) and max(rho, 1)", shortfall <= 0)
    evidence.remark(
        "The weight on the score is w = rho f'(rho). The direction is kept by f' >= 0, not by the interval. "
        "klab's axis is w itself."
    )


@claim(
    "C3C",
    "T",
    "Kong 1992; Bai & Zhang 2026",
    "The effective sample size share of sequence weights is 1 / (1 + chi^2(pi || old)).",
)
def effective_sample_size(evidence: Evidence) -> None:
    gaps = []
    for seed in range(10):
        setting = Setting.random(3, 4, seed, drift=0.5)
        rho = setting.log_ratio.sum(1).exp()
        share = float(setting.sampling @ rho) ** 2 / float(setting.sampling @ rho**2)
        divergence = float((setting.probabilities**2 / setting.sampling).sum() - 1)
        gaps.append(abs(share - 1 / (1 + divergence)))
    setting = Setting.random(3, 4, 0, drift=0.5)
    drawn = setting.behaviour.sample(200_000, torch.Generator().manual_seed(0))
    weights = setting.log_ratio.sum(1).exp()[drawn]
    sampled = evidence.number(
        "(sum w)^2 / (n sum w^2), n = 200,000", weights.sum() ** 2 / (len(drawn) * (weights**2).sum())
    )
    exact = evidence.number("1 / (1 + chi^2)", 1 / (1 + float((setting.probabilities**2 / setting.sampling).sum() - 1)))
    evidence.headline("largest difference by enumeration, 10 instances", max(gaps))
    evidence.stated("equal by enumeration and in a sample", max(gaps) < 1e-12 and abs(sampled / exact - 1) < 0.05)
