"""Claims C75-C7D: methods of 2025 and 2026, decided by klab's own values of the axes."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from itertools import product

import torch
from torch import Tensor

from klab.grid import Objective
from klab.harness.claims.claim import Evidence, claim
from klab.harness.exact.instance import Instance
from klab.harness.exact.report import EstimatorReport, estimator_report, report
from klab.harness.exact.tabular import TabularPolicy
from klab.harness.exact.tabular_setting import Setting
from klab.harness.exact.updates import every_trajectory
from klab.harness.objective import TokenBatch, axis_functions, objective_loss, update_context

EXACT = 1e-12
SEEDS = range(8)
DRIFTS = (0.1, 0.3, 1.0)


def cell(**values: object) -> Objective:
    """A cell without a KL term and baseline, tokens summed."""
    chosen = {"placement": "none", "advantage": "raw", "aggregation": "sequence_sum", **values}
    return Objective(**chosen)  # type: ignore[arg-type]


@lru_cache(maxsize=64)
def signed(seed: int, drift: float, rewards: float | None = None) -> Setting:
    """The standard instance after random drift, with rewards of +1 and -1, or all the same."""
    setting = Instance(3, 3, seed).perturbed(drift)
    reward = 2 * setting.rewards - 1 if rewards is None else torch.full_like(setting.rewards, rewards)
    return Setting(setting.policy, setting.behaviour, setting.reference, reward)


def measured(objective: Objective, setting: Setting) -> EstimatorReport:
    return report(objective, setting, every_trajectory(setting.behaviour))


def weights_of(objective: Objective, setting: Setting) -> Tensor:
    """The weight of every token of every trajectory, `[M, H]`."""
    every = torch.arange(len(setting.trajectories))
    return objective_loss(objective, setting.batch(every, every, with_logits=False)).token_stats.weight


def mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


def masked_share(objective: Objective, setting: Setting) -> float:
    """Probability that a token drawn from the behaviour policy has weight 0."""
    own = setting.behaviour.probabilities().detach()[:, None] * setting.trajectories.mask
    return float((own * (weights_of(objective, setting) == 0)).sum() / own.sum())


def total_variation(width: float) -> Objective:
    return cell(weight={"name": "dppo_tv", "tv_low": width, "tv_high": width, "truncation": 1e6})


def matched(setting: Setting, share: float) -> Objective:
    """DPPO's mask with the smallest width that masks no more than a share of the tokens."""
    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if masked_share(total_variation(middle), setting) > share else (low, middle)
    return total_variation(high)


def unequal(seed: int, drift: float) -> Setting:
    """A policy with likely and unlikely symbols, drifted, with random rewards of +1 and -1."""
    source = torch.Generator().manual_seed(seed)
    behaviour = TabularPolicy.random(8, 2, scale=1.5, generator=source)
    policy = behaviour.perturbed(drift, source)
    accepted = torch.rand(len(behaviour.trajectories), generator=source, dtype=torch.float64) < 0.5
    return Setting(policy, behaviour, behaviour, 2 * accepted.to(torch.float64) - 1)


@claim(
    "C75", "O", "Qi et al. 2026 (DPPO)", "A mask on probabilities biases the gradient less than PPO's clip of ratios."
)
def probability_mask(evidence: Evidence) -> None:
    less_by_default, less_at_equal_share = [], []
    for drift in DRIFTS:
        rows = []
        for seed in SEEDS:
            setting = unequal(seed, drift)
            clip = cell(weight="ppo_clip")
            same = matched(setting, masked_share(clip, setting))
            found = [
                measured(each, setting).bias for each in (clip, cell(weight="dppo_tv"), same, cell(weight="ratio"))
            ]
            rows.append(found)
            less_at_equal_share.append(found[2] < found[0])
        names = ("PPO's clip, 0.2", "DPPO-TV, 0.15", "DPPO-TV, masking as many tokens", "no mask")
        biases = {name: mean(row[index] for row in rows) for index, name in enumerate(names)}
        for name, bias in biases.items():
            evidence.number(f"drift {drift:g}: bias of {name}", bias)
        less_by_default.append(biases["DPPO-TV, 0.15"] < biases["PPO's clip, 0.2"])
    share = evidence.headline(
        "share of 24 policies on which it is less at no more masked tokens", mean(less_at_equal_share)
    )
    evidence.stated("so wherever both mask as many tokens", share == 1.0)
    evidence.restricted("so on average at the published widths", all(less_by_default))
    evidence.remark(
        "At the published widths DPPO masks fewer tokens, and no mask is less biased than either: what a mask buys is "
        "not a smaller bias. The ratio itself leaves the bias of the states (C30)."
    )


