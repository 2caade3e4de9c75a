"""Claims C11-C15: what the *gradient* of each KL estimator is when it is differentiated as a loss."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from klab.harness.claims.claim import Evidence, claim
from klab.harness.claims.instances import BERNOULLI, CATEGORICAL, Setting, bandit, cosine, k3, relative, variance
from klab.harness.exact.gradients import exact_kl, gradient_of
from klab.harness.exact.tabular import TabularPolicy

EXACT = 1e-12


def reverse_kl_gradient(setting: Setting) -> Tensor:
    """grad KL(pi || ref), flat."""
    return gradient_of(setting.policy, lambda moving: exact_kl(moving, setting.reference)).flatten()


def forward_kl_gradient(setting: Setting) -> Tensor:
    """grad KL(ref || pi), flat."""
    return gradient_of(setting.policy, lambda moving: exact_kl(moving, setting.reference, "forward")).flatten()


def worked() -> Setting:
    """The categorical policy against its reverse."""
    return Setting.on_policy(bandit(CATEGORICAL), bandit(CATEGORICAL[::-1]))


def sequences(count: int = 5) -> list[Setting]:
    """Random on-policy settings with V = 3, H = 4."""
    return [Setting.random(3, 4, seed) for seed in range(count)]


def bernoulli_derivatives() -> dict[str, float]:
    """d/dp of each placement's expected regulariser for pi = (.8, .2) against (.5, .5), where p = pi(first)."""
    first, second = BERNOULLI
    kappa = torch.tensor([first, second], dtype=torch.float64).log() - math.log(0.5)
    weights = torch.tensor([first, second], dtype=torch.float64)
    slope = torch.tensor([1 / first, -1 / second], dtype=torch.float64)  # d log pi / dp
    coefficients = {
        "k1 in reward": kappa,
        "k1 as loss": torch.ones(2, dtype=torch.float64),
        "k2 as loss": kappa,
        "k3 as loss": 1 - (-kappa).exp(),
        "k3 in reward": k3(kappa),
        "k2 in reward": kappa**2 / 2,
    }
    return {name: float(weights @ (coefficient * slope)) for name, coefficient in coefficients.items()}


def autograd_samples(setting: Setting, loss_of: str) -> Tensor:
    """Per-trajectory gradients `[M, D]` of an estimator as a loss, by autograd; `sequence k2` sums before squaring."""
    logits = setting.policy.logits.clone().requires_grad_()
    policy = TabularPolicy(logits, setting.policy.end)
    kappa = policy.token_logp() - setting.reference.token_logp().detach()
    losses = {
        "k1": kappa.sum(1),
        "k2": (kappa**2 / 2).sum(1),
        "k3": k3(kappa).sum(1),
        "sequence k2": kappa.sum(1) ** 2 / 2,
    }[loss_of]
    rows = [torch.autograd.grad(value, logits, retain_graph=True)[0].flatten() for value in losses]
    return torch.stack(rows)


@claim(
    "C11", "T", "From Estimation to Optimization; Liu et al. 2025a, theorem 5.1",
    "k2 as loss and k1 in reward have the same gradient, sample by sample, for the same event (a bandit "
"or a whole sequence).",
)  # fmt: skip
def k2_loss_is_k1_reward(evidence: Evidence) -> None:
    for name, setting in (("bandit", worked()), ("sequence, V=3, H=4", Setting.random(3, 4, 0))):
        by_autograd = autograd_samples(setting, "sequence k2")
        total = setting.kappa.sum(1, keepdim=True).expand_as(setting.mask)
        in_reward = setting.samples(total)
        gap = evidence.headline(
            f"{name}: largest difference of any sample's gradient", (by_autograd - in_reward).abs().max()
        )
        error = evidence.number(
            f"{name}: relative error to grad KL(pi || ref)", relative(setting.mean(total), reverse_kl_gradient(setting))
        )
        evidence.stated(f"{name}: equal sample by sample", gap < 1e-14)
        evidence.stated(f"{name}: the expectation is the reverse-KL gradient", error < EXACT)


