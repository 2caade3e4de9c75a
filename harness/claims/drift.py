"""Bias and variance of every importance ratio and weight when the current policy has drifted from the behaviour policy.

The laboratory of claims C30-C3E: V = 3, H = 4, binary reward, twenty random instances for each size of drift.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from klab.harness.claims.instances import Setting, binary_reward, generator, relative, to_go
from klab.harness.exact.gradients import exact_gradient, exact_kl
from klab.harness.exact.tabular import TabularPolicy

DRIFTS = (0.1, 0.3, 1.0)
"""Standard deviations of the logit noise between behaviour and current policy."""

INSTANCES = 20


def log_ratios(setting: Setting) -> dict[str, Tensor]:
    """log rho_j `[M, H]` of every definition on the ratio axis, from the log-ratios of own tokens (written apart from
    the harness)."""
    own, lengths = setting.log_ratio, setting.lengths[:, None]
    total = own.sum(1, keepdim=True).expand_as(own)
    remaining = to_go(setting.mask).clamp(min=1)
    return {
        "none": torch.zeros_like(own),
        "token": own,
        "sequence_mean": total / lengths,
        "future_mean": to_go(own) / remaining,
        "sequence_product": total,
        "future_product": to_go(own),
        "prefix_product": own.cumsum(1),
    }


Weighting = Callable[[Setting, Tensor], Tensor]


def _ratio(name: str, power: float = 1.0, cap: float = math.inf) -> Weighting:
    def weight(setting: Setting, advantage: Tensor) -> Tensor:
        return (power * log_ratios(setting)[name]).exp().clamp(max=cap)

    return weight


def _clipped(name: str, low: float = 0.2, high: float = 0.2) -> Weighting:
    def weight(setting: Setting, advantage: Tensor) -> Tensor:
        rho = log_ratios(setting)[name].exp()
        return rho * ((rho - rho.clamp(1 - low, 1 + high)) * advantage <= 0)

    return weight


WEIGHTS: dict[str, Weighting] = {
    "none": _ratio("none"),
    "token": _ratio("token"),
    "prefix product": _ratio("prefix_product"),
    "future product": _ratio("future_product"),
    "full product": _ratio("sequence_product"),
    "GSPO mean": _ratio("sequence_mean"),
    "future mean": _ratio("future_mean"),
    "PPO clip .2": _clipped("token"),
    "full product, q = .5": _ratio("sequence_product", 0.5),
    "full product, cap 2": _ratio("sequence_product", cap=2.0),
}


@dataclass(frozen=True, slots=True)
class Quality:
    """Relative bias of an estimator's expectation and its trace variance per trajectory, means over instances."""

    bias: float
    variance: float


@dataclass(frozen=True, slots=True)
class Drift:
    """One size of drift: KL(old || pi), effective sample size share, E_old of the GSPO ratio, and every weight's
    quality."""

    divergence: float
    sample_size: float
    gspo_mean: float
    quality: dict[str, Quality]


def quality(setting: Setting, reward: Tensor, weighting: Weighting, baseline: bool = False) -> Quality:
    """Bias and variance of E_old[sum_j w_j A s_j] as an estimate of grad E_pi[R]; A = R, or R - E_old[R] with
    `baseline`."""
    truth = exact_gradient(setting.policy, setting.policy, reward, 0.0).flatten()
    advantage = (reward - (setting.sampling @ reward if baseline else 0.0))[:, None].expand_as(setting.mask)
    coefficient = weighting(setting, advantage) * advantage
    return Quality(relative(setting.mean(coefficient), truth), setting.spread(coefficient))


def summary(settings: Iterable[tuple[Setting, Tensor]], baseline: bool = False) -> Drift:
    """Means over instances, each a setting and a reward `[M]`."""
    divergence = sample_size = gspo_mean = 0.0
    sums: dict[str, list[float]] = {name: [0.0, 0.0] for name in WEIGHTS}
    count = 0
    for setting, reward in settings:
        count += 1
        divergence += float(exact_kl(setting.behaviour, setting.policy))
        rho = setting.log_ratio.sum(1).exp()
        sample_size += 1 / float(setting.sampling @ rho**2)
        gspo_mean += float(setting.sampling @ log_ratios(setting)["sequence_mean"][:, 0].exp())
        for name, weighting in WEIGHTS.items():
            found = quality(setting, reward, weighting, baseline)
            sums[name][0] += found.bias
            sums[name][1] += found.variance
    means = {name: Quality(bias / count, spread / count) for name, (bias, spread) in sums.items()}
    return Drift(divergence / count, sample_size / count, gspo_mean / count, means)


@lru_cache(maxsize=16)
def random_drift(size: float, baseline: bool = False) -> Drift:
    """Drift by independent normal noise of standard deviation `size` on every logit."""
    settings = (Setting.random(3, 4, seed, drift=size) for seed in range(INSTANCES))
    return summary(((setting, binary_reward(81, 1000 + seed)) for seed, setting in enumerate(settings)), baseline)


@lru_cache(maxsize=4)
def update_drift(updates: int = 4, target: float = 0.1, weight: str = "token", baseline: bool = False) -> Drift:
    """Drift by `updates` inner updates along the weight's own expected gradient, the rate set so that KL(old || pi) ~
    `target`."""

    def settings() -> Iterable[tuple[Setting, Tensor]]:
        for seed in range(INSTANCES):
            behaviour = TabularPolicy.random(3, 4, generator=generator(seed))
            reward = binary_reward(81, 1000 + seed)
            low, high = 0.0, 50.0
            for _ in range(16):
                rate = (low + high) / 2
                setting = inner_updates(behaviour, reward, rate, updates, weight, baseline)
                low, high = (rate, high) if float(exact_kl(behaviour, setting.policy)) < target else (low, rate)
            yield inner_updates(behaviour, reward, low, updates, weight, baseline), reward

    return summary(settings(), baseline)


def inner_updates(
    behaviour: TabularPolicy, reward: Tensor, rate: float, updates: int, weight: str, baseline: bool = False
) -> Setting:
    """The setting after exact inner updates on data of the behaviour policy."""
    setting = Setting(behaviour, behaviour, behaviour)
    for _ in range(updates):
        advantage = (reward - (setting.sampling @ reward if baseline else 0.0))[:, None].expand_as(setting.mask)
        step = setting.mean(WEIGHTS[weight](setting, advantage) * advantage)
        setting = Setting(setting.policy.moved(rate * step.reshape(behaviour.logits.shape)), behaviour, behaviour)
    return setting
