"""Claims C70-C74: divergences beside reverse KL, as values, as gradients and over whole trajectories."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from klab.harness.claims.claim import Evidence, claim
from klab.harness.claims.instances import Setting, relative, to_go
from klab.harness.exact.divergences import renyi_divergence, sequence_divergence, token_divergence
from klab.harness.exact.gradients import exact_kl, gradient_of
from klab.harness.exact.instance import Instance
from klab.harness.exact.updates import every_group
from klab.harness.objective import Divergence
from klab.harness.objective.divergence import FORWARD, REVERSE, jeffreys, power

EXACT = 1e-12
DIVERGENCES: Mapping[str, Divergence] = {
    "reverse KL": REVERSE,
    "forward KL": FORWARD,
    "Jeffreys": jeffreys(),
    "alpha 1/2": power(alpha=0.5),
    "alpha 2": power(alpha=2.0),
}


def own_gradient(setting: Setting, divergence: Divergence) -> Tensor:
    """Gradient of E_pi[sum of f over the tokens], flat."""
    return gradient_of(setting.policy, lambda moving: token_divergence(moving, setting.reference, divergence)).flatten()


def slope(divergence: Divergence, kappa: Tensor) -> Tensor:
    """d f / d log pi of each token, -delta f'(delta), by autograd."""
    moving = kappa.clone().requires_grad_()
    return torch.autograd.grad(divergence.plain(moving).sum(), moving)[0]


@claim(
    "C70",
    "T",
    "Zhang et al. 2025 (RPG)",
    "k3 is the unnormalised KL; it equals the KL in expectation where both policies are normalised, and not otherwise.",
)
def unnormalised(evidence: Evidence) -> None:
    policy, reference = (torch.tensor(p, dtype=torch.float64) for p in ((0.5, 0.3, 0.2), (0.2, 0.2, 0.6)))
    gaps, scaled = [], []
    for divergence in DIVERGENCES.values():
        kappa = policy.log() - reference.log()
        gaps.append(abs(float(policy @ (divergence.nonnegative(kappa) - divergence.plain(kappa)))))
        mass = 1.1 * policy
        kappa = mass.log() - reference.log()
        scaled.append(abs(float(mass @ (divergence.nonnegative(kappa) - divergence.plain(kappa)))))
    mass = 1.1 * policy
    measures = float((mass * (mass / reference).log() - mass + reference).sum())
    estimated = float(mass @ REVERSE.nonnegative(mass.log() - reference.log()))
    evidence.headline("largest |E k3 - E k1|, five divergences of two distributions", max(gaps))
    evidence.number("a policy of mass 1.1: E k3 - E k1 of reverse KL", scaled[0])
    evidence.number("the same: E k3 - sum(pi log(pi/ref) - pi + ref)", estimated - measures)
    evidence.stated("equal in expectation for distributions", max(gaps) < EXACT)
    evidence.stated("k3 is the unnormalised reverse KL of a policy of mass 1.1", abs(estimated - measures) < EXACT)
    evidence.stated("there it differs from the normalised form", scaled[0] > 1e-3)
    evidence.remark("Softmax policies are normalised: between k1 and k3 only the variance differs, as values.")


@claim(
    "C71",
    "T",
    "Zhang et al. 2025 (RPG), proposition 4.1",
    "REINFORCE-style losses have the gradient of the fully differentiable ones, for every KL and off-policy.",
)
def two_styles(evidence: Evidence) -> None:
    worst = 0.0
    for seed in range(5):
        setting = Setting.random(3, 3, seed, drift=0.5)
        w = setting.log_ratio.exp()
        for divergence in DIVERGENCES.values():
            # RPG's reference is the policy of the rollout: kappa is log w
            for constant in (0.0, 1.0):  # of the normalised and of the unnormalised form: f - constant f'(1)(delta - 1)
                first = -float(slope(divergence, torch.zeros(1, dtype=torch.float64)))  # f'(1)
                moving = setting.log_ratio.clone().requires_grad_()
                value = divergence.plain(moving) - constant * first * torch.expm1(-moving)
                differentiated = torch.autograd.grad((moving.exp() * value).sum(), moving)[0]
                reinforce = w * (divergence.coefficient(setting.log_ratio) - (1.0 - constant) * first)
                worst = max(worst, float(((differentiated - reinforce) * setting.mask).abs().max()))
    gap = evidence.headline("largest difference of a token's coefficient, 5 policies x 5 divergences x 2 forms", worst)
    evidence.stated("equal token by token", gap < EXACT)
    evidence.remark(
        "Not only in expectation: the product rule on w·f. With a clip they differ: the released differentiable loss "
        "leaves the KL term unclipped, the REINFORCE-style one masks it with the reward's."
    )


