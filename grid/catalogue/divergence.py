"""The KL term: how a token's divergence is estimated, and where it enters."""

from __future__ import annotations

from klab.grid.catalogue.value import Value, axis

ESTIMATOR = axis(
    "estimator",
    "φ(κ)",
    "KL estimator",
    "k3",
    Value("k1", "κ", "unbiased value, high variance", "Schulman 2020"),
    Value("k2", "κ²/2", "gradient κ·∇ℓ", "Schulman 2020"),
    Value("k3", "e^{−κ} − 1 + κ", "gradient (1 − e^{−κ})·∇ℓ", "Schulman 2020; Shao et al. 2024"),
    Value("abs", "|κ|", "", "verl"),
    Value("k3_plus", "value of k3, gradient of k2", "straight-through estimator", "verl (k3+)"),
    Value(
        "full",
        "Σ_v π(v)·(log π(v) − log π_ref(v))",
        "exact conditional KL at each own token (Rao-Blackwell); gradient through the logits",
        "Amini et al. 2025",
        needs=("logits", "logits_reference"),
    ),
)

_DETACHED = ("beta", "kl_at")
_IN_RETURN = ("beta", "kl_scale", "kl_at")
PLACEMENT = axis(
    "placement",
    "β·φ",
    "KL placement",
    "loss",
    Value("none", "no KL term"),
    Value(
        "reward",
        "r_j = R − β·c·Σ_i φ_i, before the baseline",
        "",
        "Ahmadian et al. 2024; From Estimation to Optimization ('in reward')",
        _IN_RETURN,
    ),
    Value(
        "reward_to_go",
        "r_j = R − β·c·Σ_{i≥j} φ_i, before the baseline",
        "the return of per-token KL penalties: GAE with γ = λ = 1 and V = 0",
        "Bai & Zhang 2026 (token-level reward); Ouyang et al. 2022",
        _IN_RETURN,
    ),
    Value(
        "advantage",
        "A_j ← A_j − β·φ_j, after normalisation",
        "",
        "From Estimation to Optimization (combined form)",
        _DETACHED,
    ),
    Value("advantage_to_go", "A_j ← A_j − β·Σ_{i≥j} φ_i, after normalisation", "", "OpenRLHF", _DETACHED),
    Value(
        "loss",
        "L += β·agg(φ), differentiated",
        "",
        "Shao et al. 2024; From Estimation to Optimization ('as loss')",
        ("beta",),
    ),
    Value("loss_reweighted", "L += β·agg(sg(ρ)·φ)", "loss_corrected with the ratio detached", "", ("beta",)),
    Value(
        "loss_corrected",
        "L += β·agg(ρ·φ), ρ differentiated",
        "importance-corrected off-policy",
        "Jiosi 2026; DeepSeek-AI 2025b; TRL ≥ 1.16",
        ("beta",),
    ),
    Value(
        "reward_and_loss",
        "reward_to_go with sg(φ), plus loss",
        "exact gradient of E[φ]",
        "Shah et al. 2025",
        _IN_RETURN,
    ),
    Value(
        "log_ratio",
        "ℓ in the surrogate is replaced by κ",
        "same gradient as none",
        "GRPO and Log-Ratio-Based Regularization",
    ),
)