def decisive_first_action() -> Setting:
    """Two binary steps; the first action decides whether the later conditional KL is 0 or 2 nats."""
    half = math.log(0.5)
    miss = 0.5 - math.sqrt(0.25 - 0.25 * math.exp(-4.0))  # KL((.5,.5) || (q,1-q)) = 2 nats
    reference = torch.tensor([[half, half], [half, half], [math.log(miss), math.log(1 - miss)]], dtype=torch.float64)
    return Setting.on_policy(TabularPolicy(torch.zeros(3, 2)), TabularPolicy(reference))


@claim(
    "C11b", "O", "From Estimation to Optimization; Liu et al. 2025a as usually implemented",
    "k2 as a per-token loss (summed over the tokens) is gradient-equivalent to k1 in the reward.",
)  # fmt: skip
def k2_per_token(evidence: Evidence) -> None:
    one_step = relative(worked().mean(worked().kappa), reverse_kl_gradient(worked()))
    cosines, norms, errors = [], [], []
    for setting in sequences(20):
        truth, partial = reverse_kl_gradient(setting), setting.mean(setting.kappa)
        cosines.append(cosine(partial, truth))
        norms.append(float(partial.norm() / truth.norm()))
        errors.append(relative(partial, truth))
    evidence.number("V=3, H=4, 20 random policies: mean cosine to grad KL", sum(cosines) / 20)
    evidence.number("V=3, H=4: mean norm ratio", sum(norms) / 20)
    evidence.headline("V=3, H=4: mean relative error", sum(errors) / 20)
    fixture = decisive_first_action()
    truth = reverse_kl_gradient(fixture).reshape(3, 2)[0]
    partial = fixture.mean(fixture.kappa).reshape(3, 2)[0]
    evidence.number("fixture: d KL / d(first logit)", truth[0])
    evidence.number("fixture: the same from the per-token loss", partial[0])
    missing = evidence.number(
        "fixture: share of the first action's derivative that is missing", 1 - partial.norm() / truth.norm(), "1"
    )
    evidence.stated("equal on sequences", max(errors) < EXACT)
    evidence.restricted("equal on one step", one_step < EXACT)
    evidence.remark(
        "sum_t grad k2_t = sum_t K_t s_t drops the cross terms K_i s_j with i > j (Tang & Munos: 'partial "
        "gradient at best')."
    )
    evidence.remark(
        f"Where the first action alone decides the later KL, the per-token loss misses {missing:.0%} of its derivative."
    )


@claim(
    "C12", "T", "From Estimation to Optimization; open-instruct #534; Shah et al. 2025",
    "k1 as loss has zero expected gradient on-policy and no reference in it; off-policy it pushes away "
"from the behaviour policy.",
)  # fmt: skip
def k1_loss_is_noise(evidence: Evidence) -> None:
    setting = Setting.random(3, 4, 0)
    ones = torch.ones_like(setting.mask)
    on_policy = evidence.headline("on-policy: norm of the expected gradient", setting.mean(ones).norm())
    other = Setting.on_policy(setting.policy, TabularPolicy.random(3, 4))
    difference = (autograd_samples(setting, "k1") - autograd_samples(other, "k1")).abs().max()
    evidence.number("largest change of any sample's gradient under another reference", difference)
    drifted = Setting.random(3, 4, 0, drift=0.3)
    behaviour = drifted.behaviour
    expected = drifted.mean(torch.ones_like(drifted.mask))
    away = -gradient_of(drifted.policy, lambda moving: exact_kl(moving, behaviour, "forward")).flatten()
    error = evidence.number("off-policy: relative error to -grad KL(old || pi)", relative(expected, away))
    step = drifted.policy.moved(-1e-3 * expected.reshape(drifted.policy.logits.shape))
    growth = float(exact_kl(step, behaviour, "forward") - exact_kl(drifted.policy, behaviour, "forward"))
    evidence.number("off-policy: change of KL(old || pi) in a step of descent (lr .001)", growth)
    evidence.stated("zero expectation on-policy", on_policy < 1e-14)
    evidence.stated("the reference does not enter the gradient", difference == 0)
    evidence.stated("off-policy it equals -grad KL(old || pi)", error < EXACT)
    evidence.stated("so descending it moves away from the behaviour policy", growth > 0)


