"""The KL term: how a token's divergence is estimated, which divergence it is, and where it enters."""

from __future__ import annotations

from klab.grid.catalogue.value import Value, axis

ESTIMATOR = axis(
    "estimator",
    "φ(κ)",
    "KL estimator",
    "k3",
    Value(
        "k1", "κ", "unbiased value, high variance", "Schulman 2020", latex=r"\kappa_{j}", gradient=r"\nabla \ell_{j}"
    ),
    Value(
        "k2",
        "κ²/2",
        "gradient κ·∇ℓ",
        "Schulman 2020",
        latex=r"\frac{1}{2} \kappa_{j}^{2}",
        gradient=r"\kappa_{j} \nabla \ell_{j}",
    ),
    Value(
        "k3",
        "e^{−κ} − 1 + κ",
        "gradient (1 − e^{−κ})·∇ℓ",
        "Schulman 2020; Shao et al. 2024",
        latex=r"e^{-\kappa_{j}} - 1 + \kappa_{j}",
        gradient=r"(1 - e^{-\kappa_{j}}) \nabla \ell_{j}",
    ),
    Value(
        "abs",
        "|κ|",
        "",
        "verl",
        latex=r"\lvert \kappa_{j} \rvert",
        gradient=r"\operatorname{sign}(\kappa_{j}) \nabla \ell_{j}",
    ),
    Value(
        "k3_plus",
        "value of k3, gradient of k2",
        "straight-through estimator",
        "verl (k3+)",
        latex=(
            r"\operatorname{sg}[e^{-\kappa_{j}} - 1 + \kappa_{j} - \frac{1}{2} \kappa_{j}^{2}] + "
            r"\frac{1}{2} \kappa_{j}^{2}"
        ),
        gradient=r"\kappa_{j} \nabla \ell_{j}",
    ),
    Value(
        "full",
        "Σ_v π(v)·(log π(v) − log π_ref(v))",
        "exact conditional KL at each own token (Rao-Blackwell); gradient through the logits",
        "Amini et al. 2025",
        needs=("logits", "logits_reference"),
        latex=r"\sum_{v} \pi_{j}(v) \log \frac{\pi_{j}(v)}{\pi_{j}^{\mathrm{ref}}(v)}",
        gradient=r"\sum_{v} \pi_{j}(v) \log \frac{\pi_{j}(v)}{\pi_{j}^{\mathrm{ref}}(v)} \nabla \log \pi_{j}(v)",
    ),
    Value(
        "reinforce",
        "f(δ) − δ·f′(δ) + f′(1)",
        "what multiplies ∇ℓ in the divergence's own gradient, for the placement advantage; k1 of reverse KL",
        "Zhang et al. 2025 (RPG)",
        latex=r"\kappa_{j}",
        gradient=r"\nabla \ell_{j}",
    ),
)


def _estimates(k1: str, k3: str, full: str, reinforce: str, *slopes: str) -> dict[str, tuple[str, str]]:
    """The estimators of a divergence with their gradients.

    Args:
        slopes: what multiplies ∇ℓ in the gradients of k1, k3 and reinforce, and the gradient of full.
    """
    score = r"\nabla \ell_{j}"
    plus = rf"\operatorname{{sg}}[{k3} - \frac{{1}}{{2}} \kappa_{{j}}^{{2}}] + \frac{{1}}{{2}} \kappa_{{j}}^{{2}}"
    return {
        "k1": (k1, f"{slopes[0]} {score}"),
        "k3": (k3, f"{slopes[1]} {score}"),
        "k3_plus": (plus, rf"\kappa_{{j}} {score}"),
        "full": (full, slopes[3]),
        "reinforce": (reinforce, f"{slopes[2]} {score}"),
    }


_RATIO = r"\frac{\pi_{j}(v)}{\pi_{j}^{\mathrm{ref}}(v)}"
_MIXED = r"(\pi_{j}(v))^{\alpha} (\pi_{j}^{\mathrm{ref}}(v))^{1 - \alpha}"
_SCORES = r"\nabla \log \pi_{j}(v)"
_JEFFREYS = r"\frac{1}{2} \kappa_{j} (1 - e^{-\kappa_{j}})"
_ALPHA = r"\frac{e^{(\alpha - 1) \kappa_{j}} - 1}{\alpha (\alpha - 1)}"

