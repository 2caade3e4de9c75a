"""Claims C18-C21: KL terms when the data come from another policy; straight-through estimators."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from klab.harness.claims.claim import Evidence, claim
from klab.harness.claims.instances import Setting, k3, relative, trace_variance
from klab.harness.claims.kl_gradients import EXACT, forward_kl_gradient, reverse_kl_gradient
from klab.harness.exact.gradients import Direction, exact_kl, expected_reward, gradient_of
from klab.harness.exact.tabular import TabularPolicy

Loss = Callable[[Tensor, Tensor], Tensor]
"""A loss per trajectory from (log pi, log-ratio to old) of each trajectory."""


def per_sample(setting: Setting, loss: Callable[[TabularPolicy], Tensor]) -> Tensor:
    """Gradient of each trajectory's loss by autograd, `[M, D]`; `loss` maps a policy to `[M]`."""
    logits = setting.policy.logits.clone().requires_grad_()
    values = loss(TabularPolicy(logits, setting.policy.end))
    return torch.stack([torch.autograd.grad(value, logits, retain_graph=True)[0].flatten() for value in values])


@claim(
    "C18", "T", "DeepSeek-AI 2025b (DeepSeek-V3.2); Liu et al. 2025a; TRL 1.16 use_bias_correction_kl",
    "rho k3 differentiated has the gradient -rho log(delta) s = sg(rho) grad k2 of each sample: the "
"off-policy reverse-KL gradient. "
    "rho k1 is unbiased with extra noise, rho k2 is biased, and detaching rho turns k3 into the forward KL.",
)  # fmt: skip
def corrected_loss(evidence: Evidence) -> None:
    setting = Setting.random(8, 1, 3, drift=0.5)
    old, ref = setting.behaviour.logp().detach(), setting.reference.logp().detach()

    def sampled(term: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        return per_sample(setting, lambda policy: term((policy.logp() - old).exp(), policy.logp() - ref))

    kappa, rho = setting.kappa, setting.log_ratio.exp()
    gradients = {
        "rho k3": sampled(lambda ratio, k: ratio * k3(k)),
        "sg(rho) k2": sampled(lambda ratio, k: ratio.detach() * k**2 / 2),
        "rho k1": sampled(lambda ratio, k: ratio * k),
        "rho k2": sampled(lambda ratio, k: ratio * k**2 / 2),
        "sg(rho) k3": sampled(lambda ratio, k: ratio.detach() * k3(k)),
    }
    closed = {
        "rho k3": rho * kappa,
        "sg(rho) k2": rho * kappa,
        "rho k1": rho * (kappa + 1),
        "rho k2": rho * (kappa**2 / 2 + kappa),
        "sg(rho) k3": rho * (1 - (-kappa).exp()),
    }
    gap = max(float((gradients[name] - setting.samples(closed[name])).abs().max()) for name in closed)
    evidence.number("largest difference of any sample's gradient from its closed form", gap)
    same = evidence.headline(
        "rho k3 against sg(rho) k2, sample by sample", (gradients["rho k3"] - gradients["sg(rho) k2"]).abs().max()
    )
    reverse, forward = reverse_kl_gradient(setting), forward_kl_gradient(setting)
    errors = {name: relative(setting.sampling @ rows, reverse) for name, rows in gradients.items()}
    for name, error in errors.items():
        evidence.number(f"E_old of {name}: relative error to grad KL(pi || ref)", error)
    detached = evidence.number(
        "E_old of sg(rho) k3: relative error to grad KL(ref || pi)",
        relative(setting.sampling @ gradients["sg(rho) k3"], forward),
    )
    direction = torch.randn(setting.scores.shape[2], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    along = {name: (rows @ direction)[:, None] for name, rows in gradients.items()}
    extra = trace_variance(setting.sampling, along["rho k1"]) - trace_variance(setting.sampling, along["rho k3"])
    predicted = setting.sampling @ (rho[:, 0] ** 2 * (setting.scores[:, 0] @ direction) ** 2 * (2 * kappa[:, 0] + 1))
    evidence.number("extra variance of rho k1 along a direction", extra)
    evidence.number("the same by E[rho^2 (u.s)^2 (2 k1 + 1)]", predicted)
    sequence = Setting.random(3, 3, 0, drift=0.5)
    mean_old, mean_ref = sequence.behaviour.token_logp().detach(), sequence.reference.token_logp().detach()

    def geometric(policy: TabularPolicy) -> Tensor:
        logp = policy.token_logp()
        weight = (logp - mean_old).mean(1, keepdim=True).exp()
        return (weight * k3(logp - mean_ref)).sum(1)

    def detached_k2(policy: TabularPolicy) -> Tensor:
        logp = policy.token_logp()
        weight = (logp - mean_old).mean(1, keepdim=True).exp().detach()
        return (weight * (logp - mean_ref) ** 2 / 2).sum(1)

    left, right = per_sample(sequence, geometric), per_sample(sequence, detached_k2)
    evidence.number(
        "sequence-mean ratio: rho k3 against sg(rho) k2, relative", float((left - right).norm() / right.norm())
    )
    evidence.stated("every closed form", gap < EXACT)
    evidence.stated("rho k3 = sg(rho) k2 of each sample", same < EXACT)
    evidence.stated("rho k3 and rho k1 are unbiased off-policy", max(errors["rho k3"], errors["rho k1"]) < EXACT)
    evidence.stated("rho k2 is biased", errors["rho k2"] > 1e-3)
    evidence.stated("sg(rho) k3 has the forward-KL gradient", detached < EXACT)
    evidence.stated("rho k1's extra variance has the stated form", abs(extra - predicted) < 1e-10)
    evidence.remark(
        "The identity is one of token ratios: multiplied by a sequence-mean ratio (TRL with importance "
        "level 'sequence') it is lost."
    )


@claim("C19", "T", "verl 0.9.1, k3+", "k3_plus has the value of k3 and the gradient of k2.")
def straight_through(evidence: Evidence) -> None:
    from klab.grid import Objective
    from klab.harness.claims.harness_loss import loss_gradient

    setting = Setting.random(3, 3, 0)
    reward = torch.zeros(len(setting.mask), dtype=torch.float64)
    outcome = {}
    for name in ("k2", "k3", "k3_plus"):
        objective = Objective(estimator=name, placement="loss", ratio="none", weight="one", advantage="raw", beta=1.0)
        outcome[name] = loss_gradient(objective, setting, reward)
    value = evidence.number("value: k3_plus - k3", outcome["k3_plus"][0] - outcome["k3"][0])
    gradient = evidence.headline(
        "gradient: largest difference from k2's", (outcome["k3_plus"][1] - outcome["k2"][1]).abs().max()
    )
    evidence.stated("value of k3", abs(value) < 1e-15)
    evidence.stated("gradient of k2", gradient < 1e-15)


@claim(
    "C20", "T", "Zhang et al. 2025, table 1 (RPG)",
    "Off-policy losses for a KL to the behaviour policy: FKL (wR+b)s, UFKL (wR-b(w-1))s, RKL w(R-b(log "
"w+1))s, URKL w(R-b log w)s; "
    "fully differentiable and REINFORCE-style losses have the same gradients.",
)  # fmt: skip
def rpg_losses(evidence: Evidence) -> None:
    setting, beta = Setting.random(3, 3, 5, drift=0.4), 0.3
    old = setting.behaviour.logp().detach()
    reward = torch.linspace(-1, 2, len(old), dtype=torch.float64)
    losses: dict[str, Loss] = {
        "FKL": lambda logp, w: -w * reward - beta * logp,
        "UFKL": lambda logp, w: -w * reward + beta * (w - w.log() - 1),
        "RKL": lambda logp, w: w * (-reward + beta * w.log()),
        "URKL": lambda logp, w: -w * reward + beta * (w * w.log() - w),
    }
    w = setting.log_ratio.sum(1).exp()
    coefficients = {
        "FKL": w * reward + beta,
        "UFKL": w * reward - beta * (w - 1),
        "RKL": w * (reward - beta * (w.log() + 1)),
        "URKL": w * (reward - beta * w.log()),
    }
    score = setting.scores.sum(1)

    def sampled(loss: Loss) -> Tensor:
        return per_sample(setting, lambda policy: loss(policy.logp(), (policy.logp() - old).exp()))

    def regularised(direction: Direction) -> Tensor:
        def value(moving: TabularPolicy) -> Tensor:
            return expected_reward(moving, reward) - beta * exact_kl(moving, setting.behaviour, direction)

        return gradient_of(setting.policy, value).flatten()

    for name, loss in losses.items():
        differentiated = -sampled(loss)
        gap = evidence.number(
            f"{name}: differentiated against score form, per sample",
            (differentiated - coefficients[name][:, None] * score).abs().max(),
        )
        value = regularised("forward" if "F" in name else "reverse")
        error = evidence.headline(
            f"{name}: expectation against the exact gradient",
            relative(setting.sampling @ differentiated, value),
        )
        evidence.stated(f"{name}: identical gradients, exact expectation", gap < EXACT and error < EXACT)
    evidence.remark("RPG's table 3 prints AIME25 URKL Last .5261 > Best .4938, which cannot be: no anchor.")


def expected_placement(setting: Setting, coefficient: Tensor, to_go: bool) -> Tensor:
    """E_pi[sum_j c_j s_j] (or with c summed over the future) as the gradient of an expected surrogate: no scores in
    memory."""
    held = coefficient.flip(1).cumsum(1).flip(1) if to_go else coefficient
    weight = (setting.probabilities[:, None] * held).detach()
    return gradient_of(setting.policy, lambda moving: (weight * moving.token_logp()).sum()).flatten()


@claim(
    "C21b", "T", "Shah et al. 2025, synthetic check",
    "Binary autoregressive model: as an estimate of the reverse-KL gradient k1-reward is unbiased and "
"k3-reward has the largest bias.",
)  # fmt: skip
def comedy_synthetic(evidence: Evidence) -> None:
    exact, largest_of_all, largest_with_reference, above_one = [], [], [], 0
    for horizon, draws in ((5, 20), (8, 20), (11, 6)):
        biases: dict[str, list[float]] = {}
        for seed in range(draws):
            setting = Setting.random(2, horizon, seed, scale=0.7)
            truth, kappa = reverse_kl_gradient(setting), setting.kappa
            placements = {
                "k1 in reward": (kappa, True),
                "k3 in reward": (k3(kappa), True),
                "k1 as loss": (torch.ones_like(kappa), False),
                "k2 as loss": (kappa, False),
                "k3 as loss": (1 - (-kappa).exp(), False),
            }
            for name, (coefficient, future) in placements.items():
                biases.setdefault(name, []).append(relative(expected_placement(setting, coefficient, future), truth))
            above_one += biases["k3 in reward"][-1] > 1
            largest_of_all.append(max(biases, key=lambda name: biases[name][-1]) == "k3 in reward")
        mean = {
            name: evidence.number(f"T = {horizon}: mean relative bias, {name}", sum(rows) / len(rows))
            for name, rows in biases.items()
        }
        exact.append(mean["k1 in reward"] < EXACT)
        largest_with_reference.append(max(set(mean) - {"k1 as loss"}, key=lambda name: mean[name]) == "k3 in reward")
    evidence.headline("instances (of 46) on which k3 in reward is worse than no regulariser at all", above_one)
    evidence.stated("k1 in reward is unbiased at every length", all(exact))
    evidence.stated("k3 in reward has the largest bias on every instance", all(largest_of_all))
    evidence.restricted(
        "k3 in reward has the largest mean bias of the placements that see the reference", all(largest_with_reference)
    )
    evidence.remark(
        "k1 as loss has bias exactly 1 (zero expectation) and k3 in reward scatters around 1; which of the two "
        "is larger depends on the instance, so 'largest' is true of the placements whose gradient contains the "
        "reference, and only on average."
    )
