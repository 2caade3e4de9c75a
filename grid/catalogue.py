"""The catalogue: every axis of the objective and every value, with formula, parameters and source.

Validation, ``klab axes``, the report's legend and the documentation all read this one table. The symbols are those of
`klab.grid.glossary`, the sources those of `klab.grid.sources`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

from klab.grid.errors import UserError
from klab.grid.parameters import PARAMETERS, Parameter
from klab.grid.user_code import names_user_code

__all__ = ["AXES", "PARAMETERS", "Axis", "Parameter", "Value", "value_of"]


@dataclass(frozen=True, slots=True)
class Value:
    """One value of an axis.

    Attributes:
        name: what a grid file writes.
        formula: in the symbols of the glossary.
        note: what is worth knowing about it.
        source: citations, by the labels of `klab.grid.sources`.
        parameters: names of the parameters it takes, see `PARAMETERS`.
        needs: fields of a `TokenBatch` that it reads and that are not always there: ``logits`` and
            ``logits_reference`` (those of the whole vocabulary), ``greedy_rewards``.
        statistics: how much of an update one token's term depends on: its own ``trajectory``, its ``group``, or the
            whole ``update``.
        group_centred: of an advantage: whether it compares with the trajectory's own group, so that the reward cancels
            in a group of one.
        in_family: of a weight: whether min(ρ, 1) ≤ w ≤ max(ρ, 1) for every ρ and A (the family of Bai & Zhang 2026).
        monotone: of a weight: whether w is non-decreasing in ρ.
    """

    name: str
    formula: str
    note: str = ""
    source: str = ""
    parameters: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    statistics: Literal["trajectory", "group", "update"] = "trajectory"
    group_centred: bool = False
    in_family: bool | None = None
    monotone: bool | None = None


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis of the objective: its symbol, its default and its values by name."""

    name: str
    symbol: str
    title: str
    default: str
    values: Mapping[str, Value] = field(repr=False)


def _axis(name: str, symbol: str, title: str, default: str, *values: Value) -> Axis:
    return Axis(name, symbol, title, default, MappingProxyType({value.name: value for value in values}))


