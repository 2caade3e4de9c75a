"""Claims C44-C49: baselines, group statistics, positive-only data, and aggregation over lengths."""

from __future__ import annotations

import math
from itertools import product

import torch
from torch import Tensor

from klab.grid import Objective
from klab.harness.claims.claim import Evidence, claim
from klab.harness.claims.harness_loss import loss_gradient
from klab.harness.claims.instances import Setting, bandit, binary_reward, cosine, relative, trace_variance
from klab.harness.exact.gradients import exact_gradient

INFINITE = math.inf


def binomial(group: int, p: float) -> Tensor:
    """P(K = k) for k = 0..group successes, float64."""
    return torch.tensor(
        [math.comb(group, k) * p**k * (1 - p) ** (group - k) for k in range(group + 1)], dtype=torch.float64
    )


def group_factor(group: float, p: float) -> float:
    """c_G(p): E[GRPO gradient] = c_G(p) grad p, by the closed form E[sqrt(K(G-K))] / (G p(1-p)); group = inf is the
    limit."""
    if math.isinf(group):
        return 1 / math.sqrt(p * (1 - p))
    counts = torch.arange(int(group) + 1, dtype=torch.float64)
    return float(binomial(int(group), p) @ (counts * (group - counts)).sqrt()) / (group * p * (1 - p))


def enumerated_factor(group: int, p: float, mode: str) -> float:
    """The same by enumerating every group of a two-armed bandit through the harness's own loss."""
    setting = Setting.on_policy(bandit((p, 1 - p)), bandit((p, 1 - p)))
    reward = torch.tensor([1.0, 0.0], dtype=torch.float64)
    normalised = {"eps": 0.0} if mode == "group_norm" else {}
    objective = Objective(placement="none", advantage={"name": mode, **normalised})
    expected = torch.zeros(2, dtype=torch.float64)
    for successes, probability in enumerate(binomial(group, p)):
        rows = (torch.arange(group) >= successes).long()
        gradient = loss_gradient(objective, setting, reward, rows, torch.zeros(group, dtype=torch.long))[1]
        expected -= probability * gradient
    return float(expected[0]) / (p * (1 - p))


@claim(
    "C44", "T", "Liu et al. 2025b (Dr. GRPO); Ahmadian et al. 2024 (RLOO); this book",
    "RLOO is unbiased; the group-mean baseline shrinks by (G-1)/G; GRPO's std gives c_G(p) grad p, "
"c_G(p) = E[sqrt(K(G-K))]/(G p(1-p)).",
)  # fmt: skip
def group_baselines(evidence: Evidence) -> None:
    printed = {0.5: ("1.0", "1.616", "1.856", "1.934", "2"), 0.1: ("1.0", "1.690", "2.328", "2.848", "3.333"),
               0.01: ("1.0", "1.728", "2.609", "3.733", "10.05")}  # fmt: skip
    for p, row in printed.items():
        for group, value in zip((2, 4, 8, 16, INFINITE), row, strict=True):
            evidence.number(f"c_G(p), p = {p:g}, G = {group:g}", group_factor(group, p), value)
    gaps, shrink, unbiased = [], [], []
    for group, p in product((2, 4, 8), (0.5, 0.1)):
        gaps.append(abs(enumerated_factor(group, p, "group_norm") - group_factor(group, p)))
        shrink.append(abs(enumerated_factor(group, p, "group_center") - (group - 1) / group))
        unbiased.append(abs(enumerated_factor(group, p, "leave_one_out") - 1))
    evidence.headline("harness, every group enumerated: largest gap of group_norm from c_G(p)", max(gaps))
    evidence.number("the same, group_center from (G-1)/G", max(shrink))
    evidence.number("the same, leave_one_out from 1", max(unbiased))
    evidence.stated("GRPO's factor is c_G(p)", max(gaps) < 1e-10)
    evidence.stated("the group mean shrinks by (G-1)/G", max(shrink) < 1e-10)
    evidence.stated("leave-one-out is unbiased", max(unbiased) < 1e-10)
    evidence.remark(
        "With G = 2 GRPO has no difficulty bias; it grows with G. With the sample std multiply by sqrt((G-1)/G)."
    )


@claim(
    "C45",
    "T",
    "Yu et al. 2025 (DAPO); this book",
    "A group is uninformative (all rewards equal) with probability p^G + (1-p)^G.",
)
def informative_groups(evidence: Evidence) -> None:
    draws = torch.rand(200_000, 16, generator=torch.Generator().manual_seed(0)) < 0.18
    gaps = []
    for group, printed in {2: ".70", 4: ".45", 8: ".20", 16: ".04"}.items():
        share = evidence.headline(
            f"p = .18, G = {group}: share of zero-gradient groups", 0.18**group + 0.82**group, printed
        )
        successes = draws[:, :group].sum(1)
        sampled = float(((successes == 0) | (successes == group)).to(torch.float64).mean())
        gaps.append(abs(sampled - share) / math.sqrt(share * (1 - share) / 200_000))
    worst = evidence.number("largest deviation of 200,000 sampled groups, in standard errors", max(gaps))
    evidence.stated("the formula", worst < 4)