DIVERGENCE = axis(
    "divergence",
    "f(δ)",
    "divergence",
    "reverse",
    Value(
        "reverse",
        "−log δ",
        "KL(π‖π_ref); k1 is κ, k3 is the unnormalised reverse KL",
        "Schulman 2020",
        latex=r"\kappa_{j}",
    ),
    Value(
        "forward",
        "δ·log δ",
        "KL(π_ref‖π); k1 is −κ·e^{−κ}, k3 is the unnormalised forward KL 1 − (1 + κ)·e^{−κ}",
        "Zhang et al. 2025 (RPG)",
        latex=r"-\kappa_{j} e^{-\kappa_{j}}",
        estimates=_estimates(
            r"-\kappa_{j} e^{-\kappa_{j}}",
            r"1 - (1 + \kappa_{j}) e^{-\kappa_{j}}",
            r"\sum_{v} \pi_{j}^{\mathrm{ref}}(v) \log \frac{\pi_{j}^{\mathrm{ref}}(v)}{\pi_{j}(v)}",
            r"1 - e^{-\kappa_{j}}",
            r"(\kappa_{j} - 1) e^{-\kappa_{j}}",
            r"\kappa_{j} e^{-\kappa_{j}}",
            r"e^{-\kappa_{j}}",
            rf"-\sum_{{v}} \pi_{{j}}^{{\mathrm{{ref}}}}(v) {_SCORES}",
        ),
    ),
    Value(
        "jeffreys",
        "½·(δ − 1)·log δ",
        "half the sum of both KLs; k1 and k3 are the same",
        "Jeffreys 1946; Zhang et al. 2025 (RPG)",
        latex=_JEFFREYS,
        estimates=_estimates(
            _JEFFREYS,
            _JEFFREYS,
            rf"\frac{{1}}{{2}} \sum_{{v}} (\pi_{{j}}(v) - \pi_{{j}}^{{\mathrm{{ref}}}}(v)) \log {_RATIO}",
            r"\frac{1}{2} (\kappa_{j} + 1 - e^{-\kappa_{j}})",
            r"\frac{1}{2} (1 - (1 - \kappa_{j}) e^{-\kappa_{j}})",
            r"\frac{1}{2} (1 - (1 - \kappa_{j}) e^{-\kappa_{j}})",
            r"\frac{1}{2} (1 + e^{-\kappa_{j}})",
            rf"\frac{{1}}{{2}} \sum_{{v}} (\pi_{{j}}(v) \log {_RATIO} - \pi_{{j}}^{{\mathrm{{ref}}}}(v)) {_SCORES}",
        ),
    ),
    Value(
        "alpha",
        "(δ^{1−α} − 1)/(α·(α − 1))",
        "reverse KL as α → 1, forward KL as α → 0, 4·(1 − Σ√(π·π_ref)) at ½, half of Pearson's χ²(π‖π_ref) at 2",
        "Cressie & Read 1984",
        ("alpha",),
        latex=_ALPHA,
        estimates=_estimates(
            _ALPHA,
            _ALPHA + r" + \frac{e^{-\kappa_{j}} - 1}{\alpha}",
            rf"\frac{{1}}{{\alpha (\alpha - 1)}} (\sum_{{v}} {_MIXED} - 1)",
            r"\frac{e^{(\alpha - 1) \kappa_{j}} - 1}{\alpha - 1}",
            r"\frac{1}{\alpha} e^{(\alpha - 1) \kappa_{j}}",
            r"\frac{1}{\alpha} (e^{(\alpha - 1) \kappa_{j}} - e^{-\kappa_{j}})",
            r"e^{(\alpha - 1) \kappa_{j}}",
            rf"\frac{{1}}{{\alpha - 1}} \sum_{{v}} {_MIXED} {_SCORES}",
        ),
    ),
)

