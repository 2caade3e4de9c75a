"""Importance: the ratio of the policies, and the weight that is made of it."""

from __future__ import annotations

from klab.grid.catalogue.further_weights import CLIP, CLIPPED, FURTHER, UNCLIPPED
from klab.grid.catalogue.value import Value, axis

RATIO = axis(
    "ratio",
    "ρ",
    "importance ratio",
    "token",
    Value("none", "log ρ_j = 0", latex="0", gradient="0"),
    Value(
        "token",
        "log ρ_j = λ_j",
        "",
        "Schulman et al. 2017; Shao et al. 2024; Jiosi 2026, eq. 1",
        latex=r"\lambda_{j}",
        gradient=r"\nabla \ell_{j}",
    ),
    Value(
        "sequence_mean",
        "log ρ_j = (1/H)·Σ_i λ_i",
        "geometric mean over the trajectory",
        "Zheng et al. 2025a",
        latex=r"\frac{1}{H} \sum_{i=1}^{H} \lambda_{i}",
        gradient=r"\frac{1}{H} \sum_{i=1}^{H} \nabla \ell_{i}",
    ),
    Value(
        "future_mean",
        "log ρ_j = (1/(H−j+1))·Σ_{i≥j} λ_i",
        "geometric mean over the tokens from j on",
        "Bai & Zhang 2026",
        latex=r"\frac{1}{H - j + 1} \sum_{i=j}^{H} \lambda_{i}",
        gradient=r"\frac{1}{H - j + 1} \sum_{i=j}^{H} \nabla \ell_{i}",
    ),
    Value(
        "sequence_product",
        "log ρ_j = Σ_i λ_i",
        "exact sequence importance sampling",
        "TRL (its RLOO)",
        latex=r"\sum_{i=1}^{H} \lambda_{i}",
        gradient=r"\sum_{i=1}^{H} \nabla \ell_{i}",
    ),
    Value(
        "future_product",
        "log ρ_j = Σ_{i≥j} λ_i",
        "",
        "Bai & Zhang 2026 (the 'ideal' weight)",
        latex=r"\sum_{i=j}^{H} \lambda_{i}",
        gradient=r"\sum_{i=j}^{H} \nabla \ell_{i}",
    ),
    Value(
        "prefix_product",
        "log ρ_j = Σ_{i≤j} λ_i",
        "per-decision importance sampling",
        "Precup et al. 2000",
        latex=r"\sum_{i=1}^{j} \lambda_{i}",
        gradient=r"\sum_{i=1}^{j} \nabla \ell_{i}",
    ),
    Value(
        "prefix_minimum",
        "log ρ_j = λ_j + min_{i<j} λ_i",
        "the smallest ratio before the token instead of their product",
        "Lei et al. 2026 (MinPRO)",
        latex=r"\lambda_{j} + \begin{cases} \min_{i<j} \lambda_{i} & j > 1 \\ 0 & j = 1 \end{cases}",
        gradient=(
            r"\nabla \ell_{j} + \begin{cases} \nabla \ell_{m} & j > 1 \\ 0 & j = 1 \end{cases},\quad m = "
            r"\operatorname{argmin}_{i<j} \lambda_{i}"
        ),
    ),
    Value(
        "clipped_mean",
        "log ρ_j = (1/H)·Σ_i clip_A(λ_i), clip_A the PPO-side clip of λ to [−clip_low, clip_high]",
        "geometric mean of clipped ratios; with the weight ratio and the path ratio",
        "Zhao et al. 2025 (GMPO)",
        ("clip_low", "clip_high"),
        needs=("advantage",),
        latex=(
            r"\frac{1}{H} \sum_{i=1}^{H} \begin{cases} \min(\lambda_{i}, \xi_{\mathrm{high}}) & A_{i} > 0 "
            r"\\ \max(\lambda_{i}, -\xi_{\mathrm{low}}) & A_{i} < 0 \\ 0 & A_{i} = 0 \end{cases}"
        ),
        gradient=(
            r"\frac{1}{H} \sum_{i=1}^{H} \mathbf{1}[(A_{i} > 0 \land \lambda_{i} \le \xi_{\mathrm{high}}) "
            r"\lor (A_{i} < 0 \land \lambda_{i} \ge -\xi_{\mathrm{low}})] \nabla \ell_{i}"
        ),
    ),
)

