"""Claims C30-C34: which importance ratio is exact, and what the others cost."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from klab.harness.claims.claim import Evidence, claim
from klab.harness.claims.drift import DRIFTS, WEIGHTS, Drift, log_ratios, quality, random_drift, update_drift
from klab.harness.claims.instances import Setting, generator, normal_expectation, normal_grid, relative
from klab.harness.exact.gradients import exact_gradient, exact_kl
from klab.harness.exact.tabular import TabularPolicy

EXACT = 1e-12

PRINTED_BIAS = {
    0.1: (".122", ".102", ".068", ".073", "0", ".091", ".095", ".206", ".061"),
    0.3: (".357", ".307", ".206", ".219", "0", ".267", ".281", ".787", ".181"),
    1.0: (".981", ".832", ".587", ".596", "0", ".676", ".733", "1.124", ".487"),
}
PRINTED_VARIANCE = {
    0.3: (".452", ".453", ".502", ".482", ".529", ".432", ".438", ".324", ".436"),
    1.0: (".557", ".447", ".973", ".813", "1.406", ".344", ".383", ".207", ".368"),
}
OTHER_DRAWS = 0.4
"""Relative tolerance against numbers printed for other random instances."""


def order(drift: Drift) -> str:
    """The weights from least to most bias."""
    return " < ".join(sorted(drift.quality, key=lambda name: drift.quality[name].bias))


def factored(seed: int, size: float) -> tuple[Setting, Tensor]:
    """A setting whose policies ignore the prefix, and the context-to-position map `[4, 40]` that sums its shared
    parameters."""
    lengths = torch.repeat_interleave(torch.arange(4), torch.tensor([1, 3, 9, 27]))
    rows = torch.randn(4, 3, generator=generator(seed), dtype=torch.float64)
    moved = rows + size * torch.randn(4, 3, generator=generator(seed + 500), dtype=torch.float64)
    behaviour, policy = TabularPolicy(rows[lengths]), TabularPolicy(moved[lengths])
    return Setting(policy, behaviour, behaviour), torch.nn.functional.one_hot(lengths).to(torch.float64).T


def shared_bias(setting: Setting, shared: Tensor, reward: Tensor) -> float:
    """Relative bias of token importance sampling with respect to position-shared logits."""
    truth = exact_gradient(setting.policy, setting.policy, reward, 0.0)
    estimate = setting.mean(setting.log_ratio.exp() * reward[:, None]).reshape(truth.shape)
    return relative(shared @ estimate, shared @ truth)


@claim(
    "C30", "F", "Bai & Zhang 2026 ('When is the token-level rho exact?')",
    "For standard GRPO the token-level ratio is exact, because the advantage depends only on the trajectory's reward.",
)  # fmt: skip
def token_ratio_is_exact(evidence: Evidence) -> None:
    biases = []
    for size in DRIFTS:
        drift = random_drift(size, baseline=True)
        evidence.number(
            f"drift {size:g}: KL(old || pi)", drift.divergence, {0.1: ".011", 0.3: ".103", 1.0: "1.08"}[size], 0.2
        )
        evidence.number(
            f"drift {size:g}: effective sample size",
            drift.sample_size,
            {0.1: ".977", 0.3: ".814", 1.0: ".246"}[size],
            0.2,
        )
        variances = PRINTED_VARIANCE.get(size, (None,) * 9)
        for name, bias, spread in zip(list(WEIGHTS)[:9], PRINTED_BIAS[size], variances, strict=True):
            within = None if bias == "0" else OTHER_DRAWS
            evidence.number(f"drift {size:g}: relative bias, {name}", drift.quality[name].bias, bias, within)
            evidence.number(
                f"drift {size:g}: trace variance, {name}", drift.quality[name].variance, spread, OTHER_DRAWS
            )
        biases.append(drift.quality["token"].bias)
        raw = random_drift(size)
        evidence.number(f"drift {size:g}, reward without baseline: relative bias, token", raw.quality["token"].bias)
        evidence.number(f"drift {size:g}, reward without baseline: relative bias, none", raw.quality["none"].bias)
    moved = update_drift(baseline=True)
    evidence.number("drift by 4 inner updates (KL .1): relative bias, token", moved.quality["token"].bias)
    evidence.number("drift by 4 inner updates (KL .1): relative bias, full product", moved.quality["full product"].bias)
    setting, shared = factored(0, 0.3)
    tokens = setting.policy.trajectories.tokens
    additive = (tokens.to(torch.float64) * torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)).sum(1)
    evidence.number("prefix-free policy, additive reward: relative bias, token", shared_bias(setting, shared, additive))
    evidence.number(
        "prefix-free policy, parity reward: relative bias, token",
        shared_bias(setting, shared, (tokens.sum(1) % 2).to(torch.float64)),
    )
    bandit = Setting.random(3, 1, 0, drift=0.3)
    one_step = quality(bandit, torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64), WEIGHTS["token"]).bias
    evidence.number("one step: relative bias, token", one_step)
    evidence.stated("token importance sampling is unbiased for a reward of the whole trajectory", max(biases) < EXACT)
    evidence.remark(f"Order by bias at drift .3, centred advantage: {order(random_drift(0.3, True))}.")
    evidence.remark(f"The same without a baseline: {order(random_drift(0.3))}.")
    evidence.remark(
        "The printed table is reproduced with the advantage R - E_old[R]. With the raw reward R >= 0 every "
        "weight with E_old[w s] != 0 (none, the means, powers) is worse: the baseline is part of the comparison. "
        "Token sampling is immune to constants."
    )


@claim(
    "C31",
    "F",
    "Bai & Zhang 2026 ('the ideal weight')",
    "The product of the future ratios prod_{k>=j} rho_k is the exact, unbiased weight.",
)
def future_product_is_exact(evidence: Evidence) -> None:
    biases = []
    for size in DRIFTS:
        found = random_drift(size, baseline=True).quality
        biases.append(evidence.headline(f"drift {size:g}: relative bias, future product", found["future product"].bias))
        evidence.number(f"drift {size:g}: relative bias, prefix product", found["prefix product"].bias)
        evidence.number(f"drift {size:g}: relative bias, full product", found["full product"].bias)
    evidence.stated("the future product is unbiased", max(biases) < EXACT)
    evidence.remark(
        "It corrects the value of the future and leaves the prefixes distributed as the behaviour policy visits them."
    )


@claim(
    "C32", "T*", "Bai & Zhang 2026 ('exponential variance')",
    "With E[rho] = 1 and independent log-ratios of variance s^2, Var(prod) = e^{Hs^2} - 1, the "
"effective sample size is e^{-Hs^2}, and "
    "the geometric mean has log-variance s^2/H.",
)  # fmt: skip
def product_variance_is_exponential(evidence: Evidence) -> None:
    points = normal_grid(16.0)
    printed = {
        (100, 0.1): ("1.718", ".368", ".01005", ".9951", "9.9e-5"),
        (10, 0.5): ("11.18", ".082", ".284", ".894", ".0202"),
    }
    exact = []
    for (horizon, sigma), row in printed.items():
        total = horizon * sigma**2

        def moments(mean: float, deviation: float) -> tuple[float, float]:
            values = np.exp(mean + deviation * points)
            first = normal_expectation(values, points)
            return first, normal_expectation(values**2, points) - first**2

        product, token = moments(-total / 2, math.sqrt(total)), moments(-(sigma**2) / 2, sigma)
        geometric = moments(-(sigma**2) / 2, sigma / math.sqrt(horizon))
        at = f"H = {horizon}, s = {sigma:g}"
        evidence.number(f"{at}: Var of the product", product[1], row[0])
        evidence.number(f"{at}: effective sample size share", product[0] ** 2 / (product[1] + product[0] ** 2), row[1])
        evidence.number(f"{at}: Var of a token ratio", token[1], row[2])
        evidence.number(f"{at}: E of the geometric mean", geometric[0], row[3])
        evidence.number(f"{at}: Var of the geometric mean", geometric[1], row[4])
        exact.append(abs(product[1] / math.expm1(total) - 1) < 1e-6)
    rng = np.random.default_rng(0)
    horizon, sigma = 100, 0.1
    own = rng.normal(-(sigma**2) / 2, sigma, (20_000, horizon))
    shared = np.repeat(rng.normal(-(sigma**2) / 2, sigma, (20_000, 1)), horizon, axis=1)
    independent = evidence.number(
        "H = 100, s = .1: log-variance of the geometric mean / s^2, independent tokens", own.mean(1).var() / sigma**2
    )
    together = evidence.headline(
        "H = 100, s = .1: the same when all tokens drift together", shared.mean(1).var() / sigma**2
    )
    product = np.exp(shared.sum(1)).var()
    evidence.number("H = 100, s = .1: Var of the product when all tokens drift together", product)
    evidence.stated("the laws hold whatever the dependence between tokens", abs(together - 1 / horizon) < 0.1 / horizon)
    evidence.restricted(
        "they hold for independent tokens with E[rho] = 1",
        all(exact) and abs(independent - 1 / horizon) < 0.1 / horizon,
    )


@claim(
    "C32b", "O", "Bai & Zhang 2026, interactive figure",
    "The figure's ratios rho = e^X, X ~ N(0, s^2), show the variance of importance ratios; a product of "
"H ratios fluctuates by 2^H.",
)  # fmt: skip
def figure_ratios(evidence: Evidence) -> None:
    points = normal_grid(16.0)
    for (horizon, sigma), printed in {(100, 0.1): "4.67", (10, 0.5): "136.2"}.items():
        total = horizon * sigma**2
        mean = normal_expectation(np.exp(math.sqrt(total) * points), points)
        second = normal_expectation(np.exp(2 * math.sqrt(total) * points), points)
        evidence.number(
            f"H = {horizon}, s = {sigma:g}: Var of the product of the figure's ratios", second - mean**2, printed
        )
        evidence.number(f"H = {horizon}, s = {sigma:g}: the same for valid ratios", math.expm1(total))
    mean_ratio = evidence.headline("E[rho] of the figure at s = .5", normal_expectation(np.exp(0.5 * points), points))
    worst, typical = 10 * math.log(2), math.sqrt(10) * math.log(2)
    evidence.number("ratios of 2 or 1/2, H = 10: largest log of the product", worst)
    evidence.number("ratios of 2 or 1/2, H = 10: standard deviation of its log", typical)
    evidence.stated("the figure's ratios have mean 1", abs(mean_ratio - 1) < 1e-6)
    evidence.restricted("the product's variance does grow exponentially", math.expm1(2.5) > 5 * math.expm1(1.0))
    evidence.remark("2^H is the worst case, not the law: the log of the product has standard deviation sqrt(H) log 2.")


@claim(
    "C33",
    "T",
    "Zheng et al. 2025a (GSPO); this book",
    "The GSPO ratio is systematically below 1: E_old[log s] = -(1/H) KL(old || pi) <= 0.",
)
def gspo_below_one(evidence: Evidence) -> None:
    for size, printed in zip(DRIFTS, (".998", ".981", ".824"), strict=True):
        mean = evidence.headline(
            f"drift {size:g}: E_old of the GSPO ratio", random_drift(size).gspo_mean, printed, 0.03
        )
        evidence.stated(f"below 1 at drift {size:g}", mean < 1)
    gaps = []
    for seed in range(10):
        setting = Setting.random(3, 4, seed, drift=0.5)
        mean = float(setting.sampling @ log_ratios(setting)["sequence_mean"][:, 0])
        gaps.append(abs(mean + float(exact_kl(setting.behaviour, setting.policy)) / 4))
    evidence.number("largest difference of E_old[log s] from -KL(old || pi)/H", max(gaps))
    evidence.stated("E_old[log s] = -KL(old || pi)/H", max(gaps) < EXACT)


@claim(
    "C33b",
    "O",
    "Bai & Zhang 2026, summary of rho choices",
    "GSPO: lowest variance, highest bias; future mean between; token ratio: highest variance, lowest bias.",
)
def spectrum_of_ratios(evidence: Evidence) -> None:
    names = ("GSPO mean", "future mean", "token")
    variance_order: list[bool] = []
    centred: list[bool] = []
    raw: list[bool] = []
    for size in DRIFTS:
        for label, drift in (("centred", random_drift(size, True)), ("no baseline", random_drift(size))):
            biases = [
                evidence.number(f"drift {size:g}, {label}: relative bias, {name}", drift.quality[name].bias)
                for name in names
            ]
            (centred if label == "centred" else raw).append(biases[0] > biases[1] > biases[2])
            variances = [drift.quality[name].variance for name in names]
            if label == "centred":
                variance_order.append(variances[0] <= variances[1] + 1e-3 and variances[1] <= variances[2] + 1e-3)
    evidence.stated("GSPO has the highest and the token ratio the lowest bias, centred advantage", all(centred))
    evidence.restricted("GSPO has the lowest and the token ratio the highest variance", all(variance_order))
    evidence.restricted("the order of the biases is as printed for a reward without a baseline", all(raw))
    evidence.remark("With GRPO's centred advantages the order of the biases is reversed: the token ratio has the most.")


@claim(
    "C34",
    "T",
    "Bai & Zhang 2026",
    "The future mean equals the token ratio at the last token and the GSPO ratio at the first; it "
    "averages no past token.",
)
def future_mean_limits(evidence: Evidence) -> None:
    from klab.harness.objective.ratio import RATIOS

    setting = Setting.random(3, 4, 0, drift=0.5, end=2)
    mask = setting.policy.trajectories.mask
    ours = log_ratios(setting)
    theirs = {name: RATIOS.bound(name, {})(setting.log_ratio, mask) for name in ours}
    last = (setting.lengths - 1).long()[:, None]
    gaps = {
        "at the last own token: future mean - token": (theirs["future_mean"] - theirs["token"]).gather(1, last),
        "at the first own token: future mean - GSPO": (theirs["future_mean"] - theirs["sequence_mean"])[:, :1],
    }
    for name, gap in gaps.items():
        evidence.stated(name + " = 0", evidence.number(name, gap.abs().max()) < 1e-15)
    different = max(float(((ours[name] - theirs[name]) * setting.mask).abs().max()) for name in ours)
    evidence.number("largest difference between the harness's seven definitions and this book's", different)
    evidence.stated("the harness computes the same seven ratios", different < 1e-14)
    changed = setting.log_ratio.clone()
    changed[:, 0] += 1.0
    later = (RATIOS.bound("future_mean", {})(changed, mask) - theirs["future_mean"])[:, 1:] * setting.mask[:, 1:]
    evidence.stated("a change at the first token leaves later positions alone", float(later.abs().max()) == 0)