_DETACHED = ("beta", "kl_at")
_IN_RETURN = ("beta", "kl_scale", "kl_at")
PLACEMENT = axis(
    "placement",
    "β·φ",
    "KL placement",
    "loss",
    Value("none", "no KL term", latex="K_{j} = 0", gradient="0"),
    Value(
        "reward",
        "r_j = R − β·c·Σ_i φ_i, before the baseline",
        "",
        "Ahmadian et al. 2024; From Estimation to Optimization ('in reward')",
        _IN_RETURN,
        latex=r"r_{j} = R - \beta c \sum_{i=1}^{H} \varphi_{i},\quad u_{j} = \mathbf{1}[j = H] r_{1}",
        gradient="0",
    ),
    Value(
        "reward_to_go",
        "r_j = R − β·c·Σ_{i≥j} φ_i, before the baseline",
        "the return of per-token KL penalties: GAE with γ = λ = 1 and V = 0",
        "Bai & Zhang 2026 (token-level reward); Ouyang et al. 2022",
        _IN_RETURN,
        latex=(
            r"r_{j} = R - \beta c \sum_{i=j}^{H} \varphi_{i},\quad u_{j} = \mathbf{1}[j = H] R - \beta c "
            r"\varphi_{j}"
        ),
        gradient="0",
    ),
    Value(
        "advantage",
        "A_j ← A_j − β·φ_j, after normalisation",
        "",
        "From Estimation to Optimization (combined form)",
        _DETACHED,
        latex=r"A_{j} = a_{j} - \beta \varphi_{j}",
        gradient="0",
    ),
    Value(
        "advantage_to_go",
        "A_j ← A_j − β·Σ_{i≥j} φ_i, after normalisation",
        "",
        "OpenRLHF",
        _DETACHED,
        latex=r"A_{j} = a_{j} - \beta \sum_{i=j}^{H} \varphi_{i}",
        gradient="0",
    ),
    Value(
        "loss",
        "L += β·agg(φ), differentiated",
        "",
        "Shao et al. 2024; From Estimation to Optimization ('as loss')",
        ("beta",),
        latex=r"K_{j} = \beta \varphi_{j}",
        gradient=r"\beta \nabla \varphi_{j}",
    ),
    Value(
        "loss_reweighted",
        "L += β·agg(sg(ρ)·φ)",
        "loss_corrected with the ratio detached",
        "",
        ("beta",),
        latex=r"K_{j} = \beta \operatorname{sg}[\rho_{j}] \varphi_{j}",
        gradient=r"\beta \rho_{j} \nabla \varphi_{j}",
    ),
    Value(
        "loss_corrected",
        "L += β·agg(ρ·φ), ρ differentiated",
        "importance-corrected off-policy",
        "Jiosi 2026; DeepSeek-AI 2025b; TRL ≥ 1.16",
        ("beta",),
        latex=r"K_{j} = \beta \rho_{j} \varphi_{j}",
        gradient=r"\beta \rho_{j} (\nabla \varphi_{j} + \varphi_{j} \nabla \log \rho_{j})",
    ),
    Value(
        "reward_and_loss",
        "reward_to_go with sg(φ), plus loss",
        "exact gradient of E[φ]",
        "Shah et al. 2025",
        _IN_RETURN,
        latex=(
            r"r_{j} = R - \beta c \sum_{i=j}^{H} \varphi_{i},\quad u_{j} = \mathbf{1}[j = H] R - \beta c "
            r"\varphi_{j},\quad K_{j} = \beta \varphi_{j}"
        ),
        gradient=r"\beta \nabla \varphi_{j}",
    ),
    Value(
        "advantage_and_loss",
        "advantage_to_go with sg(φ), plus loss",
        "exact gradient of E[φ] beside any normalisation of the reward, for every divergence",
        "Yao et al. 2026a (theorem 4.1)",
        _DETACHED,
        latex=r"A_{j} = a_{j} - \beta \sum_{i=j}^{H} \varphi_{i},\quad K_{j} = \beta \varphi_{j}",
        gradient=r"\beta \nabla \varphi_{j}",
    ),
    Value(
        "log_ratio",
        "ℓ in the surrogate is replaced by κ",
        "same gradient as none",
        "GRPO and Log-Ratio-Based Regularization",
        latex=r"K_{j} = 0,\quad s_{j} = \kappa_{j}",
        gradient="0",
    ),
)
