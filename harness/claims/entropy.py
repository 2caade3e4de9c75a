"""Claims C80 to C84: what moves the entropy of a policy, and what entropy bonuses and masks do."""

from __future__ import annotations

import torch
from torch import Tensor

from klab.grid import Objective
from klab.harness.claims.claim import Evidence, claim
from klab.harness.claims.harness_loss import loss_gradient
from klab.harness.claims.instances import Setting, bandit, binary_reward, generator, relative
from klab.harness.exact.gradients import exact_entropy, gradient_of
from klab.harness.exact.report import estimator_report
from klab.harness.exact.tabular import TabularPolicy

POLICIES = 200
"""Random one-step policies on which a statement about every policy is tried."""


def one_step(seed: int, actions: int = 6) -> tuple[TabularPolicy, Tensor]:
    """A random one-step policy and a random advantage of each action, of mean 0 under it."""
    source = generator(seed)
    policy = TabularPolicy(torch.randn(1, actions, generator=source, dtype=torch.float64))
    advantage = torch.randn(actions, generator=source, dtype=torch.float64)
    return policy, advantage - policy.probabilities() @ advantage


def covariance(policy: TabularPolicy, left: Tensor, right: Tensor) -> Tensor:
    """Under a one-step policy, of two values of each action."""
    p = policy.probabilities()
    return p @ (left * right) - (p @ left) * (p @ right)


def change(policy: TabularPolicy, direction: Tensor, rate: float) -> float:
    """The change of the entropy over the rate, when the logits move by the rate times a direction."""
    moved = policy.moved(rate * direction[None])
    return float(exact_entropy(moved) - exact_entropy(policy)) / rate


@claim(
    "C80", "T", "Cui et al. 2025, theorems 1 and 2",
    "To first order a step of a softmax policy changes its entropy by -eta Cov(log pi, A) along the natural policy "
"gradient, and by -eta Cov(log pi, pi A) along the plain one.",
)  # fmt: skip
def covariance_law(evidence: Evidence) -> None:
    worst = {"natural": 0.0, "plain": 0.0}
    for seed in range(POLICIES):
        policy, advantage = one_step(seed)
        p, logp = policy.probabilities(), policy.logp()
        for name, direction in (("natural", advantage), ("plain", p * advantage)):
            law = -float(covariance(policy, logp, direction))
            found = [change(policy, direction, rate) for rate in (1e-4, -1e-4)]  # the second order cancels
            worst[name] = max(worst[name], abs(sum(found) / 2 - law) / max(abs(law), 1e-2))
    for name, error in worst.items():
        evidence.headline(f"largest relative error of the law, {name} gradient, {POLICIES} policies", error)
    policy, advantage = one_step(0)
    law = -float(covariance(policy, policy.logp(), advantage))
    beyond = [abs(change(policy, advantage, rate) - law) for rate in (0.02, 0.01)]
    order = evidence.number("error at eta 0.02 over that at eta 0.01", beyond[0] / beyond[1])
    evidence.stated("both laws are the derivative of the entropy", max(worst.values()) < 1e-5)
    evidence.stated("the error is of second order: linear in eta after division by it", 1.8 < order < 2.2)


@claim(
    "C81", "O", "Cui et al. 2025 (Clip-Cov and KL-Cov)",
    "The token with the largest (A - mean A)(l - mean l) is the one whose update lowers the entropy most.",
)  # fmt: skip
def largest_covariance(evidence: Evidence) -> None:
    agree, lowers = {"natural": 0, "plain": 0}, 0
    for seed in range(POLICIES):
        policy, advantage = one_step(seed)
        p, logp = policy.probabilities(), policy.logp()
        part = advantage * (logp - p @ logp)
        slope = gradient_of(policy, exact_entropy)[0]
        # of one sample of the action, whose step is A·(e_a − π); along the natural gradient A·e_a/π
        plain = advantage * (slope - p @ slope)
        natural = advantage * (slope / p)
        agree["plain"] += int(part.argmax() == plain.argmin())
        agree["natural"] += int(part.argmax() == natural.argmin())
        lowers += int(plain[part.argmax()] < 0)
    for name, count in agree.items():
        evidence.headline(f"policies on which it does, {name} gradient", count / POLICIES)
    share = evidence.number("policies on which a plain gradient of that token lowers the entropy", lowers / POLICIES)
    evidence.stated("along the plain gradient it is that token on every policy", agree["plain"] == POLICIES)
    evidence.restricted("along the natural gradient it is", agree["natural"] == POLICIES)
    evidence.remark(
        f"Training follows the plain gradient, whose step of a token also lowers all other logits: the token is "
        f"another one on {1 - agree['plain'] / POLICIES:.0%} of the policies, and lowers the entropy on {share:.0%}."
    )


