"""The numbers and choices that axis values take: default, range and meaning of each, in one table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from klab.grid.errors import UserError


@dataclass(frozen=True, slots=True)
class Parameter:
    """A number, or one of some words, that an axis value takes.

    Attributes:
        name: its key in a grid file and its keyword in the value's function.
        default: what it is when the grid file does not say.
        meaning: one line for `klab axes` and the documentation.
        low, high: inclusive bounds of a number; with ``open_low`` the lower one is exclusive.
        choices: the allowed words; empty for a number.
        latex: a number's symbol in printed formulas.
    """

    name: str
    default: float | str
    meaning: str
    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    choices: tuple[str, ...] = ()
    latex: str = ""

    def validate(self, value: object) -> float | str:
        """``value`` in this parameter's type.

        Raises:
            UserError: for a wrong type or a value out of range.
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
        """The valid values in words: ``≥ 0 and ≤ 1``, or ``mean | sum``."""
        if self.choices:
            return " | ".join(self.choices)
        lower = f"{'>' if self.open_low else '≥'} {self.low:g}" if self.low > -math.inf else ""
        upper = f"≤ {self.high:g}" if self.high < math.inf else ""
        return " and ".join(bound for bound in (lower, upper) if bound) or "any number"


_ALL = (
    Parameter("beta", 0.04, "coefficient β of the KL term", low=0.0, latex=r"\beta"),
    Parameter(
        "alpha",
        0.5,
        "order α of the divergence; 1 is reverse KL, and forward KL is its limit at 0",
        low=0.05,
        latex=r"\alpha",
    ),
    Parameter(
        "eps_low",
        0.2,
        "lower clipping width ε_low: ratios below 1 − ε_low are clipped",
        low=0.0,
        latex=r"\varepsilon_{\mathrm{low}}",
    ),
    Parameter(
        "eps_high",
        0.2,
        "upper clipping width ε_high: ratios above 1 + ε_high are clipped",
        low=0.0,
        latex=r"\varepsilon_{\mathrm{high}}",
    ),
    Parameter("q", 0.5, "exponent of the ratio", low=0.0, high=1.0, latex="q"),
    Parameter("cap", 1.2, "largest weight", low=1.0, latex="C"),
    Parameter("c", 3.0, "dual clip: where A < 0, ratios above c get weight 0", low=1.0, latex="c"),
    Parameter("low", 0.5, "smallest ratio that is kept", low=0.0, latex=r"b_{\mathrm{low}}"),
    Parameter("high", 2.0, "largest ratio that is kept", low=0.0, latex=r"b_{\mathrm{high}}"),
    Parameter("tau_pos", 1.0, "temperature of the sigmoid gate where A > 0", low=0.0, open_low=True, latex=r"\tau_{+}"),
    Parameter(
        "tau_neg", 1.05, "temperature of the sigmoid gate where A ≤ 0", low=0.0, open_low=True, latex=r"\tau_{-}"
    ),
    Parameter(
        "ess",
        0.9,
        "target effective sample size, as a share of the own tokens",
        low=0.0,
        high=1.0,
        open_low=True,
        latex=r"\eta",
    ),
    Parameter("gamma", 1.0, "discount factor γ of the per-token rewards", low=0.0, high=1.0, latex=r"\gamma"),
    Parameter("lam", 1.0, "λ of generalised advantage estimation", low=0.0, high=1.0, latex=r"\lambda_{\mathrm{GAE}}"),
    Parameter(
        "whiten",
        "none",
        "whether GAE's advantages are standardised over the update to mean 0 and variance 1 (batch) or not (none)",
        choices=("none", "batch"),
    ),
    Parameter(
        "rejected",
        0.0,
        "advantage where R ≤ 0: 0 imitates accepted samples only (RAFT), −1 is REINFORCE on rewards of ±1",
        low=-1.0,
        high=0.0,
        latex="a_{-}",
    ),
    Parameter("ceiling", 4.0, "two-sided clip: ratios above δ get weight 0", low=1.0, latex=r"\delta"),
    Parameter(
        "tv_low", 0.15, "largest fall of a token's probability, where A ≤ 0", low=0.0, latex=r"\delta_{\mathrm{low}}"
    ),
    Parameter(
        "tv_high", 0.15, "largest rise of a token's probability, where A > 0", low=0.0, latex=r"\delta_{\mathrm{high}}"
    ),
    Parameter(
        "kl_low",
        0.05,
        "largest binary KL divergence of a token that fell, where A ≤ 0, in nats",
        low=0.0,
        latex=r"\delta_{\mathrm{low}}",
    ),
    Parameter(
        "kl_high",
        0.05,
        "largest binary KL divergence of a token that rose, where A > 0, in nats",
        low=0.0,
        latex=r"\delta_{\mathrm{high}}",
    ),
    Parameter("truncation", 20.0, "largest ratio that DPPO multiplies by", low=1.0, latex="C"),
    Parameter(
        "drift", 0.2, "largest mean of −λ of a trajectory with A < 0, in nats per token", low=0.0, latex=r"\delta"
    ),
    Parameter("worst", 0.5, "largest e^λ − 1 − λ of a trajectory's tokens, in nats", low=0.0, latex=r"\delta"),
    Parameter("moment", 0.04, "largest mean of (log ρ)² of the tokens that are kept", low=0.0, latex=r"\tau_{M_{2}}"),
    Parameter("k_pos", 2.0, "exponent of the ratio where A ≥ 0", low=0.0, latex="k_{+}"),
    Parameter("rate_pos", 3.0, "rate of the exponential damping where A ≥ 0", low=0.0, open_low=True, latex=r"\nu_{+}"),
    Parameter("k_neg", 3.0, "exponent of the ratio where A < 0", low=0.0, latex="k_{-}"),
    Parameter("rate_neg", 2.0, "rate of the exponential damping where A < 0", low=0.0, open_low=True, latex=r"\nu_{-}"),
    Parameter(
        "half_life", 32.0, "after how many tokens the weight of a later one halves", low=0.0, open_low=True, latex="h"
    ),
    Parameter(
        "influence", 0.2, "how far the influence of later tokens may raise a weight", low=0.0, latex=r"\varepsilon_{f}"
    ),
    Parameter("safety", 4.0, "where A < 0, ratios above this are never raised", low=1.0, latex="C_{f}"),
    Parameter("clip_low", 0.4, "how far below 0 a log-ratio counts where A < 0", low=0.0, latex=r"\xi_{\mathrm{low}}"),
    Parameter(
        "clip_high", 0.4, "how far above 0 a log-ratio counts where A > 0", low=0.0, latex=r"\xi_{\mathrm{high}}"
    ),
    Parameter(
        "cov_share",
        0.0002,
        "share of the update's own tokens that Clip-Cov drops or KL-Cov penalises",
        low=0.0,
        high=1.0,
        latex="q",
    ),
    Parameter(
        "cov_low",
        1.0,
        "smallest (A − Ā)·(ℓ − ℓ̄) of a token that Clip-Cov may drop, exclusive",
        latex=r"\omega_{\mathrm{low}}",
    ),
    Parameter(
        "cov_high",
        5.0,
        "largest (A − Ā)·(ℓ − ℓ̄) of a token that Clip-Cov may drop, exclusive",
        latex=r"\omega_{\mathrm{high}}",
    ),
    Parameter(
        "cov_penalty", 1.0, "coefficient of |λ| at the tokens of the largest covariance", low=0.0, latex=r"\theta"
    ),
    Parameter(
        "tv_limit",
        0.15,
        "largest move of a token's probability, times the weight of its position",
        low=0.0,
        latex=r"\delta",
    ),
    Parameter(
        "least_weight",
        0.8,
        "weight of the last own token's position; that of the first is 1",
        low=0.0,
        high=1.0,
        latex=r"v_{\mathrm{min}}",
    ),
    Parameter("budget", 0.02, "mean move of the probabilities that a prefix may have at least", low=0.0, latex="b"),
    Parameter(
        "tv_scale",
        12.5,
        "move of a token's probability in the direction of A at which its weight is 0",
        low=0.0,
        open_low=True,
        latex=r"\delta",
    ),
    Parameter("band", 0.1, "how far a token's probability may move either way", low=0.0, latex=r"\delta"),
    Parameter("band_penalty", 1e-3, "coefficient of λ² in the loss", low=0.0, latex=r"\tau"),
    Parameter(
        "log_low", 0.025, "how far log ρ may fall at the first own token", low=0.0, latex=r"\varepsilon_{\mathrm{low}}"
    ),
    Parameter(
        "log_high", 0.05, "how far log ρ may rise at the first own token", low=0.0, latex=r"\varepsilon_{\mathrm{high}}"
    ),
    Parameter("log_ceiling", 0.05, "where A < 0, how far log ρ may rise at the first own token", low=0.0, latex="c"),
    Parameter("growth", 0.5, "exponent of the position by which the bounds of log ρ grow", latex="p"),
    Parameter("std", "population", "divisor of the variance: n or n − 1", choices=("population", "sample")),
    Parameter(
        "eps", 1e-6, "added to the standard deviation before dividing by it", low=0.0, latex=r"\epsilon_{\mathrm{std}}"
    ),
    Parameter(
        "kl_scale",
        "mean",
        "factor c of a KL inside the returns: 1/H (mean, Bai & Zhang 2026) or 1 (sum, Ouyang et al. 2022)",
        choices=("mean", "sum"),
    ),
    Parameter(
        "entropy_bonus",
        0.0,
        "coefficient c of the entropy H of the policy at each own token: the loss is less by c·agg(H), with gradient",
        low=0.0,
        latex=r"c_{\mathrm{H}}",
    ),
    Parameter(
        "entropy_share",
        1.0,
        "share of the update's own tokens, those of the highest entropy, that have a policy gradient: the others' "
        "surrogate is left out, and counted in the denominators",
        low=0.0,
        high=1.0,
        latex=r"q_{\mathrm{H}}",
    ),
    Parameter(
        "kl_at",
        "rollout",
        "policy whose log-probabilities a detached KL uses: the behaviour policy's (rollout, Ouyang et al. 2022) or "
        "the current policy's (current, Bai & Zhang 2026)",
        choices=("rollout", "current"),
    ),
)

PARAMETERS: Mapping[str, Parameter] = MappingProxyType({parameter.name: parameter for parameter in _ALL})
"""Every parameter by its name."""

TERMS = ("entropy_bonus", "entropy_share")
"""Parameters that belong to the objective itself and to no value of an axis. At their defaults they do nothing, and are
no part of what is written or hashed."""