@claim("C76", "F", "Shen et al. 2026 (VESPO)", "The weight of the soft kernel is non-decreasing in the ratio.")
def soft_kernel(evidence: Evidence) -> None:
    weight = axis_functions(cell(ratio="sequence_product", weight="gamma_kernel")).weight
    rho = torch.linspace(1e-3, 6.0, 6000, dtype=torch.float64)
    rising = []
    for sign, peak in ((1.0, "0.667"), (-1.0, "1.5")):
        values = weight(rho, torch.full_like(rho, sign))
        best = int(values.argmax())
        evidence.headline(f"A {'>' if sign > 0 else '<'} 0: ratio of the largest weight", rho[best], peak)
        evidence.number(f"A {'>' if sign > 0 else '<'} 0: the largest weight", values[best])
        rising.append(bool((values.diff() >= 0).all()))
    at_one = [
        float(weight(torch.ones(1, dtype=torch.float64), torch.full((1,), s, dtype=torch.float64))) for s in (1, -1)
    ]
    evidence.number("weight at the ratio 1", at_one[0])
    evidence.stated("non-decreasing for both signs", all(rising))
    evidence.remark(
        "It rises to k/rate and falls to 0: 2/3 for good samples, 3/2 for bad ones. A good sample that became likelier "
        "already weighs less than one that has not moved, and at the ratio 1 the kernel of good samples is falling."
    )


@claim(
    "C77",
    "T",
    "Liu et al. 2026b (GDPO)",
    "Normalising each reward in its group keeps apart combinations that normalising their sum makes equal.",
)
def separate_rewards(evidence: Evidence) -> None:
    pairs = list(product((0.0, 1.0), repeat=2))  # two binary rewards of one rollout
    for size in (2, 4):
        groups = [list(group) for group in product(pairs, repeat=size)]
        terms = torch.tensor(groups, dtype=torch.float64).reshape(-1, 2)
        batch = _bare_batch(terms.sum(1), torch.arange(len(groups)).repeat_interleave(size), terms)
        counts = {}
        for name in ("group_norm", "term_norm"):
            found = update_context(cell(advantage={"name": name, "eps": 0.0}), batch).advantages.view(len(groups), size)
            counts[name] = len({tuple(round(value, 9) + 0.0 for value in row) for row in found.tolist()})
        evidence.number(f"groups of {size}, two binary rewards: different combinations", len(groups))
        summed = evidence.number(f"groups of {size}: different advantages of the sum", counts["group_norm"])
        apart = evidence.headline(f"groups of {size}: different advantages, each reward apart", counts["term_norm"])
        evidence.stated(f"more are kept apart in groups of {size}", apart > summed)
    evidence.remark(
        "In a group of two, being better in one reward and being better in both are the same advantage after the "
        "normalisation of the sum. Not every combination is kept apart: adding a constant to a reward of a whole group "
        "changes nothing."
    )


def _bare_batch(rewards: Tensor, groups: Tensor, terms: Tensor) -> TokenBatch:
    """Trajectories of one token each."""
    zeros = torch.zeros(len(rewards), 1, dtype=torch.float64)
    return TokenBatch(
        zeros, zeros, zeros, torch.ones_like(zeros, dtype=torch.bool), rewards, groups, 1,
        reward_terms=terms, term_weights=(1.0,) * terms.shape[1],
    )  # fmt: skip


@claim(
    "C78",
    "T",
    "Tajwar et al. 2026 (MaxRL)",
    "Dividing centred rewards by the group's mean has the gradient of log p in the limit of large groups.",
)
def success_weighted(evidence: Evidence) -> None:
    errors, last = [], []
    for p in (0.5, 0.1):
        policy = TabularPolicy(torch.tensor([[p, 1 - p]], dtype=torch.float64).log())
        reward = torch.tensor([1.0, 0.0], dtype=torch.float64)
        objective = cell(advantage="group_success", weight="one")
        for size in (2, 4, 16, 64):
            found = estimator_report(objective, policy, policy, policy, reward, size)
            factor = float(found.expectation.flatten() @ found.truth.flatten()) / float(found.truth.square().sum())
            evidence.headline(f"p = {p:g}, groups of {size}: factor on the gradient of p, times p", factor * p)
            errors.append(abs(factor * p - (1 - (1 - p) ** (size - 1))))
        last.append(1 - factor * p)
    evidence.number("largest difference from 1 - (1 - p)^(G - 1)", max(errors))
    evidence.stated("the factor is (1 - (1 - p)^(G - 1)) / p", max(errors) < 1e-10)
    evidence.stated("which goes to 1/p, that of log p", max(last) < 2e-3)
    evidence.remark(
        "A group of G follows the first G - 1 terms of log p = -sum (1 - p)^k / k, one fewer than without centring; "
        "with groups of 2 it is the gradient of p itself, whatever p."
    )


