"""The catalogue: every axis of the objective, every value, every parameter, with formula and source.

Validation, ``klab axes``, the report's legend and the documentation all read this one table. Symbols (``[N, T]`` unless
said otherwise): ℓ, ℓ_old, ℓ_ref are the log-probabilities of the sampled token under the current, the behaviour and the
reference policy; κ = ℓ − ℓ_ref; λ = ℓ − ℓ_old; φ is the KL estimator's per-token value; H the number of a trajectory's
own tokens; R the task reward; A the advantage; sg stops the gradient. Sources S0…S4 are the documents that klab was
built from.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from klab.grid.errors import UserError


@dataclass(frozen=True, slots=True)
class Parameter:
    """A number or a choice that some axis values use.

    ``low`` and ``high`` are inclusive bounds unless ``open_low``; ``choices`` is set for words instead of numbers.
    """

    name: str
    default: float | str
    meaning: str
    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    choices: tuple[str, ...] = ()

    def validate(self, value: object) -> float | str:
        """``value`` as this parameter's type.

        Raises:
            UserError: when the type or the range is wrong.
        """
        if self.choices:
            if value not in self.choices:
                raise UserError("unknown value", key=self.name, value=value, allowed=self.choices)
            return str(value)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError("not a number", key=self.name, value=value)
        number = float(value)
        below = number <= self.low if self.open_low else number < self.low
        if math.isnan(number) or below or number > self.high or number == -math.inf:
            raise UserError(f"out of range, {self.range}", key=self.name, value=value)
        return number

    @property
    def range(self) -> str:
        """The valid range in words."""
        if self.choices:
            return " | ".join(self.choices)
        lower = f"{'>' if self.open_low else '≥'} {self.low:g}" if self.low > -math.inf else ""
        upper = f"≤ {self.high:g}" if self.high < math.inf else ""
        return " and ".join(bound for bound in (lower, upper) if bound) or "any number"


@dataclass(frozen=True, slots=True)
class Value:
    """One value of an axis.

    Weights also state two properties that tests check: ``in_family``, whether min(ρ,1) ≤ w ≤ max(ρ,1) for every ρ and A
    (S1's family), and ``monotone``, whether w is non-decreasing in ρ.
    """

    name: str
    formula: str
    note: str = ""
    source: str = ""
    parameters: tuple[str, ...] = ()
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


PARAMETERS: Mapping[str, Parameter] = MappingProxyType(
    {
        parameter.name: parameter
        for parameter in (
            Parameter("beta", 0.04, "coefficient β of the KL term", low=0.0),
            Parameter("eps_low", 0.2, "lower clipping width: ratios below 1 − ε_low are clipped", low=0.0),
            Parameter("eps_high", 0.2, "upper clipping width: ratios above 1 + ε_high are clipped", low=0.0),
            Parameter("q", 0.5, "exponent of the ratio", low=0.0, high=1.0),
            Parameter("cap", 1.2, "largest weight", low=1.0),
            Parameter("c", 3.0, "dual clip: with A < 0, ratios above c get weight 0", low=1.0),
            Parameter("low", 0.5, "smallest ratio that is kept", low=0.0),
            Parameter("high", 2.0, "largest ratio that is kept", low=0.0),
            Parameter("tau_pos", 1.0, "temperature of the soft gate where A > 0", low=0.0, open_low=True),
            Parameter("tau_neg", 1.05, "temperature of the soft gate where A ≤ 0", low=0.0, open_low=True),
            Parameter("ess", 0.9, "target effective sample size, as a share", low=0.0, high=1.0, open_low=True),
            Parameter("gamma", 1.0, "discount of the per-token rewards", low=0.0, high=1.0),
            Parameter("lam", 1.0, "λ of generalised advantage estimation", low=0.0, high=1.0),
            Parameter(
                "whiten",
                "none",
                "the estimated advantages as they are (none), or with mean 0 and variance 1 over the update (batch)",
                choices=("none", "batch"),
            ),
            Parameter(
                "rejected",
                0.0,
                "advantage where R ≤ 0: 0 imitates only (RAFT), −1 is REINFORCE on ±1",
                low=-1.0,
                high=0.0,
            ),
            Parameter("std", "population", "divisor of the variance: n or n − 1", choices=("population", "sample")),
            Parameter("eps", 1e-6, "added to the standard deviation", low=0.0),
            Parameter(
                "kl_scale",
                "mean",
                "c of a KL inside the returns: 1/H (mean, S1) or 1 (sum, InstructGPT)",
                choices=("mean", "sum"),
            ),
            Parameter(
                "kl_at",
                "rollout",
                "where a detached KL is taken: at the behaviour policy (rollout, S2) or the current one (current, S1)",
                choices=("rollout", "current"),
            ),
        )
    }
)

_ESTIMATOR = _axis(
    "estimator",
    "φ(κ)",
    "KL estimator",
    "k3",
    Value("k1", "κ", "unbiased value, high variance", "Schulman 2020"),
    Value("k2", "κ²/2", "gradient κ·∇ℓ", "Schulman 2020"),
    Value("k3", "e^{−κ} − 1 + κ", "gradient (1 − e^{−κ})·∇ℓ", "Schulman 2020; S0"),
    Value("abs", "|κ|", "", "verl"),
    Value("k3_plus", "value of k3, gradient of k2", "straight-through", "verl k3+"),
    Value(
        "full",
        "Σ_v π(v)·(log π(v) − log π_ref(v))",
        "exact conditional KL at each own position (Rao-Blackwell); gradient through the logits",
        "Amini et al. 2025",
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
    Value("reward", "r_j = R − β·c·Σ_i φ_i, before the baseline", "", "S2 'in reward'; RLOO", _IN_RETURN),
    Value(
        "reward_to_go",
        "r_j = R − β·c·Σ_{i≥j} φ_i, before the baseline",
        "",
        "S1's token-level reward; GAE(γ=λ=1, V=0)",
        _IN_RETURN,
    ),
    Value("advantage", "A_j ← A_j − β·φ_j, after normalisation", "", "S2's combined form", _DETACHED),
    Value("advantage_to_go", "A_j ← A_j − β·Σ_{i≥j} φ_i", "", "OpenRLHF", _DETACHED),
    Value("loss", "L += β·agg(φ), differentiated", "", "GRPO (S0); S2 'as loss'", ("beta",)),
    Value("loss_reweighted", "L += β·agg(sg(ρ)·φ)", "", "", ("beta",)),
    Value(
        "loss_corrected",
        "L += β·agg(ρ·φ), ρ differentiated",
        "the off-policy repair",
        "S3; DeepSeek-V3.2; TRL ≥ 1.16",
        ("beta",),
    ),
    Value("reward_and_loss", "reward_to_go with sg(φ), plus loss", "exact gradient of E[φ]", "Comedy 2025", _IN_RETURN),
    Value("log_ratio", "ℓ in the surrogate is replaced by κ", "same gradient as none", "S4"),
)

_RATIO = _axis(
    "ratio",
    "ρ",
    "importance ratio",
    "token",
    Value("none", "log ρ_j = 0"),
    Value("token", "log ρ_j = λ_j", "", "PPO, GRPO; S3 eq. 1"),
    Value("sequence_mean", "log ρ_j = (1/H)·Σ_i λ_i", "", "GSPO"),
    Value("future_mean", "log ρ_j = (1/(H−j+1))·Σ_{i≥j} λ_i", "", "S1"),
    Value("sequence_product", "log ρ_j = Σ_i λ_i", "exact sequence importance sampling", "RLOO in TRL"),
    Value("future_product", "log ρ_j = Σ_{i≥j} λ_i", "", "S1's 'ideal' weight"),
    Value("prefix_product", "log ρ_j = Σ_{i≤j} λ_i", "per-decision importance sampling", "Precup 2000"),
)

_CLIP = ("eps_low", "eps_high")
_WEIGHT = _axis(
    "weight",
    "w(ρ, A)",
    "weight",
    "ppo_clip",
    Value("one", "1", "", "S1, q = 0", (), True, True),
    Value("ratio", "ρ", "", "S1, q = 1", (), True, True),
    Value(
        "ppo_clip", "ρ·1[(ρ − clip(ρ, 1−ε_low, 1+ε_high))·A ≤ 0]", "", "PPO; DAPO's clip-higher", _CLIP, False, False
    ),
    Value(
        "dual_clip", "ppo_clip, and 0 where A < 0 and ρ > c", "", "Ye et al. 2020; verl", (*_CLIP, "c"), False, False
    ),
    Value("truncate", "min(ρ, cap)", "", "S1's upper clipping; CISPO; TIS", ("cap",), True, True),
    Value("clamp", "clip(ρ, 1−ε_low, 1+ε_high)", "", "CISPO in verl", _CLIP, True, True),
    Value("truncate_clip", "min(ρ, 1+ε_high)·1[PPO not clipped]", "S1's other reading", "S1", _CLIP, False, False),
    Value("power", "ρ^q", "", "S1", ("q",), True, True),
    Value("mask", "ρ·1[low ≤ ρ ≤ high]", "", "IcePop", ("low", "high"), False, False),
    Value(
        "sigmoid",
        "4ρ·p(1−p), p = σ(τ(ρ−1)), τ = τ_pos where A > 0 else τ_neg",
        "",
        "SAPO",
        ("tau_pos", "tau_neg"),
        False,
        False,
    ),
    Value(
        "adaptive",
        "ρ^q with the largest q in [0,1] for which (Σw)²/(n·Σw²) over the update's own tokens is ≥ ess",
        "q → 1 when the policies are close, → 0 as they drift",
        "S1's open question",
        ("ess",),
        True,
        True,
    ),
)

_NORM = ("std", "eps")
_ADVANTAGE = _axis(
    "advantage",
    "A",
    "advantage",
    "group_norm",
    Value("raw", "r", "", "REINFORCE"),
    Value("group_norm", "(r − mean_G)/(std_G + eps)", "", "GRPO", _NORM),
    Value("group_center", "r − mean_G", "", "Dr. GRPO"),
    Value("leave_one_out", "r − mean of the other G−1 returns", "", "RLOO"),
    Value("group_center_batch_norm", "(r − mean_G)/(std over the batch + eps)", "", "Lite-PPO", _NORM),
    Value("batch_norm", "r whitened over all own tokens of the batch", "", "REINFORCE++", _NORM),
    Value("position_norm", "(r_j − μ_j)/(σ_j + eps)", "statistics at own position j", "S1", _NORM),
    Value("position_center", "r_j − μ_j", "", "S1 without the standard deviation"),
    Value("positive", "1 where R > 0, else rejected", "imitate what was accepted", "RAFT", ("rejected",)),
    Value("greedy_baseline", "r − R of the greedy completion of the same prompt", "", "ReMax"),
    Value("length_baseline", "r − Σ H·R / Σ H", "", "OPO"),
    Value(
        "gae",
        "generalised advantage estimation on the per-token rewards",
        "critic, or V = 0",
        "PPO-RLHF",
        ("gamma", "lam", "whiten"),
    ),
)

_AGGREGATION = _axis(
    "aggregation",
    "agg",
    "aggregation",
    "sequence_mean",
    Value("sequence_mean", "mean over trajectories of the mean over own tokens", "", "GRPO; S1"),
    Value("token_mean", "mean over the update's own tokens", "", "DAPO"),
    Value("constant", "Σ / (N·max_new_tokens)", "", "Dr. GRPO"),
    Value("sequence_sum", "mean over trajectories of the sum over own tokens", "", "RLOO"),
)

_PATH = _axis(
    "path",
    "∇",
    "gradient path",
    "score",
    Value("score", "surrogate w·A·ℓ", "gradient w·A·∇ℓ"),
    Value("ratio", "surrogate w·A·log ρ", "gradient through every token that enters ρ", "GSPO"),
)

AXES: Mapping[str, Axis] = MappingProxyType(
    {axis.name: axis for axis in (_ESTIMATOR, _PLACEMENT, _RATIO, _WEIGHT, _ADVANTAGE, _AGGREGATION, _PATH)}
)
"""The seven axes of the objective in the order of its composition."""


def is_import_path(name: object) -> bool:
    """Whether an axis value or a task names the user's own code, as ``package.module:function``."""
    if not isinstance(name, str) or ":" not in name or name.count(":") != 1:
        return False
    module, attribute = name.split(":")
    return all(part.isidentifier() for part in module.split(".")) and attribute.isidentifier()


def value_of(axis: str, name: object) -> Value:
    """The catalogue's entry of an axis value; an import path gives an entry without parameters.

    Raises:
        UserError: for an unknown value, naming the nearest.
    """
    values = AXES[axis].values
    if isinstance(name, str) and name in values:
        return values[name]
    if is_import_path(name):
        return Value(str(name), f"{name}(…)", "custom", str(name))
    raise UserError(f"unknown {AXES[axis].title}", key=axis, value=name, allowed=values)
