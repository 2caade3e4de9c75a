"""Credit: the advantage of a token, how tokens are averaged, and through what the gradient runs."""

from __future__ import annotations

from klab.grid.catalogue.value import Value, axis

_MEAN = r"\operatorname{mean}_{G}(r_{1})"
_OTHERS = r"\operatorname{mean}_{G \setminus n}(r_{1})"
_SPREAD = r"\operatorname{std}_{G}(r_{1}) + \epsilon_{\mathrm{std}}"
_NORM = ("std", "eps")
ADVANTAGE = axis(
    "advantage",
    "A",
    "advantage",
    "group_norm",
    Value("raw", "r", "no baseline", "Williams 1992", latex="r_{j}"),
    Value(
        "group_norm",
        "(r − mean_G)/(std_G + eps)",
        "",
        "Shao et al. 2024 (GRPO)",
        _NORM,
        statistics="group",
        group_centred=True,
        latex=r"\frac{r_{j} - " + _MEAN + "}{" + _SPREAD + "}",
    ),
    Value(
        "group_center",
        "r − mean_G",
        "",
        "Liu et al. 2025b (Dr. GRPO)",
        statistics="group",
        group_centred=True,
        latex="r_{j} - " + _MEAN,
    ),
    Value(
        "leave_one_out",
        "r − mean of the other G−1 returns",
        "",
        "Ahmadian et al. 2024 (RLOO)",
        statistics="group",
        group_centred=True,
        latex="r_{j} - " + _OTHERS,
    ),
    Value(
        "group_center_batch_norm",
        "(r − mean_G)/(std over the batch + eps)",
        "",
        "Liu et al. 2025c (Lite-PPO)",
        _NORM,
        statistics="update",
        group_centred=True,
        latex=r"\frac{r_{j} - " + _MEAN + r"}{\operatorname{std}_{B}(r_{1}) + \epsilon_{\mathrm{std}}}",
    ),
    Value(
        "batch_norm",
        "r whitened over all own tokens of the batch",
        "",
        "Hu et al. 2025 (REINFORCE++)",
        _NORM,
        statistics="update",
        latex=(
            r"\frac{r_{j} - \operatorname{mean}_{B, i}(r_{i})}{\operatorname{std}_{B, i}(r_{i}) + "
            r"\epsilon_{\mathrm{std}}}"
        ),
    ),
    Value(
        "position_norm",
        "(r_j − μ_j)/(σ_j + eps)",
        "statistics at own position j",
        "Bai & Zhang 2026",
        _NORM,
        statistics="group",
        group_centred=True,
        latex=(
            r"\frac{r_{j} - \operatorname{mean}_{G_{j}}(r_{j})}{\operatorname{std}_{G_{j}}(r_{j}) + "
            r"\epsilon_{\mathrm{std}}}"
        ),
    ),
    Value(
        "position_center",
        "r_j − μ_j",
        "",
        "Bai & Zhang 2026, without the standard deviation",
        statistics="group",
        group_centred=True,
        latex=r"r_{j} - \operatorname{mean}_{G_{j}}(r_{j})",
    ),
    Value(
        "positive",
        "1 where R > 0, else rejected",
        "imitates accepted samples",
        "Xiong et al. 2025 (RAFT, Reinforce-Rej)",
        ("rejected",),
        latex=r"\begin{cases} 1 & R > 0 \\ a_{-} & R \le 0 \end{cases}",
    ),
    Value(
        "greedy_baseline",
        "r − R of the greedy completion of the same prompt",
        "",
        "Li et al. 2023 (ReMax)",
        needs=("greedy_rewards",),
        latex=r"r_{j} - R^{\mathrm{greedy}}",
    ),
    Value(
        "length_baseline",
        "r − Σ H·r_τ / Σ H",
        "r_τ: a trajectory's return",
        "Hao et al. 2025 (OPO)",
        statistics="group",
        group_centred=True,
        latex=r"r_{j} - \frac{\sum_{n \in G} H_{n} r_{1}}{\sum_{n \in G} H_{n}}",
    ),
    Value(
        "gae",
        "Σ_{i≥j} (γλ)^{i−j}·(reward_i + γ·V_{i+1} − V_i)",
        "generalised advantage estimation; V from a critic, or 0; `whiten: batch` takes statistics over the update",
        "Schulman et al. 2016; Ouyang et al. 2022",
        ("gamma", "lam", "whiten"),
        latex=r"\sum_{i=j}^{H} (\gamma \lambda_{\mathrm{GAE}})^{i - j} (u_{i} + \gamma V_{i+1} - V_{i})",
    ),
    Value(
        "leave_one_out_norm",
        "leave_one_out / (std_G + eps)",
        "",
        "NeMo-RL",
        _NORM,
        statistics="group",
        group_centred=True,
        latex=r"\frac{r_{j} - " + _OTHERS + "}{" + _SPREAD + "}",
    ),
    Value(
        "group_success",
        "(r − mean_G)/mean_G, 0 where mean_G ≤ 0",
        "binary rewards: towards the log-likelihood of success",
        "Tajwar et al. 2026 (MaxRL)",
        statistics="group",
        group_centred=True,
        latex=(
            r"\begin{cases} \frac{r_{j} - "
            + _MEAN
            + "}{"
            + _MEAN
            + "} & "
            + _MEAN
            + r" > 0 \\ 0 & \text{otherwise} \end{cases}"
        ),
    ),
    Value(
        "group_center_rescaled",
        "(r − mean_G)·N/N₊, N₊ the number of returns that are not 0",
        "",
        "Chu et al. 2025 (GPG); verl",
        statistics="update",
        group_centred=True,
        latex=(
            r"\frac{N}{N_{+}} (r_{j} - " + _MEAN + r"),\quad N_{+} = \max(1, \sum_{n=1}^{N} \mathbf{1}[r_{1} \ne 0])"
        ),
    ),
    Value(
        "best_of_group",
        "(r_max − r_second)/(std_G + eps) for the best of the group, else 0",
        "the gradient of the group's maximum (pass@k)",
        "Tang et al. 2025; verl",
        _NORM,
        statistics="group",
        group_centred=True,
        latex=(
            (r"\mathbf{1}[r_{1} = \max_{G}(r_{1})] \frac{\max_{G}(r_{1}) - " r"\operatorname{second}_{G}(r_{1})}{")
            + _SPREAD
            + "}"
        ),
    ),
    Value(
        "term_norm",
        "Σ_k w_k·group_norm(r_k) over the reward's terms, whitened over the batch",
        "each term counts by its weight, not by its spread",
        "Liu et al. 2026b (GDPO); TRL; verl",
        _NORM,
        needs=("reward_terms", "term_weights"),
        statistics="update",
        group_centred=True,
        latex=(
            r"\operatorname{white}(\sum_{k} \omega_{k} \frac{R_{k} - "
            r"\operatorname{mean}_{G}(R_{k})}{\operatorname{std}_{G}(R_{k}) + \epsilon_{\mathrm{std}}})"
        ),
    ),
    Value(
        "optimal_token_baseline",
        "r_j − Σ W_j·r_j / Σ W_j over the group, W_j = Σ_{i≤j} (1 − 2π_i + Σ_v π_i(v)²)",
        "the baseline of least variance; probabilities of the current policy",
        "verl (optimal_token_baseline)",
        needs=("logits", "logp"),
        statistics="group",
        latex=(
            r"r_{j} - \mathbf{1}[\lvert G_{j} \rvert > 1] \frac{\sum_{n \in G_{j}} W_{j} r_{j}}{\sum_{n "
            r"\in G_{j}} W_{j} + 10^{-8}},\quad W_{j} = \sum_{i=1}^{j} (1 - 2 \pi_{i} + \sum_{v} "
            r"\pi_{i}(v)^{2})"
        ),
    ),
)