@claim(
    "C13", "T", "Tang & Munos 2025; Zhang et al. 2025 (RPG)",
    "k3 as loss has the coefficient 1 - delta, and on-policy its expected gradient is exactly that of "
"the *forward* KL(ref || pi).",
)  # fmt: skip
def k3_loss_is_forward_kl(evidence: Evidence) -> None:
    setting = worked()
    coefficient = 1 - (-setting.kappa).exp()
    forward, reverse, expected = forward_kl_gradient(setting), reverse_kl_gradient(setting), setting.mean(coefficient)
    by_autograd = setting.probabilities @ autograd_samples(setting, "k3")
    for index, printed in enumerate(("0.3", "0.1", "-0.1", "-0.3")):
        evidence.number(f"categorical: k3-loss gradient, component {index + 1}", expected[index], printed)
    for index, printed in enumerate(("0.3719", "-0.0153", "-0.1724", "-0.1843")):
        evidence.number(f"categorical: reverse-KL gradient, component {index + 1}", reverse[index], printed)
    angle = evidence.headline(
        "categorical: cosine of k3-loss to the reverse-KL gradient", cosine(expected, reverse), "0.908"
    )
    derivatives = bernoulli_derivatives()
    for name, printed in (
        ("k1 in reward", "1.38629"),
        ("k1 as loss", "0"),
        ("k2 as loss", "1.38629"),
        ("k3 as loss", "1.875"),
    ):
        evidence.number(f"Bernoulli .8 against .5: d/dp of {name}", derivatives[name], printed)
    errors = [relative(expected, forward), relative(by_autograd, forward)]
    for seed in range(10):
        random = Setting.random(8, 1, seed, scale=2.0)
        errors.append(relative(random.mean(1 - (-random.kappa).exp()), forward_kl_gradient(random)))
    evidence.number("largest relative error to grad KL(ref || pi), 11 one-step policies", max(errors))
    sequence = Setting.random(3, 4, 0)
    per_token = sequence.mean(1 - (-sequence.kappa).exp())
    evidence.number(
        "V=3, H=4: per-token k3-loss against the sequence's forward-KL gradient",
        relative(per_token, forward_kl_gradient(sequence)),
    )
    logits, ref = sequence.policy.conditionals(), sequence.reference.conditionals()
    visits = torch.zeros(len(logits), dtype=torch.float64)
    weights = (sequence.probabilities[:, None] * sequence.mask).flatten()
    visits.index_add_(0, sequence.policy.trajectories.contexts.flatten(), weights)
    per_context = relative(per_token, (visits[:, None] * (logits - ref)).flatten())
    evidence.number("V=3, H=4: the same against sum_h d_pi(h) grad KL(ref(.|h) || pi(.|h))", per_context)
    evidence.stated("E[grad k3] = grad KL(ref || pi) on every one-step policy", max(errors) < EXACT)
    evidence.stated("on sequences it is the conditional forward KL at the prefixes that pi visits", per_context < EXACT)
    evidence.stated(
        "it is another direction than the reverse KL's", angle < 0.95 and float(expected[1] * reverse[1]) < 0
    )
    evidence.remark(
        "'First-order biased approximation' is true near delta = 1 and understates it; '1 - delta saturates, it "
        "cannot push back' is about the coefficient alone: weighted by the sampling probability it is an "
        "ordinary forward-KL gradient."
    )