_ESTIMATOR = _axis(
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
_PLACEMENT = _axis(
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

_RATIO = _axis(
    "ratio",
    "ρ",
    "importance ratio",
    "token",
    Value("none", "log ρ_j = 0"),
    Value("token", "log ρ_j = λ_j", "", "Schulman et al. 2017; Shao et al. 2024; Jiosi 2026, eq. 1"),
    Value("sequence_mean", "log ρ_j = (1/H)·Σ_i λ_i", "geometric mean over the trajectory", "Zheng et al. 2025a"),
    Value(
        "future_mean",
        "log ρ_j = (1/(H−j+1))·Σ_{i≥j} λ_i",
        "geometric mean over the tokens from j on",
        "Bai & Zhang 2026",
    ),
    Value("sequence_product", "log ρ_j = Σ_i λ_i", "exact sequence importance sampling", "TRL (its RLOO)"),
    Value("future_product", "log ρ_j = Σ_{i≥j} λ_i", "", "Bai & Zhang 2026 (the 'ideal' weight)"),
    Value("prefix_product", "log ρ_j = Σ_{i≤j} λ_i", "per-decision importance sampling", "Precup et al. 2000"),
)

_CLIP = ("eps_low", "eps_high")
_WEIGHT = _axis(
    "weight",
    "w(ρ, A)",
    "weight",
    "ppo_clip",
    Value("one", "1", "", "Bai & Zhang 2026, q = 0", in_family=True, monotone=True),
    Value("ratio", "ρ", "", "Bai & Zhang 2026, q = 1", in_family=True, monotone=True),
    Value(
        "ppo_clip",
        "ρ·1[(ρ − clip(ρ, 1−ε_low, 1+ε_high))·A ≤ 0]",
        "the gradient of PPO's min(ρA, clip(ρ)A)",
        "Schulman et al. 2017; Yu et al. 2025 (clip-higher)",
        _CLIP,
        in_family=False,
        monotone=False,
    ),
    Value(
        "dual_clip",
        "ppo_clip, and 0 where A < 0 and ρ > c",
        "",
        "Ye et al. 2020; verl",
        (*_CLIP, "c"),
        in_family=False,
        monotone=False,
    ),
    Value(
        "truncate",
        "min(ρ, cap)",
        "truncated importance sampling",
        "Bai & Zhang 2026 (upper clipping); MiniMax 2025 (CISPO); Yao et al. 2025 (TIS)",
        ("cap",),
        in_family=True,
        monotone=True,
    ),
    Value("clamp", "clip(ρ, 1−ε_low, 1+ε_high)", "", "verl (its CISPO)", _CLIP, in_family=True, monotone=True),
    Value(
        "truncate_clip",
        "min(ρ, 1+ε_high)·1[PPO not clipped]",
        "another reading of upper clipping",
        "Bai & Zhang 2026",
        _CLIP,
        in_family=False,
        monotone=False,
    ),
    Value("power", "ρ^q", "", "Bai & Zhang 2026 (power family)", ("q",), in_family=True, monotone=True),
    Value(
        "mask",
        "ρ·1[low ≤ ρ ≤ high]",
        "masked importance sampling",
        "Ling Team 2025 (IcePop)",
        ("low", "high"),
        in_family=False,
        monotone=False,
    ),
    Value(
        "sigmoid",
        "4ρ·p(1−p), p = σ(τ(ρ−1)), τ = τ_pos where A > 0 else τ_neg",
        "soft gate",
        "Gao et al. 2025 (SAPO)",
        ("tau_pos", "tau_neg"),
        in_family=False,
        monotone=False,
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
    ),
)

_NORM = ("std", "eps")
_ADVANTAGE = _axis(
    "advantage",
    "A",
    "advantage",
    "group_norm",
    Value("raw", "r", "no baseline", "Williams 1992"),
    Value(
        "group_norm",
        "(r − mean_G)/(std_G + eps)",
        "",
        "Shao et al. 2024 (GRPO)",
        _NORM,
        statistics="group",
        group_centred=True,
    ),
    Value("group_center", "r − mean_G", "", "Liu et al. 2025b (Dr. GRPO)", statistics="group", group_centred=True),
    Value(
        "leave_one_out",
        "r − mean of the other G−1 returns",
        "",
        "Ahmadian et al. 2024 (RLOO)",
        statistics="group",
        group_centred=True,
    ),
    Value(
        "group_center_batch_norm",
        "(r − mean_G)/(std over the batch + eps)",
        "",
        "Liu et al. 2025c (Lite-PPO)",
        _NORM,
        statistics="update",
        group_centred=True,
    ),
    Value(
        "batch_norm",
        "r whitened over all own tokens of the batch",
        "",
        "Hu et al. 2025 (REINFORCE++)",
        _NORM,
        statistics="update",
    ),
    Value(
        "position_norm",
        "(r_j − μ_j)/(σ_j + eps)",
        "statistics at own position j",
        "Bai & Zhang 2026",
        _NORM,
        statistics="group",
        group_centred=True,
    ),
    Value(
        "position_center",
        "r_j − μ_j",
        "",
        "Bai & Zhang 2026, without the standard deviation",
        statistics="group",
        group_centred=True,
    ),
    Value(
        "positive",
        "1 where R > 0, else rejected",
        "imitates accepted samples",
        "Xiong et al. 2025 (RAFT, Reinforce-Rej)",
        ("rejected",),
    ),
    Value(
        "greedy_baseline",
        "r − R of the greedy completion of the same prompt",
        "",
        "Li et al. 2023 (ReMax)",
        needs=("greedy_rewards",),
    ),
    Value(
        "length_baseline",
        "r − Σ H·r_τ / Σ H",
        "r_τ: a trajectory's return",
        "Hao et al. 2025 (OPO)",
        statistics="group",
        group_centred=True,
    ),
    Value(
        "gae",
        "Σ_{i≥j} (γλ)^{i−j}·(reward_i + γ·V_{i+1} − V_i)",
        "generalised advantage estimation; V from a critic, or 0; `whiten: batch` takes statistics over the update",
        "Schulman et al. 2016; Ouyang et al. 2022",
        ("gamma", "lam", "whiten"),
    ),
)

_AGGREGATION = _axis(
    "aggregation",
    "agg",
    "aggregation",
    "sequence_mean",
    Value("sequence_mean", "mean over trajectories of the mean over own tokens", "", "Shao et al. 2024 (GRPO)"),
    Value("token_mean", "mean over the update's own tokens", "", "Yu et al. 2025 (DAPO)"),
    Value("constant", "Σ / (N·max_new_tokens)", "", "Liu et al. 2025b (Dr. GRPO)"),
    Value("sequence_sum", "mean over trajectories of the sum over own tokens", "", "Ahmadian et al. 2024 (RLOO)"),
)

_PATH = _axis(
    "path",
    "∇",
    "gradient path",
    "score",
    Value("score", "surrogate w·A·ℓ", "gradient w·A·∇ℓ", "Williams 1992"),
    Value(
        "ratio",
        "surrogate w·A·log ρ",
        "gradient through every token that enters ρ",
        "Zheng et al. 2025a (GSPO)",
    ),
)

AXES: Mapping[str, Axis] = MappingProxyType(
    {axis.name: axis for axis in (_ESTIMATOR, _PLACEMENT, _RATIO, _WEIGHT, _ADVANTAGE, _AGGREGATION, _PATH)}
)
"""The seven axes of the objective in the order of its composition."""


def value_of(axis: str, name: object) -> Value:
    """The catalogue's entry of an axis value; an import path gives an entry without parameters.

    Raises:
        UserError: for an unknown value, naming the nearest.
    """
    values = AXES[axis].values
    if isinstance(name, str) and name in values:
        return values[name]
    if names_user_code(name):
        return Value(str(name), f"{name}(…)", "custom", str(name))
    raise UserError(f"unknown {AXES[axis].title}", key=axis, value=name, allowed=values)
