"""Claims C51, C55, C56: trust regions, i.e. what keeps a policy near the one that produced its data."""

from __future__ import annotations

import math

import torch

from klab.grid import Objective
from klab.harness.claims.claim import Evidence, claim
from klab.harness.claims.harness_loss import loss_gradient
from klab.harness.claims.instances import Setting, bandit, binary_reward, generator, relative
from klab.harness.exact.gradients import exact_kl, gradient_of
from klab.harness.exact.tabular import TabularPolicy


def inner_steps(beta: float, steps: int = 20, rate: float = 0.5) -> list[float]:
    """KL(old || pi) along exact descent of -E_old[rho R] + beta E_old[k1] on a bandit, data of the initial policy."""
    behaviour = bandit((0.4, 0.3, 0.2, 0.1))
    reward = torch.tensor([1.0, 0.5, 0.0, 0.0], dtype=torch.float64)
    policy, divergences = behaviour, []
    for _ in range(steps):
        setting = Setting(policy, behaviour, behaviour)
        rho = setting.log_ratio.exp()
        step = setting.mean(rho * (reward - rho[:, 0] * setting.sampling @ reward)[:, None]) - beta * setting.mean(
            torch.ones_like(rho)
        )
        policy = policy.moved(rate * step.reshape(1, -1))
        divergences.append(float(exact_kl(behaviour, policy)))
    return divergences


@claim(
    "C51",
    "F",
    "Jiosi 2026, main claim 2",
    "Up to a sign the k1 term acts as a forward-KL trust region, a cross-entropy that keeps pi near the "
    "behaviour policy.",
)
def k1_is_a_trust_region(evidence: Evidence) -> None:
    first = Setting.on_policy(bandit((0.4, 0.3, 0.2, 0.1)), bandit((0.25, 0.25, 0.25, 0.25)))
    norm = evidence.number(
        "first inner step: norm of the expected k1 gradient", first.mean(torch.ones_like(first.kappa)).norm()
    )
    ends = []
    for beta in (0.0, 0.1, 0.3, 1.0):
        ends.append(evidence.headline(f"KL(old || pi) after 20 inner steps, beta {beta:g}", inner_steps(beta)[-1]))
    evidence.stated("a larger beta keeps pi closer to the behaviour policy", ends == sorted(ends, reverse=True))
    evidence.remark(
        f"The term is -beta KL(old || pi) + constant: nothing at the first step ({norm:.0e}), then "
        "repulsive, faster with a larger beta."
    )


@claim(
    "C55", "T*", "From Estimation to Optimization",
    "PPO's clipping approximates TRPO's constraint KL(old || pi) <= d; the KL of the reward is taken at "
"the rollout, detached.",
)  # fmt: skip
def clipping_as_trust_region(evidence: Evidence) -> None:
    behaviour = bandit((0.4, 0.3, 0.2, 0.1))
    reward = torch.tensor([1.0, 0.5, 0.0, 0.0], dtype=torch.float64)
    advantage = reward - behaviour.probabilities() @ reward
    largest = {}
    for rate in (0.2, 4.0):
        policy = behaviour
        for _ in range(20):
            setting = Setting(policy, behaviour, behaviour)
            rho = setting.log_ratio[:, 0].exp()
            weight = rho * ((rho - rho.clamp(0.8, 1.2)) * advantage <= 0)
            policy = policy.moved(rate * setting.mean((weight * advantage)[:, None]).reshape(1, -1))
        rho = (policy.logp() - behaviour.logp()).exp()
        largest[rate] = evidence.headline(
            f"20 clipped inner steps, lr {rate:g}: largest |rho - 1|", (rho - 1).abs().max()
        )
        evidence.number(f"20 clipped inner steps, lr {rate:g}: KL(old || pi)", exact_kl(behaviour, policy))
    drifted = Setting.random(3, 3, 0, drift=0.3)
    reward3 = binary_reward(27, 1)
    at = {
        when: loss_gradient(
            Objective(estimator="k1", placement="reward_to_go", kl_at=when, advantage="raw", beta=0.5), drifted, reward3
        )[1]
        for when in ("rollout", "current")
    }
    apart = evidence.number(
        "off-policy: relative difference of the gradients with K at the rollout and K at the current policy",
        relative(at["current"], at["rollout"]),
    )
    own = Setting.on_policy(drifted.behaviour, drifted.reference)
    same = [
        loss_gradient(
            Objective(estimator="k1", placement="reward_to_go", kl_at=when, advantage="raw", beta=0.5), own, reward3
        )[1]
        for when in ("rollout", "current")
    ]
    evidence.number("on-policy: the same", relative(same[1], same[0]))
    evidence.stated("clipping keeps every ratio inside its band", max(largest.values()) <= 0.2 + 1e-9)
    evidence.restricted("the excess over the band is smaller with small steps", largest[0.2] < largest[4.0])
    evidence.restricted(
        "K at the rollout and at the current policy are two algorithms off-policy only",
        apart > 1e-3 and torch.equal(same[0], same[1]),
    )