@claim(
    "C13b",
    "F",
    "Why GRPO Uses r − log r − 1",
    "GRPO is not changing the KL objective; it is changing how the KL is estimated.",
)
def grpo_keeps_the_objective(evidence: Evidence) -> None:
    setting = worked()
    expected, reverse = setting.mean(1 - (-setting.kappa).exp()), reverse_kl_gradient(setting)
    evidence.headline("relative distance of the k3-loss gradient to grad KL(pi || ref)", relative(expected, reverse))
    evidence.number("component 2: k3-loss x reverse KL (negative: opposite signs)", expected[1] * reverse[1])
    evidence.number("E[k3] - KL (the values agree)", setting.probabilities @ (k3(setting.kappa) - setting.kappa)[:, 0])
    evidence.stated("the gradient that is followed is the reverse KL's", relative(expected, reverse) < EXACT)


@claim(
    "C14", "F", "From Estimation to Optimization",
    "-log delta = (delta-1) - (delta-1)^2/2 + ...; the middle step (delta-1) grad delta/delta + s gives (1-delta) s; "
    "the direction of each sample's gradient is biased.",
)  # fmt: skip
def printed_expansion(evidence: Evidence) -> None:
    delta = torch.tensor([0.9, 1.1, 1.2], dtype=torch.float64)
    gap = delta - 1
    truth = -delta.log()
    printed = gap - gap**2 / 2 + gap**3 / 3
    correct = -gap + gap**2 / 2 - gap**3 / 3
    evidence.number("delta = 1.1: -log delta", truth[1])
    evidence.headline("delta = 1.1: the series as printed", printed[1])
    evidence.number("delta = 1.1: (1-delta) + (delta-1)^2/2 - (delta-1)^3/3", correct[1])
    middle = gap * -delta / delta + 1  # grad delta = -delta s
    evidence.number("delta = 1.2: coefficient of the middle step", middle[2], "0.8")
    evidence.number("delta = 1.2: 1 - delta", 1 - delta[2], "-0.2")
    grid = torch.logspace(-3, 3, 601, dtype=torch.float64)
    bias = -grid.log() - (1 - grid)
    same_sign = bool((torch.sign(1 - grid) == torch.sign(-grid.log())).all())
    evidence.number("smallest bias -log delta - (1 - delta) over delta in [.001, 1000]", bias.min())
    evidence.stated("the printed series equals -log delta", bool((printed - truth).abs().max() < 1e-3))
    evidence.stated("the middle step equals 1 - delta", bool((middle - (1 - delta)).abs().max() < 1e-12))
    evidence.stated("some sample's direction is reversed", not same_sign)
    evidence.remark(
        "The printed series is that of +log delta; the correct one is off by "
        f"{float((correct - truth).abs().max()):.1e} at most here."
    )
    evidence.remark(
        "The final line (1 - delta) s is right. 1 - delta and -log delta always share their sign: only the "
        "mixture over samples turns."
    )


@claim(
    "C15",
    "T",
    "From Estimation to Optimization",
    "The variance of the coefficient 1 - delta is the chi-squared divergence chi^2(ref || pi).",
)
def chi_squared(evidence: Evidence) -> None:
    setting = worked()
    delta, weights = (-setting.kappa[:, 0]).exp(), setting.probabilities
    reference = setting.reference.probabilities()
    spread = evidence.number("categorical: Var(1 - delta)", variance(weights, 1 - delta), "1.2083")
    divergence = evidence.headline("categorical: chi^2(ref || pi)", (reference**2 / weights).sum() - 1, "1.2083")
    evidence.stated("equal", abs(spread - divergence) < EXACT)
    gaps = []
    for seed in range(10):
        random = Setting.random(8, 1, seed)
        ref = random.reference.probabilities()
        gaps.append(
            abs(
                variance(random.probabilities, (-random.kappa[:, 0]).exp())
                - float((ref**2 / random.probabilities).sum() - 1)
            )
        )
    evidence.number("largest difference on 10 random policies (V=8)", max(gaps))
    evidence.stated("equal on random policies", max(gaps) < 1e-10)
    evidence.remark(
        "It is the variance of the coefficient, not of the gradient vector; it is infinite in C03's Gaussians."
    )