def positive_only_factors(p: float, samples: int) -> dict[str, float]:
    """Expected gradient / grad p on one prompt with success rate p, by enumeration of the n samples' success count."""
    factors = {
        "sum over accepted / n": 0.0,
        "mean over accepted": 0.0,
        "rewards +-1": 0.0,
        "+-1, all-wrong groups dropped": 0.0,
    }
    for successes, probability in enumerate(binomial(samples, p)):
        failures = samples - successes
        good, bad = successes * (1 - p), -failures * p  # sums of scores d log pi / d logit
        signed = (good - bad) / samples
        factors["sum over accepted / n"] += float(probability) * good / samples
        factors["mean over accepted"] += float(probability) * (good / successes if successes else 0.0)
        factors["rewards +-1"] += float(probability) * signed
        factors["+-1, all-wrong groups dropped"] += float(probability) * (signed if successes else 0.0)
    return {name: value / (p * (1 - p)) for name, value in factors.items()}


@claim(
    "C46", "T", "this book, on Xiong et al. 2025 (RAFT++)",
    "On one prompt positive-only data are not biased: accepted / n is grad p, accepted / |accepted| is "
"(1-(1-p)^n)/p grad p; "
    "dropping all-wrong groups changes scale and variance only.",
)  # fmt: skip
def positive_only(evidence: Evidence) -> None:
    gaps = []
    for p, n in ((0.1, 4), (0.5, 8), (0.02, 8)):
        found = positive_only_factors(p, n)
        closed = {
            "sum over accepted / n": 1.0,
            "mean over accepted": (1 - (1 - p) ** n) / p,
            "rewards +-1": 2.0,
            "+-1, all-wrong groups dropped": 2 - (1 - p) ** (n - 1),
        }
        for name, factor in found.items():
            evidence.number(f"p = {p:g}, n = {n}: {name}, multiple of grad p", factor)
            gaps.append(abs(factor - closed[name]))
    evidence.headline("largest gap from the closed forms", max(gaps))
    evidence.stated("every factor has its closed form", max(gaps) < 1e-10)
    evidence.remark(
        "All are positive multiples of grad p: RAFT++'s causal reading (negatives prevent the entropy collapse) "
        "must come from finite samples, inner steps or the coupling of prompts, not from the direction on one "
        "prompt."
    )


def length_normalised(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Exact gradient of E[R], and expected gradients with sequence means and sums, on an end-symbol policy."""
    setting = Setting.random(3, 4, seed, end=2)
    reward = binary_reward(len(setting.mask), 1000 + seed)
    truth = exact_gradient(setting.policy, setting.policy, reward, 0.0).flatten()
    plain = reward[:, None].expand_as(setting.mask)
    return truth, setting.mean(plain / setting.lengths[:, None]), setting.mean(plain)


@claim(
    "C48",
    "T",
    "Liu et al. 2025b (Dr. GRPO); Zheng et al. 2025b (MiniRL)",
    "Averaging over each sequence's tokens is not proportional to grad J when lengths vary; sums are.",
)
def sequence_mean_turns(evidence: Evidence) -> None:
    means, sums = [], []
    for seed in range(50):
        truth, mean, total = length_normalised(seed)
        means.append(cosine(mean, truth))
        sums.append(relative(total, truth))
    evidence.headline("50 end-symbol policies: mean cosine of sequence_mean to grad J", sum(means) / 50, ".943", 0.05)
    evidence.number("smallest cosine", min(means))
    evidence.number("largest relative error of sequence_sum", max(sums))
    evidence.stated("sequence_mean turns the gradient", min(means) < 0.99)
    evidence.stated("sequence_sum does not", max(sums) < 1e-12)


@claim(
    "C49", "O", "Hao et al. 2025 (OPO)",
    "The length-weighted baseline E[L r]/E[L] is the variance-optimal one (the optimum is E[|s|^2 r]/E[|s|^2]).",
)  # fmt: skip
def optimal_baseline(evidence: Evidence) -> None:
    ratios: dict[str, list[float]] = {"none": [], "mean": [], "OPO": [], "optimal": []}
    correlations, below = [], []
    for seed in range(50):
        setting = Setting.random(3, 4, seed, end=2)
        weights, reward = setting.sampling, binary_reward(len(setting.mask), 1000 + seed)
        score = setting.scores.sum(1)
        size, lengths = score.square().sum(1), setting.lengths
        baselines = {
            "none": 0.0,
            "mean": float(weights @ reward),
            "OPO": float((weights @ (lengths * reward)) / (weights @ lengths)),
            "optimal": float((weights @ (size * reward)) / (weights @ size)),
        }
        spread = {name: trace_variance(weights, (reward - value)[:, None] * score) for name, value in baselines.items()}
        for name in ratios:
            ratios[name].append(spread[name] / spread["optimal"])
        below.append(min(spread, key=lambda name: spread[name]) == "optimal")
        stacked = torch.stack([size, lengths])
        centred = stacked - (stacked @ weights)[:, None]
        moments = (centred * weights) @ centred.T
        correlations.append(float(moments[0, 1] / (moments[0, 0] * moments[1, 1]).sqrt()))
    mean = {name: sum(values) / 50 for name, values in ratios.items()}
    for name, printed in (("none", "2.03"), ("mean", "1.097"), ("OPO", "1.050")):
        evidence.headline(f"50 end-symbol policies: trace variance / optimal, {name}", mean[name], printed, 0.3)
    evidence.number("mean correlation of |s|^2 and length", sum(correlations) / 50, ".57", 0.3)
    evidence.stated("OPO's baseline has the least variance", mean["OPO"] < 1 + 1e-9)
    evidence.restricted("E[|s|^2 r]/E[|s|^2] has the least variance on every policy", all(below))
    evidence.restricted("OPO is better than the plain mean on average", mean["OPO"] < mean["mean"])
    evidence.remark("OPO's form is optimal where |s|^2 is proportional to the length.")