@claim(
    "C79", "T", "Le Roux et al. 2025 (TOPR)",
    "For negative rewards TOPR is biased by exactly the trajectories whose ratio is above 1; for positive ones by all "
    "whose ratio is not 1.",
)  # fmt: skip
def tapered(evidence: Evidence) -> None:
    objective = cell(ratio="sequence_product", weight="tapered")
    gaps = []
    for drift in DRIFTS:
        biases: dict[float, list[float]] = {1.0: [], -1.0: []}
        for seed, sign in product(SEEDS, (1.0, -1.0)):
            setting = signed(seed, drift, sign)
            found = measured(objective, setting)
            biases[sign].append(float((found.expectation - found.truth).norm()))
            rho = (setting.policy.logp() - setting.behaviour.logp()).detach().exp()
            missing = 1 - rho if sign > 0 else (1 - rho).clamp(max=0.0)
            scores = setting.policy.token_scores().sum(1)
            expected = (setting.behaviour.probabilities().detach() * missing * sign) @ scores
            gaps.append(float(((found.expectation - found.truth).flatten() - expected).norm()))
        for sign, norms in biases.items():
            evidence.headline(f"drift {drift:g}, rewards {sign:+g}: norm of the bias", mean(norms))
    gap = evidence.number("largest difference from the sum over those trajectories", max(gaps))
    evidence.stated("the bias is that sum", gap < EXACT)
    evidence.remark(
        "The true gradient of a constant reward is 0: the bias is all there is. Capping the ratio of failures at 1 "
        "keeps about half of the bias of leaving the ratio out, and bounds the weight."
    )


@claim(
    "C7A",
    "O",
    "Zhao et al. 2025 (GMPO)",
    "The geometric mean of clipped token ratios varies less than token ratios, and so does the gradient.",
)
def geometric_mean(evidence: Evidence) -> None:
    clipped = cell(ratio={"name": "clipped_mean", "clip_low": 0.4, "clip_high": 0.4}, weight="ratio", path="ratio")
    calmer, quieter = [], []
    for drift in DRIFTS:
        spread: dict[str, list[float]] = {"geometric": [], "token": []}
        noise: dict[str, list[float]] = {"geometric": [], "token": []}
        bias: dict[str, list[float]] = {"geometric": [], "token": []}
        for seed, (name, objective) in product(SEEDS, (("geometric", clipped), ("token", cell(weight="ratio")))):
            setting = signed(seed, drift)
            found = measured(objective, setting)
            spread[name].append(_spread(weights_of(objective, setting), setting))
            noise[name].append(found.variance_relative)
            bias[name].append(found.bias)
        for name in spread:
            evidence.number(f"drift {drift:g}: variance of the {name} weight", mean(spread[name]))
            evidence.headline(f"drift {drift:g}: relative variance of the {name} gradient", mean(noise[name]))
            evidence.number(f"drift {drift:g}: bias of the {name} gradient", mean(bias[name]))
        calmer.append(all(a < b for a, b in zip(spread["geometric"], spread["token"], strict=True)))
        quieter.append(mean(noise["geometric"]) < mean(noise["token"]))
    evidence.stated("the gradient varies less at every drift", all(quieter))
    evidence.restricted("the weight varies less, on every policy", all(calmer))
    evidence.restricted("the gradient varies less at drifts of 0.3 and 1", all(quieter[1:]))
    evidence.remark("Near the behaviour policy no ratio is clipped and the weights are all about 1: nothing is gained.")


def _spread(weight: Tensor, setting: Setting) -> float:
    """Variance of the weight over the behaviour policy's tokens."""
    own = setting.behaviour.probabilities().detach()[:, None] * setting.trajectories.mask
    own = own / own.sum()
    centre = (own * weight).sum()
    return float((own * (weight - centre).square()).sum())


