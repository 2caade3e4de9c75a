"""Claims C10, C16, C17: KL estimators in the reward."""

from __future__ import annotations

import math

import torch

from klab.harness.claims.claim import Evidence, claim
from klab.harness.claims.instances import BERNOULLI, Setting, cosine, k3, relative, to_go
from klab.harness.claims.kl_gradients import (
    EXACT,
    bernoulli_derivatives,
    forward_kl_gradient,
    reverse_kl_gradient,
    sequences,
    worked,
)


@claim(
    "C10", "T", "Bai & Zhang 2026; From Estimation to Optimization; Liu et al. 2025a; Tang & Munos 2025",
    "k1 in the reward, as a return over all future KL, has the gradient of KL(pi || ref) in expectation (on-policy).",
)  # fmt: skip
def k1_in_reward(evidence: Evidence) -> None:
    errors, short = [], []
    for setting in [worked(), *sequences()]:
        truth = reverse_kl_gradient(setting)
        errors.append(relative(setting.mean(to_go(setting.kappa)), truth))
        if setting.policy.horizon > 1:
            short.append(relative(setting.mean(setting.kappa), truth))
    evidence.headline("largest relative error, future sum", max(errors))
    evidence.number("relative error of the token's own k1 alone (V=3, H=4), mean", sum(short) / len(short))
    evidence.stated("exact on a bandit and on sequences", max(errors) < EXACT)
    evidence.stated("the return over the future is needed", min(short) > 1e-3)


@claim(
    "C16", "T", "Shah et al. 2025",
    "k3 in the reward has the expected gradient grad KL(pi||ref) - grad KL(ref||pi): it can push away "
"from the reference.",
)  # fmt: skip
def k3_in_reward(evidence: Evidence) -> None:
    setting = worked()
    expected = setting.mean(k3(setting.kappa))
    truth = reverse_kl_gradient(setting) - forward_kl_gradient(setting)
    for index, printed in enumerate(("0.0719", "-0.1153", "-0.0724", "0.1157")):
        evidence.number(f"categorical: component {index + 1}", expected[index], printed)
    derivatives = bernoulli_derivatives()
    slope = evidence.headline("Bernoulli .8 against .5: d/dp of k3 in reward", derivatives["k3 in reward"], "-0.4887")
    evidence.number("Bernoulli .8 against .5: d/dp of k2 in reward", derivatives["k2 in reward"], "-0.3093")
    errors = [relative(expected, truth)]
    for seed in range(10):
        random = Setting.random(8, 1, seed)
        difference = reverse_kl_gradient(random) - forward_kl_gradient(random)
        errors.append(relative(random.mean(k3(random.kappa)), difference))
    evidence.number("largest relative error, 11 one-step policies", max(errors))
    cosines, norms = [], []
    for sequence in sequences(20):
        gradient, reverse = sequence.mean(to_go(k3(sequence.kappa))), reverse_kl_gradient(sequence)
        cosines.append(cosine(gradient, reverse))
        norms.append(float(gradient.norm() / reverse.norm()))
    evidence.number("V=3, H=4, 20 random policies: mean cosine to the reverse-KL gradient", sum(cosines) / 20)
    evidence.number("V=3, H=4: mean norm ratio", sum(norms) / 20)
    evidence.stated("equal to the difference of the two KL gradients", max(errors) < EXACT)
    evidence.stated("descending it raises p, away from the reference, on the Bernoulli instance", slope < 0)


@claim(
    "C16b",
    "F",
    "Why GRPO Uses r − log r − 1, section 3.1",
    "k3 is non-negative, so -beta k3 is always a pure penalty and harder to exploit than the log-ratio.",
)
def always_a_penalty(evidence: Evidence) -> None:
    derivatives = bernoulli_derivatives()
    first = BERNOULLI[0]
    pulls = {}
    for name in ("k3 in reward", "k1 in reward", "k3 as loss"):
        moved = first - 0.01 * derivatives[name]
        before, after = (p * math.log(2 * p) + (1 - p) * math.log(2 - 2 * p) for p in (first, moved))
        pulls[name] = evidence.headline(
            f"change of KL(pi||ref) after descending {name} (step .01 in p)", after - before
        )
    evidence.stated("a reward of -k3 lowers the KL", pulls["k3 in reward"] < 0)
    evidence.remark(
        "Its non-negativity is what makes it push under-represented tokens further down. The log-ratio's "
        "'accidental reward' on an under-represented token is the restoring force; as a differentiated loss k3 "
        "does restore."
    )


@claim(
    "C17", "T", "Shah et al. 2025",
    "Placing an unbiased estimator in both the reward and the loss gives the exact gradient of KL(pi || "
"ref), for k1 and for k3.",
)  # fmt: skip
def reward_and_loss(evidence: Evidence) -> None:
    errors: dict[str, list[float]] = {"k1": [], "k2": [], "k3": []}
    for setting in [worked(), *sequences()]:
        kappa = setting.kappa
        pairs = {
            "k1": (kappa, torch.ones_like(kappa)),
            "k2": (kappa**2 / 2, kappa),
            "k3": (k3(kappa), 1 - (-kappa).exp()),
        }
        truth = reverse_kl_gradient(setting)
        for name, (value, derivative) in pairs.items():
            errors[name].append(relative(setting.mean(to_go(value) + derivative), truth))
    for name, all_errors in errors.items():
        evidence.headline(f"{name}: largest relative error to grad KL(pi || ref)", max(all_errors))
    evidence.stated("exact for k1", max(errors["k1"]) < EXACT)
    evidence.stated("exact for k3", max(errors["k3"]) < EXACT)
    evidence.stated("not for k2, whose value is biased", min(errors["k2"]) > 1e-3)