@claim(
    "C82", "O", "TRL (entropy_coef); verl (entropy_coeff)",
    "A bonus of -log p of the sampled tokens has the expected gradient of the entropy.",
)  # fmt: skip
def sampled_bonus(evidence: Evidence) -> None:
    policy = bandit((0.4, 0.3, 0.2, 0.1))
    setting = Setting.on_policy(policy, policy)
    truth = gradient_of(policy, exact_entropy).flatten()
    differentiated = -setting.mean(torch.ones_like(setting.kappa))
    rewarded = setting.mean(-policy.token_logp())
    norm = evidence.headline(
        "expected gradient of -log p differentiated, over that of H", differentiated.norm() / truth.norm()
    )
    error = evidence.number("relative error of -log p as a detached reward", relative(rewarded, truth))
    exact = -loss_gradient(
        Objective(placement="none", advantage="raw", aggregation="sequence_sum", entropy_bonus=1.0),
        setting,
        torch.zeros(4, dtype=torch.float64),
    )[1]
    evidence.number("relative error of the exact entropy at one state", relative(exact, truth))
    evidence.stated("differentiated, it has", norm > 0.5)
    evidence.restricted("with the score term, -log p times the score, it has", error < 1e-12)
    evidence.restricted(
        "the entropy over the vocabulary needs no score term at a given state", relative(exact, truth) < 1e-12
    )
    evidence.remark("E[grad log p] = 0: the differentiated bonus is noise alone.")


@claim(
    "C83", "O", "TRL (entropy_coef); verl (entropy_coeff)",
    "The gradient of the mean entropy per token is that of the policy's entropy over completions.",
)  # fmt: skip
def bonus_of_tokens(evidence: Evidence) -> None:
    objective = Objective(placement="none", advantage="raw", aggregation="sequence_sum", entropy_bonus=1.0)
    cosines = {}
    for horizon in (1, 2, 3):
        setting = Setting.random(3, horizon, 0, scale=2.0)
        policy = setting.behaviour
        report = estimator_report(objective, policy, policy, policy, lambda tokens: torch.zeros(len(tokens)), 1)
        cosines[horizon] = evidence.headline(
            f"cosine with the gradient of H(completions), {horizon} tokens", report.cosine
        )
        evidence.number(f"relative bias, {horizon} tokens", report.bias)
    evidence.stated("for completions of any length", all(value > 1 - 1e-9 for value in cosines.values()))
    evidence.restricted("for completions of one token", cosines[1] > 1 - 1e-9)
    evidence.remark("What is missing is the score term: a token also decides how uncertain the states after it are.")


@claim(
    "C84", "F", "Wang et al. 2025",
    "The policy gradient of the 20% of tokens with the highest entropy points where that of all tokens does.",
)  # fmt: skip
def high_entropy_tokens(evidence: Evidence) -> None:
    setting = Setting.random(3, 3, 0, scale=2.0)
    policy, reward = setting.behaviour, binary_reward(27, 1)
    cosines = {}
    for share in (1.0, 0.5, 0.2):
        objective = Objective(
            placement="none", advantage="leave_one_out", weight="one", aggregation="sequence_sum", entropy_share=share
        )
        report = estimator_report(objective, policy, policy, policy, reward, 3)
        cosines[share] = evidence.headline(f"cosine with the gradient of E[R], share {share:g}", report.cosine)
        evidence.number(f"relative bias, share {share:g}", report.bias)
    evidence.stated("with a share of 20%", cosines[0.2] > 0.99)
    evidence.remark("A share below 1 is a bias in direction, not a shorter step: the tokens left out have signal, too.")