@claim(
    "C72", "T", "Yao et al. 2026a, theorem 4.1 and proposition 4.3",
    "The gradient of E[sum_i f(delta_i)] weighs the score of token j by f(delta_j) - delta_j f'(delta_j) and f of all "
    "later tokens, for every f; a loss on each token lacks the latter, also on-policy.",
)  # fmt: skip
def future_terms(evidence: Evidence) -> None:
    errors, local = [], {}
    for name, divergence in DIVERGENCES.items():
        lacking = []
        for seed in range(5):
            setting = Setting.random(3, 3, seed)
            truth = own_gradient(setting, divergence)
            values = divergence.plain(setting.kappa) * setting.mask
            own = divergence.coefficient(setting.kappa)
            errors.append(relative(setting.mean(own + to_go(values) - values), truth))
            lacking.append(relative(setting.mean(own), truth))
        local[name] = sum(lacking) / 5
    evidence.headline("largest relative error, five divergences x 5 policies (V = H = 3)", max(errors))
    for name, error in local.items():
        evidence.number(f"{name}: mean relative error without the later tokens", error)
    step = Setting.random(4, 1, 0)
    one_step = max(relative(step.mean(d.coefficient(step.kappa)), own_gradient(step, d)) for d in DIVERGENCES.values())
    evidence.number("one step: largest relative error without the later tokens", one_step)
    evidence.stated("exact for every divergence", max(errors) < EXACT)
    evidence.stated("without the later tokens it is not, on sequences", min(local.values()) > 0.02)
    evidence.stated("on one step nothing is missing", one_step < EXACT)
    evidence.remark(
        "For reverse KL both parts are kappa, up to a constant: FRPO subtracts one reverse cumulative sum. For other "
        "divergences a token's own part is the estimator `reinforce`, and that of later ones k1, k3 or full."
    )


@claim(
    "C73",
    "F",
    "this book",
    "A divergence of trajectories is the sum over tokens of the next token's divergence at the policy's own states.",
)
def chain_rule(evidence: Evidence) -> None:
    lab = Instance()
    gaps = {}
    for name, divergence in DIVERGENCES.items():
        tokens = float(token_divergence(lab.behaviour, lab.reference, divergence))
        whole = float(sequence_divergence(lab.behaviour, lab.reference, divergence))
        evidence.number(f"{name}: summed over tokens", tokens)
        evidence.number(f"{name}: between trajectories", whole)
        gaps[name] = abs(whole - tokens) / whole
    elsewhere = float(token_divergence(lab.reference, lab.behaviour, REVERSE))
    forward = float(exact_kl(lab.behaviour, lab.reference, "forward"))
    evidence.headline("forward KL: relative difference of the two", gaps["forward KL"])
    evidence.number("forward KL of trajectories - that of tokens at the states that the reference visits",
                    forward - elsewhere)  # fmt: skip
    evidence.stated("so for every divergence", max(gaps.values()) < EXACT)
    evidence.remark(
        "For reverse KL alone. A sampled forward KL descends another objective than the forward KL of sequences, "
        "whose states come from the reference; α-divergences multiply along a trajectory and do not add up."
    )


@claim(
    "C74",
    "F",
    "this book",
    "A Renyi divergence can be estimated as its logarithm of a mean over samples, as a KL can by a mean of logarithms.",
)
def renyi(evidence: Evidence) -> None:
    lab = Instance()
    kappa = (lab.behaviour.logp() - lab.reference.logp()).detach()
    biases = []
    for alpha in (0.5, 2.0):
        truth = float(renyi_divergence(lab.behaviour, lab.reference, alpha))
        evidence.number(f"order {alpha:g}: the divergence of trajectories", truth)
        for size in (1, 2, 3):
            updates = every_group(lab.behaviour, size)
            plugged = ((alpha - 1) * kappa).exp()[updates.members].mean(1).log() / (alpha - 1)
            mean = evidence.headline(
                f"order {alpha:g}: expectation of the plug-in of {size}", updates.weights @ plugged
            )
            biases.append(abs(mean - truth) / truth)
    reverse = evidence.number("reverse KL", exact_kl(lab.behaviour, lab.reference))
    single = float(lab.behaviour.probabilities() @ kappa)
    evidence.stated("without bias", max(biases) < EXACT)
    evidence.remark(
        f"With one sample it is kappa whatever the order: {single:.3f}, the reverse KL ({reverse:.3f}). The bias falls "
        "with the number of samples and never vanishes, so klab has no Renyi divergence; `alpha` is the same family "
        "without the logarithm."
    )