WEIGHT = axis(
    "weight",
    "w(ρ, A)",
    "weight",
    "ppo_clip",
    Value("one", "1", "", "Bai & Zhang 2026, q = 0", in_family=True, monotone=True, latex="1"),
    Value("ratio", "ρ", "", "Bai & Zhang 2026, q = 1", in_family=True, monotone=True, latex=r"\rho_{j}"),
    Value(
        "ppo_clip",
        "ρ·1[(ρ − clip(ρ, 1−ε_low, 1+ε_high))·A ≤ 0]",
        "the gradient of PPO's min(ρA, clip(ρ)A)",
        "Schulman et al. 2017; Yu et al. 2025 (clip-higher)",
        CLIP,
        in_family=False,
        monotone=False,
        latex=r"\rho_{j} " + UNCLIPPED,
    ),
    Value(
        "dual_clip",
        "ppo_clip, and 0 where A < 0 and ρ > c",
        "",
        "Ye et al. 2020; verl",
        (*CLIP, "c"),
        in_family=False,
        monotone=False,
        latex=r"\rho_{j} " + UNCLIPPED + r" \mathbf{1}[A_{j} \ge 0 \lor \rho_{j} \le c]",
    ),
    Value(
        "truncate",
        "min(ρ, cap)",
        "truncated importance sampling",
        "Bai & Zhang 2026 (upper clipping); MiniMax 2025 (CISPO); Yao et al. 2025 (TIS)",
        ("cap",),
        in_family=True,
        monotone=True,
        latex=r"\min(\rho_{j}, C)",
    ),
    Value(
        "clamp",
        "clip(ρ, 1−ε_low, 1+ε_high)",
        "",
        "verl (its CISPO)",
        CLIP,
        in_family=True,
        monotone=True,
        latex=CLIPPED,
    ),
    Value(
        "truncate_clip",
        "min(ρ, 1+ε_high)·1[PPO not clipped]",
        "another reading of upper clipping",
        "Bai & Zhang 2026",
        CLIP,
        in_family=False,
        monotone=False,
        latex=r"\min(\rho_{j}, 1 + \varepsilon_{\mathrm{high}}) " + UNCLIPPED,
    ),
    Value(
        "power",
        "ρ^q",
        "",
        "Bai & Zhang 2026 (power family)",
        ("q",),
        in_family=True,
        monotone=True,
        latex=r"\rho_{j}^{q}",
    ),
    Value(
        "mask",
        "ρ·1[low ≤ ρ ≤ high]",
        "masked importance sampling",
        "Ling Team 2025 (IcePop)",
        ("low", "high"),
        in_family=False,
        monotone=False,
        latex=r"\rho_{j} \mathbf{1}[b_{\mathrm{low}} \le \rho_{j} \le b_{\mathrm{high}}]",
    ),
    Value(
        "sigmoid",
        "4ρ·p(1−p), p = σ(τ(ρ−1)), τ = τ_pos where A > 0 else τ_neg",
        "soft gate",
        "Gao et al. 2025 (SAPO)",
        ("tau_pos", "tau_neg"),
        in_family=False,
        monotone=False,
        latex=(
            r"4 \rho_{j} p_{j} (1 - p_{j}),\quad p_{j} = \sigma(\tau_{j} (\rho_{j} - 1)),\quad \tau_{j} = "
            r"\begin{cases} \tau_{+} & A_{j} > 0 \\ \tau_{-} & A_{j} \le 0 \end{cases}"
        ),
    ),
    Value(
        "adaptive",
        "ρ^q with the largest q in [0,1] for which (Σw)²/(n·Σw²) over the update's own tokens is ≥ ess",
        "q → 1 when the policies are close, → 0 as they drift",
        "Bai & Zhang 2026 (an open question there)",
        ("ess",),
        statistics="update",
        in_family=True,
        monotone=True,
        latex=(
            r"\rho_{j}^{q},\quad q = \max\{y \in [0, 1] : \frac{(\sum_{n=1}^{N} \sum_{j=1}^{H_{n}} "
            r"\rho_{j}^{y})^{2}}{\sum_{n=1}^{N} H_{n} \cdot \sum_{n=1}^{N} \sum_{j=1}^{H_{n}} \rho_{j}^{2 "
            r"y}} \ge \eta\}"
        ),
    ),
    Value(
        "two_sided_clip",
        "ppo_clip, and 0 where ρ > δ, δ = ceiling",
        "the gradient of min(min(ρ, δ)·A, clip(ρ)·A)",
        "Prime Intellect 2025 (INTELLECT-2); TRL (delta)",
        (*CLIP, "ceiling"),
        in_family=False,
        monotone=False,
        latex=(
            r"\rho_{j} "
            + UNCLIPPED
            + (
                r" \mathbf{1}[\rho_{j} \le \delta \lor (A_{j} < 0 \land \rho_{j} \le 1 + "
                r"\varepsilon_{\mathrm{high}})]"
            )
        ),
    ),
    *FURTHER,
)
