"""Claims C50-C54: statements of posts and notes about references and log-ratios."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from klab.grid import Objective
from klab.harness.claims.claim import Evidence, claim
from klab.harness.claims.harness_loss import loss_gradient
from klab.harness.claims.instances import Setting, bandit, binary_reward, generator, k3, relative
from klab.harness.claims.kl_gradients import autograd_samples, bernoulli_derivatives
from klab.harness.exact.gradients import exact_kl
from klab.harness.exact.tabular import TabularPolicy

EXACT = 1e-12


def with_reference(setting: Setting, reference: TabularPolicy) -> Setting:
    """The same policies with another reference."""
    return Setting(setting.policy, reference, setting.behaviour)


@claim(
    "C50",
    "F",
    "Jiosi 2026, main claim 1",
    "The reference policy does not contribute gradients: the regulariser's gradient is that of log pi alone.",
)
def reference_is_absent(evidence: Evidence) -> None:
    setting = Setting.random(3, 3, 0, drift=0.3)
    other = with_reference(setting, TabularPolicy.random(3, 3, generator=generator(9)))
    reward = torch.zeros(27, dtype=torch.float64)
    changes = {}
    for estimator in ("k1", "k2", "k3"):
        objective = Objective(estimator=estimator, placement="loss", advantage="raw", beta=1.0)
        here, there = (loss_gradient(objective, each, reward)[1] for each in (setting, other))
        changes[estimator] = evidence.headline(
            f"{estimator} as loss: relative change of the gradient under another reference", relative(there, here)
        )
    at_reference = with_reference(setting, setting.policy)
    vanishing = evidence.number(
        "k3 at pi = ref: largest gradient of any sample", autograd_samples(at_reference, "k3").abs().max()
    )
    near = []
    for step in (0.02, 0.01):
        moved = with_reference(
            setting, setting.policy.moved(step * torch.ones_like(setting.policy.logits).cumsum(1).sin())
        )
        near.append(float(moved.sampling @ k3(moved.kappa).sum(1)))
    order = evidence.number("order of E_old[k3] in the distance to the reference", math.log2(near[0] / near[1]))
    evidence.stated("another reference leaves GRPO's (k3) gradient alone", changes["k3"] < EXACT)
    evidence.remark(
        f"True of k1 as loss only ({changes['k1']:.0e}). GRPO uses k3: its coefficient 1 - ref/pi contains the "
        f"reference and vanishes there ({vanishing:.0e}); near it the penalty is of order {order:.2f}, so 'not "
        "second-order' is false as well."
    )


@claim(
    "C52", "T", "Jiosi 2026, claim 2 (section 2.3)",
    "Off-policy E_old[k3] is not KL(pi || ref) and no importance weight is applied; the first inner step is unbiased.",
)  # fmt: skip
def k3_off_policy(evidence: Evidence) -> None:
    setting = Setting.random(3, 3, 0, drift=0.5)
    true = evidence.number("KL(pi || ref)", exact_kl(setting.policy, setting.reference))
    sampled = evidence.headline("E_old[sum of k3]", setting.sampling @ k3(setting.kappa).sum(1))
    prefix = setting.log_ratio.cumsum(1).exp()
    corrected = evidence.number(
        "E_old[sum of k3 x prefix ratio]", setting.sampling @ (prefix * k3(setting.kappa)).sum(1)
    )
    first = Setting.on_policy(setting.behaviour, setting.reference)
    at_first = abs(float(first.sampling @ k3(first.kappa).sum(1)) - float(exact_kl(first.policy, first.reference)))
    evidence.number("first inner step: |E_old[k3] - KL(pi || ref)|", at_first)
    still = with_reference(setting, setting.policy)
    rest = evidence.number(
        "pi = ref, any behaviour policy: norm of E_old[grad k3]", still.mean(1 - (-still.kappa).exp()).norm()
    )
    evidence.stated("biased for pi != old", abs(sampled - true) > 1e-3)
    evidence.stated("unbiased at the first inner step", at_first < EXACT)
    evidence.stated("repaired by the prefix ratio", abs(corrected - true) < EXACT)
    evidence.remark(
        f"What Jiosi misses: pi = ref stays a stationary point whatever the sampling distribution ({rest:.0e})."
    )


def log_ratio_runs(updates: int = 200, size: int = 16) -> tuple[list[Tensor], list[Tensor], list[float]]:
    """Logits after every update of the same sampled training with `log_ratio` and with `none`, and the first run's
    losses."""
    reference = TabularPolicy.random(3, 3, generator=generator(1))
    reward = binary_reward(27, 2)
    runs: dict[str, list[Tensor]] = {}
    losses: dict[str, list[float]] = {}
    for placement in ("log_ratio", "none"):
        objective = Objective(placement=placement, advantage="raw", ratio="none", weight="one")
        source, policy = generator(3), reference
        runs[placement], losses[placement] = [], []
        for _ in range(updates):
            rows = policy.sample(size, source)
            setting = Setting(policy, reference, policy)
            loss, gradient = loss_gradient(objective, setting, reward, rows, torch.zeros(size, dtype=torch.long))
            policy = policy.moved(-0.5 * gradient.reshape(policy.logits.shape))
            runs[placement].append(policy.logits)
            losses[placement].append(loss)
    return runs["log_ratio"], runs["none"], [left - right for left, right in zip(*losses.values(), strict=True)]


@claim(
    "C53", "F", "GRPO and Log-Ratio-Based Regularization",
    "The loss -r log(pi/ref) has built-in regularisation (small near the reference, cautious updates): "
"no KL term is needed.",
)  # fmt: skip
def log_ratio_regularises(evidence: Evidence) -> None:
    with_ratio, without, shift = log_ratio_runs()
    identical = sum(torch.equal(left, right) for left, right in zip(with_ratio, without, strict=True))
    evidence.headline(
        "updates (of 200) after which the weights with and without the reference are bit-identical", identical, "200"
    )
    evidence.number("largest difference of the losses' values", max(map(abs, shift)))
    policy = torch.zeros(4, dtype=torch.float64)
    reward = torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    for _ in range(400):
        weights = policy.softmax(0)
        policy = policy + 0.5 * weights * (reward - weights @ reward)
    weights = policy.softmax(0)
    drift = evidence.number(
        "V = 4, 400 exact steps (lr .5) from a uniform reference: KL(pi || ref)",
        math.log(4) + float(weights @ weights.log()),
        "1.338",
        0.02,
    )
    bound = evidence.number("largest possible KL(pi || ref)", math.log(4), "1.386")
    setting = Setting.random(8, 1, 0)
    sizes = [float(setting.scores[arm, 0].norm()) for arm in range(8)]
    near, far = int(setting.kappa.abs().argmin()), int(setting.kappa.abs().argmax())
    evidence.number("gradient norm of the token with the smallest |log-ratio|", sizes[near])
    evidence.number("gradient norm of the token with the largest |log-ratio|", sizes[far])
    evidence.stated("the reference changes the training", identical < 200)
    evidence.stated("it keeps the policy near the reference", drift < bound / 2)
    evidence.remark(
        "grad = -r s whatever the reference: it shifts the loss, nothing else. GRPO uses ratios and clipping as "
        "PPO does, and its samples come from the behaviour policy, not from the reference."
    )


@claim("C54", "T", "Why GRPO Uses r − log r − 1", "E[k3] = KL, k3 >= 0, and k3 = x^2/2 + O(x^3) near the reference.")
def algebra_of_k3(evidence: Evidence) -> None:
    x = torch.linspace(-5, 5, 10_001, dtype=torch.float64)
    lowest = evidence.number("smallest k3 over log-ratios in [-5, 5]", k3(x).min())
    near = torch.tensor([0.1, 0.05], dtype=torch.float64)
    rest = (k3(near) - near**2 / 2).abs()
    order = evidence.number("order of k3 - x^2/2", math.log2(float(rest[0] / rest[1])))
    gaps = []
    for seed in range(10):
        setting = Setting.random(8, 1, seed)
        gaps.append(abs(float(setting.probabilities @ (k3(setting.kappa) - setting.kappa)[:, 0])))
    evidence.headline("largest |E[k3] - KL|, 10 random policies", max(gaps))
    evidence.stated(
        "non-negative, of second order, with the right mean", lowest >= 0 and abs(order - 3) < 0.1 and max(gaps) < EXACT
    )


@claim(
    "C54b",
    "F",
    "Why GRPO Uses r − log r − 1, section 3.1",
    "Where pi < ref the log-ratio is negative, so -beta log(pi/ref) acts like a reward for decreasing "
    "pi on that token.",
)
def accidental_reward(evidence: Evidence) -> None:
    setting = Setting.on_policy(bandit((0.8, 0.2)), bandit((0.5, 0.5)))
    step = -setting.mean(setting.kappa)
    moved = setting.policy.moved(0.05 * step.reshape(1, 2)).probabilities()
    evidence.number("reference probability of the under-represented token", 0.5)
    before = evidence.number("its probability before", 0.2)
    after = evidence.headline("its probability after a step on -k1 in the reward", moved[1])
    evidence.number("d KL/dp descended by k1 in reward", bernoulli_derivatives()["k1 in reward"], "1.38629")
    evidence.stated("the step lowers pi on the under-represented token", after < before)
    evidence.remark("A positive reward on an under-represented token raises its probability: the restoring force.")