@claim(
    "C7B",
    "O",
    "Zheng et al. 2025c (M2PO)",
    "Masking by the second moment bounds the mean of (log rho)^2 over the tokens that keep a gradient.",
)
def second_moment(evidence: Evidence) -> None:
    objective = cell(advantage="leave_one_out", weight={"name": "second_moment_mask", "moment": 0.04})
    outward, every, before = [], [], []
    for seed, drift in product(SEEDS, DRIFTS):
        setting = signed(seed, drift)
        count = len(setting.trajectories)
        batch = setting.batch(torch.arange(count), torch.zeros(count, dtype=torch.long), with_logits=False)
        stats = objective_loss(objective, batch).token_stats
        square, away = stats.log_ratio.square(), stats.log_ratio * stats.advantage > 0
        kept = (stats.weight > 0) & batch.mask & (stats.advantage != 0)
        outward.append(float(square[kept & away].mean()) if bool((kept & away).any()) else 0.0)
        every.append(float(square[kept].mean()))
        before.append(float(square[away & batch.mask].mean()))
    evidence.number("largest mean square before the mask, tokens moved the way of their advantage", max(before))
    bounded = evidence.number("largest after it, those tokens; the bound is 0.04", max(outward))
    evidence.headline("largest after it, all tokens that keep a gradient", max(every))
    evidence.stated("over all of them", max(every) <= 0.04 + EXACT)
    evidence.restricted("over those that moved the way of their advantage", bounded <= 0.04 + EXACT)
    evidence.remark(
        "Like PPO's clip the mask leaves alone what moved against its advantage, whose ratios have no bound. Measured "
        "on 24 updates of all 27 trajectories of a policy."
    )


@claim(
    "C7C",
    "O",
    "Lei et al. 2026 (MinPRO)",
    "The least earlier ratio corrects for off-policy data as the product of all earlier ones does, at less variance.",
)
def least_prefix(evidence: Evidence) -> None:
    least, whole, neither = (cell(ratio=name, weight="ratio") for name in ("prefix_minimum", "prefix_product", "token"))
    exact = cell(ratio="sequence_product", weight="ratio")
    on_policy = measured(least, signed(0, 0.0)).bias
    evidence.number("on-policy: bias", on_policy)
    more_bias, less_noise, better = [], [], []
    for drift in DRIFTS:
        found = {
            name: [measured(each, signed(seed, drift)) for seed in SEEDS]
            for name, each in (("least", least), ("product", whole), ("token", neither), ("sequence", exact))
        }
        bias = {name: mean(each.bias for each in reports) for name, reports in found.items()}
        noise = {name: mean(each.variance_relative for each in reports) for name, reports in found.items()}
        for name in ("least", "product", "token"):
            evidence.headline(f"drift {drift:g}: bias of the {name} ratio", bias[name])
            evidence.number(f"drift {drift:g}: relative variance of the {name} ratio", noise[name])
        more_bias.append(bias["least"] > bias["product"])
        less_noise.append(noise["least"] < noise["product"])
        better.append(bias["least"] < bias["token"])
        evidence.number(f"drift {drift:g}: bias of the ratio of whole trajectories", bias["sequence"])
    evidence.stated("no more bias than the product's", not any(more_bias))
    evidence.restricted("less variance than the product", all(less_noise))
    evidence.restricted("less bias than the token's ratio alone", all(better))
    evidence.restricted("no bias on-policy", on_policy < EXACT)
    evidence.remark(
        "Its weights are too small on average: a product of ratios has the mean 1, the least of several has less."
    )


@claim(
    "C7D",
    "T",
    "Yao et al. 2026a (FRPO)",
    "A reverse KL charged to-go after group normalisation leaves the reward's part of the gradient as it is and adds "
    "exactly the gradient of the KL, on-policy.",
)
def after_normalisation(evidence: Evidence) -> None:
    lab, size, beta = Instance(2, 2, 1), 3, 0.5
    settings = {"estimator": "k1", "beta": beta, "weight": "one", "advantage": "group_norm"}
    plain = cell(weight="one", advantage="group_norm")
    errors = {}
    for placement, more in (("advantage_to_go", {}), ("reward_to_go", {"kl_scale": "sum"})):
        objective = cell(placement=placement, **settings, **more)
        arguments = (lab.behaviour, lab.behaviour, lab.reference, lab.reward, size)
        charged = estimator_report(objective, *arguments).expectation
        alone = estimator_report(plain, *arguments).expectation
        kl = lab.at(lab.behaviour).truth(cell(placement="reward_to_go", estimator="k1", beta=1.0, kl_scale="sum"))
        kl = kl - lab.at(lab.behaviour).truth(plain)
        errors[placement] = float((charged - alone - beta * kl).norm() / (beta * kl).norm())
    evidence.headline("after the normalisation: relative error of the KL's part", errors["advantage_to_go"])
    evidence.number("inside the normalised rewards: the same", errors["reward_to_go"])
    evidence.stated("exact after the normalisation", errors["advantage_to_go"] < 1e-10)
    evidence.stated("not inside it", errors["reward_to_go"] > 0.1)
    evidence.remark(
        f"Groups of {size} of a policy with V = H = 2, enumerated. Off-policy it needs a product of ratios."
    )