@claim(
    "C56", "O", "Jiosi 2026 ('Hessians & the trust-region interpretation', eq. 13)",
    "KL(old || pi) ~ dtheta' F dtheta / 2 is of second order, whereas GRPO's log-ratio term contributes "
"a first-order term.",
)  # fmt: skip
def second_order(evidence: Evidence) -> None:
    behaviour = Setting.random(3, 3, 0).behaviour
    reference = TabularPolicy.random(3, 3, generator=generator(5))
    score = behaviour.token_scores().sum(1)
    weights = behaviour.probabilities().detach()
    fisher = torch.einsum("m,md,me->de", weights, score, score)
    direction = torch.randn(score.shape[1], dtype=torch.float64, generator=generator(7))
    direction /= direction.norm()
    kl, ratio, mean_term, sample_term = [], [], [], []
    start = (behaviour.token_logp() - reference.token_logp()).sum(1)
    steps = (0.2, 0.1, 0.05)
    for step in steps:
        policy = behaviour.moved(step * direction.reshape(behaviour.logits.shape))
        kl.append(float(exact_kl(behaviour, policy)))
        ratio.append(kl[-1] / float(0.5 * step**2 * direction @ fisher @ direction))
        term = (policy.token_logp() - reference.token_logp()).sum(1) - start
        mean_term.append(float(weights @ term))
        sample_term.append(float(weights @ term.abs()))
    evidence.number("KL(old || pi) / (dtheta' F dtheta / 2) at |dtheta| = .05", ratio[-1])
    orders = {
        "KL(old || pi)": math.log2(kl[1] / kl[2]),
        "E_old[k1 term] - its start": math.log2(mean_term[1] / mean_term[2]),
        "one sample's k1 term (mean absolute change)": math.log2(sample_term[1] / sample_term[2]),
    }
    for name, order in orders.items():
        evidence.headline(f"order in |dtheta| of {name}", order)
    mirror = evidence.number(
        "largest |E_old[k1 term] change + KL(old || pi)|", max(abs(a + b) for a, b in zip(mean_term, kl, strict=True))
    )
    hessian = gradient_of(
        behaviour.moved(1e-4 * direction.reshape(behaviour.logits.shape)),
        lambda moving: exact_kl(moving, behaviour, "forward"),
    )
    evidence.number(
        "gradient of KL(old || pi) against F dtheta at |dtheta| = 1e-4, relative",
        relative(hessian / 1e-4, fisher @ direction),
    )
    quadratic = (
        abs(ratio[-1] - 1) < 0.02 and abs(ratio[-1] - 1) < abs(ratio[0] - 1) and abs(orders["KL(old || pi)"] - 2) < 0.1
    )
    evidence.stated("KL(old || pi) is the quadratic form to leading order, and the expected k1 term is of first order",
                    quadratic and abs(orders["E_old[k1 term] - its start"] - 1) < 0.1)  # fmt: skip
    evidence.restricted("KL(old || pi) is the quadratic form to leading order", quadratic)
    evidence.restricted(
        "a single sample's k1 term is of first order",
        abs(orders["one sample's k1 term (mean absolute change)"] - 1) < 0.1,
    )
    evidence.remark(
        f"In expectation the k1 term is exactly -KL(old || pi) ({mirror:.0e}): of second order too, with the "
        "wrong sign (C51). Only its sampling noise is of first order."
    )
