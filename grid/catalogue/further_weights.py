"""Weights that look at more than the ratio of a token and its advantage, and those that damp instead of cutting off."""

from __future__ import annotations

from klab.grid.catalogue.value import Value

CLIPPED = r"\operatorname{clip}(\rho_{j}, 1 - \varepsilon_{\mathrm{low}}, 1 + \varepsilon_{\mathrm{high}})"
UNCLIPPED = r"\mathbf{1}[(\rho_{j} - " + CLIPPED + r") A_{j} \le 0]"
CLIP = ("eps_low", "eps_high")

FURTHER = (
    Value(
        "dppo_tv",
        "min(ρ, truncation), 0 where A > 0 and π − π_old > tv_high, or A ≤ 0 and π − π_old < −tv_low",
        "a trust region of probabilities instead of ratios",
        "Qi et al. 2026 (DPPO); verl",
        ("tv_low", "tv_high", "truncation"),
        needs=("logp", "logp_behaviour"),
        in_family=False,
        monotone=False,
        latex=(
            r"\min(\rho_{j}, C) \mathbf{1}[(A_{j} > 0 \land \pi_{j} - \pi_{j}^{\mathrm{old}} \le "
            r"\delta_{\mathrm{high}}) \lor (A_{j} \le 0 \land \pi_{j} - \pi_{j}^{\mathrm{old}} \ge "
            r"-\delta_{\mathrm{low}})]"
        ),
    ),
    Value(
        "dppo_kl",
        "min(ρ, truncation), 0 where A > 0, π > π_old and d > kl_high, or A ≤ 0, π < π_old and d > kl_low",
        "d: KL(π_old‖π) of the two outcomes, this token or another",
        "Qi et al. 2026 (DPPO); verl",
        ("kl_low", "kl_high", "truncation"),
        needs=("logp", "logp_behaviour"),
        in_family=False,
        monotone=False,
        latex=(
            r"\min(\rho_{j}, C) \mathbf{1}[(A_{j} > 0 \land (d_{j} \le \delta_{\mathrm{high}} \lor "
            r"\pi_{j} \le \pi_{j}^{\mathrm{old}})) \lor (A_{j} \le 0 \land (d_{j} \le "
            r"\delta_{\mathrm{low}} \lor \pi_{j} \ge \pi_{j}^{\mathrm{old}}))],\quad d_{j} = "
            r"\pi_{j}^{\mathrm{old}} \log \frac{\pi_{j}^{\mathrm{old}}}{\pi_{j}} + (1 - "
            r"\pi_{j}^{\mathrm{old}}) \log \frac{1 - \pi_{j}^{\mathrm{old}} + 10^{-8}}{1 - \pi_{j} + "
            "10^{-8}}"
        ),
    ),
    Value(
        "sequence_kl_mask",
        "ppo_clip, and 0 where A < 0 and (1/H)·Σ_i −λ_i > drift",
        "off-policy sequence masking",
        "DeepSeek-AI 2025b (DeepSeek-V3.2); TRL",
        (*CLIP, "drift"),
        needs=("log_ratio", "lengths"),
        in_family=False,
        monotone=False,
        latex=(
            r"\rho_{j} "
            + UNCLIPPED
            + r" \mathbf{1}[A_{j} \ge 0 \lor -\frac{1}{H} \sum_{i=1}^{H} \lambda_{i} \le \delta]"
        ),
    ),
    Value(
        "sequence_max_mask",
        "ρ·1[max_i (e^{λ_i} − 1 − λ_i) ≤ worst]",
        "trust region masking: a trajectory with a token too far away is left out",
        "Li et al. 2025 (TRM)",
        ("worst",),
        needs=("log_ratio",),
        in_family=False,
        monotone=False,
        latex=r"\rho_{j} \mathbf{1}[\max_{i}(e^{\lambda_{i}} - 1 - \lambda_{i}) \le \delta]",
    ),
    Value(
        "second_moment_mask",
        "ρ, 0 at the largest (log ρ)² among tokens with log ρ·A > 0, until their mean is ≤ moment",
        "of equal ones the last are left out first",
        "Zheng et al. 2025c (M2PO)",
        ("moment",),
        needs=("advantage",),
        statistics="update",
        in_family=False,
        monotone=False,
        latex=(
            r"\rho_{j} \mathbf{1}[A_{j} \log \rho_{j} \le 0 \lor \operatorname{mean}_{D_{j}}((\log "
            r"\rho_{i})^{2}) \le \tau_{M_{2}}],\quad D_{j} = \{(n, i) : A_{i} \log \rho_{i} > 0 \land "
            r"\lvert \log \rho_{i} \rvert \le \lvert \log \rho_{j} \rvert\}"
        ),
    ),
    Value(
        "gamma_kernel",
        "ρ^k·e^{r·(1−ρ)}, (k, r) = (k_pos, rate_pos) where A ≥ 0 else (k_neg, rate_neg)",
        "1 at ρ = 1; with the ratio sequence_product",
        "Shen et al. 2026 (VESPO); TRL",
        ("k_pos", "rate_pos", "k_neg", "rate_neg"),
        in_family=False,
        monotone=False,
        latex=(
            r"\begin{cases} \rho_{j}^{k_{+}} e^{\nu_{+} (1 - \rho_{j})} & A_{j} \ge 0 \\ \rho_{j}^{k_{-}} "
            r"e^{\nu_{-} (1 - \rho_{j})} & A_{j} < 0 \end{cases}"
        ),
    ),
    Value(
        "tapered",
        "1 where A > 0, else min(ρ, 1)",
        "with the ratio sequence_product",
        "Le Roux et al. 2025 (TOPR)",
        in_family=True,
        monotone=True,
        latex=r"\begin{cases} 1 & A_{j} > 0 \\ \min(\rho_{j}, 1) & A_{j} \le 0 \end{cases}",
    ),
    Value(
        "future_kl",
        "ppo_clip·clip(e^{Σ_{i≥j} γ^{i−j}·λ_i}, 1, 1 + influence), γ = 2^{−1/half_life}",
        "weighs a token by where the policy has gone after it; where A < 0 and ρ > safety the factor is in [0.8, 1]",
        "Ma et al. 2026 (FIPO)",
        (*CLIP, "half_life", "influence", "safety"),
        needs=("log_ratio", "mask"),
        in_family=False,
        monotone=False,
        latex=(
            r"f_{j} \rho_{j} "
            + UNCLIPPED
            + (
                r",\quad f_{j} = \begin{cases} \operatorname{clip}(F_{j}, 0.8, 1) & A_{j} < 0 \land \rho_{j} "
                r"> C_{f} \\ F_{j} & \text{otherwise} \end{cases},\quad F_{j} = "
                r"\operatorname{clip}(\exp(\sum_{i=j}^{H} 2^{-(i - j)/h} \lambda_{i}), 1, 1 + \varepsilon_{f})"
            )
        ),
    ),
    Value(
        "clip_cov",
        "ppo_clip, and 0 at max(1, ⌊cov_share·n⌋) of the n own tokens, drawn from those with "
        "cov_low < (A − Ā)·(ℓ − ℓ̄) < cov_high that PPO does not clip",
        "Ā, ℓ̄: means over the update's own tokens; the draw is a function of the update's number and the token's",
        "Cui et al. 2025 (Clip-Cov); verl",
        (*CLIP, "cov_share", "cov_low", "cov_high"),
        needs=("advantage", "logp", "update"),
        statistics="update",
        in_family=False,
        monotone=False,
        latex=(
            r"\rho_{j} "
            + UNCLIPPED
            + (
                r" \mathbf{1}[\operatorname{draw}(\omega_{\mathrm{low}} < g_{j} \land g_{j} < \omega_{\mathrm{high}} "
                r"\land (\rho_{j} - \operatorname{clip}(\rho_{j}, 1 - \varepsilon_{\mathrm{low}}, 1 + "
                r"\varepsilon_{\mathrm{high}})) A_{j} \le 0) > \max(1, q \sum_{n=1}^{N} H_{n})],\quad "
                r"g_{j} = (A_{j} - \operatorname{mean}_{B, i}(A_{i})) (\ell_{j} - \operatorname{mean}_{B, i}(\ell_{i}))"
            )
        ),
    ),
    Value(
        "kl_cov",
        "ρ; and L += cov_penalty·agg(|λ|) over the max(1, ⌊cov_share·n⌋) own tokens of the largest (A − Ā)·(ℓ − ℓ̄)",
        "Ā, ℓ̄: means over the update's n own tokens; |λ| ≤ 1e-5 is rounding and costs nothing",
        "Cui et al. 2025 (KL-Cov); verl",
        ("cov_share", "cov_penalty"),
        needs=("advantage", "logp"),
        statistics="update",
        in_family=True,
        monotone=True,
        latex=(
            r"\rho_{j},\quad Q_{j} = \theta \lvert \lambda_{j} \rvert \mathbf{1}[\operatorname{rank}(g_{j}) \le "
            r"\max(1, q \sum_{n=1}^{N} H_{n})],\quad "
            r"g_{j} = (A_{j} - \operatorname{mean}_{B, i}(A_{i})) (\ell_{j} - \operatorname{mean}_{B, i}(\ell_{i}))"
        ),
    ),
    Value(
        "log_clip",
        "ρ, and 0 where A > 0 and log ρ > log_high·t^growth, or A < 0 and log ρ < −log_low·t^growth or "
        "> log_ceiling·t^growth",
        "t = 1 at the first own token; with the ratio prefix_product, whose log grows with √t",
        "Zhang et al. 2026 (CTPO)",
        ("log_low", "log_high", "log_ceiling", "growth"),
        needs=("positions",),
        in_family=False,
        monotone=False,
        latex=(
            r"\rho_{j} \mathbf{1}[(A_{j} \le 0 \lor \log \rho_{j} \le \varepsilon_{\mathrm{high}} j^{p}) \land (A_{j} "
            r"\ge 0 \lor (\log \rho_{j} \ge -\varepsilon_{\mathrm{low}} j^{p} \land \log \rho_{j} \le c j^{p}))]"
        ),
    ),
    Value(
        "cppo_tv",
        "ρ, and 0 where A·(ρ − 1) > 0 and d_t > min(δ, δ + b·Σ_{i<t} v_i − Σ_{i<t} d_i), d_t = v_t·|π − π_old|",
        "δ = tv_limit; v falls linearly from 1 to least_weight; b: the trajectory's 90% quantile of |π − π_old|, "
        "within budget and 2·budget",
        "Mao et al. 2026 (CPPO)",
        ("tv_limit", "least_weight", "budget"),
        needs=("logp", "logp_behaviour", "mask"),
        in_family=False,
        monotone=False,
        latex=(
            r"\rho_{j} \mathbf{1}[A_{j} (\rho_{j} - 1) \le 0 \lor d_{j} \le \min(\delta, \delta + \sum_{i=1}^{j-1} (1 "
            r"- (1 - v_{\mathrm{min}}) \frac{i - 1}{\max(H - 1, 1)}) (C_{j} - \lvert \pi_{i} - \pi_{i}^{\mathrm{old}} "
            r"\rvert))],\quad d_{j} = (1 - (1 - v_{\mathrm{min}}) \frac{j - 1}{\max(H - 1, 1)}) \lvert \pi_{j} - "
            r"\pi_{j}^{\mathrm{old}} \rvert,\quad C_{j} = \operatorname{clip}(\operatorname{quantile}_{i}(\lvert "
            r"\pi_{i} - \pi_{i}^{\mathrm{old}} \rvert, 0.9), b, 2 b)"
        ),
    ),
    Value(
        "drpo_tv",
        "ρ·(1 − sign(A)·(π − π_old)/tv_scale)",
        "the gradient of ρ·A − |A|·π_old·(ρ − 1)²/(2·tv_scale)",
        "Yao et al. 2026b (DRPO)",
        ("tv_scale",),
        needs=("logp", "logp_behaviour"),
        in_family=False,
        monotone=False,
        latex=r"\rho_{j} (1 - \operatorname{sign}(A_{j}) \frac{\pi_{j} - \pi_{j}^{\mathrm{old}}}{\delta})",
    ),
    Value(
        "tv_band",
        "ρ·1[|π − π_old| ≤ band]; and L += band_penalty·agg(λ²)",
        "",
        "prime-rl (its ipo)",
        ("band", "band_penalty"),
        needs=("logp", "logp_behaviour"),
        in_family=False,
        monotone=False,
        latex=(
            r"\rho_{j} \mathbf{1}[\lvert \pi_{j} - \pi_{j}^{\mathrm{old}} \rvert \le \delta],\quad Q_{j} = \tau "
            r"\lambda_{j}^{2}"
        ),
    ),
)
"""In the order of the axis, after the others."""