AGGREGATION = axis(
    "aggregation",
    "agg",
    "aggregation",
    "sequence_mean",
    Value(
        "sequence_mean",
        "mean over trajectories of the mean over own tokens",
        "",
        "Shao et al. 2024 (GRPO)",
        latex=r"\frac{1}{N} \sum_{n=1}^{N} \frac{1}{H_{n}} \sum_{j=1}^{H_{n}} x_{j}",
    ),
    Value(
        "token_mean",
        "mean over the update's own tokens",
        "",
        "Yu et al. 2025 (DAPO)",
        latex=r"\frac{1}{\sum_{n=1}^{N} H_{n}} \sum_{n=1}^{N} \sum_{j=1}^{H_{n}} x_{j}",
    ),
    Value(
        "constant",
        "Σ / (N·max_new_tokens)",
        "",
        "Liu et al. 2025b (Dr. GRPO)",
        latex=r"\frac{1}{N T_{\max}} \sum_{n=1}^{N} \sum_{j=1}^{H_{n}} x_{j}",
    ),
    Value(
        "sequence_sum",
        "mean over trajectories of the sum over own tokens",
        "",
        "Ahmadian et al. 2024 (RLOO)",
        latex=r"\frac{1}{N} \sum_{n=1}^{N} \sum_{j=1}^{H_{n}} x_{j}",
    ),
    Value(
        "prompt_mean",
        "mean over prompts of the mean over the own tokens of their trajectories",
        "",
        "Khatri et al. 2025 (ScaleRL)",
        latex=r"\frac{1}{P} \sum_{G} \frac{1}{\sum_{n \in G} H_{n}} \sum_{n \in G} \sum_{j=1}^{H_{n}} x_{j}",
    ),
)

PATH = axis(
    "path",
    "∇",
    "gradient path",
    "score",
    Value(
        "score",
        "surrogate w·A·ℓ",
        "gradient w·A·∇ℓ",
        "Williams 1992",
        latex=r"s_{j} = \ell_{j}",
        gradient=r"\nabla \ell_{j}",
    ),
    Value(
        "ratio",
        "surrogate w·A·log ρ",
        "gradient through every token that enters ρ",
        "Zheng et al. 2025a (GSPO)",
        latex=r"s_{j} = \log \rho_{j}",
        gradient=r"\nabla \log \rho_{j}",
    ),
)
