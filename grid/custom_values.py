"""The user's own axis values: what a function on each axis is called with, what it returns, and an example that runs.

A grid file names the function as ``package.module:function``; parameters of its own follow as keywords:
``weight: {name: "my_package.weights:soft", tau: 2.0}``. Whatever it returns off the own tokens is ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class Signature:
    """How a function on one axis is called.

    Attributes:
        inputs: the positional arguments, in order: name and shape.
        optional: further inputs (see `VIEW`), passed as keywords to a function that has parameters of these names; the
            cell is then given what they need (whole logits, a greedy completion of every prompt).
        returns: what comes back.
        example: a complete module with one function.
        written: how a grid file would use that function, the module being called ``mine``.
    """

    inputs: Mapping[str, str]
    returns: str
    example: str
    written: str
    optional: Mapping[str, str] = field(default_factory=dict)

    def call(self, function: str = "function") -> str:
        """The signature as a line of Python."""
        asked = ["…"] if self.optional else []
        return f"{function}({', '.join([*self.inputs, *asked, '**parameters'])}) -> {self.returns}"


VIEW: Mapping[str, str] = MappingProxyType(
    {
        "logp": "ℓ, float [N, T], of the current policy",
        "logp_behaviour": "ℓ_old, float [N, T], of the policy that sampled",
        "logp_reference": "ℓ_ref, float [N, T], of the reference policy",
        "log_ratio": "λ = ℓ − ℓ_old, float [N, T]",
        "ratio": "ρ, float [N, T]",
        "mask": "own tokens, bool [N, T]",
        "advantage": "A, float [N, T]",
        "rewards": "R, float [N]",
        "reward_terms": "the reward's terms without their weights, float [N, K], NaN where one has no value",
        "term_weights": "the weight of each term, float [K]",
        "groups": "the trajectories by prompt, a klab.harness.objective.Groups; only where the whole update is at hand",
        "lengths": "own tokens of each trajectory, int [N, 1]",
        "positions": "how many own tokens stand before each, int [N, T]",
        "entropy": "of the current policy at each token, in nats, float [N, T]",
        "greedy_rewards": "float [N], the reward of the greedy completion of the same prompt",
        "values": "a critic's V, float [N, T]",
        "logits": "of the current policy, float [N, T, V]; with gradient for an estimator",
        "logits_reference": "of the reference policy, float [N, T, V]",
        "update": "number of the update, int, from 0",
    }
)
"""What an update knows, by the name that a function asks for it with. Without gradient and 0 off the own tokens."""


def _view(without: tuple[str, ...]) -> dict[str, str]:
    """`VIEW` but for some names: an axis's own positional inputs, and what is not known yet when it is called."""
    return {name: text for name, text in VIEW.items() if name not in without}


_WHOLE_UPDATE = ("groups",)
_TOKENS = "float [N, T]"
_LOG_RATIO = "κ = ℓ − ℓ_ref, float [N, T], 0 off the own tokens"

SIGNATURES: Mapping[str, Signature] = MappingProxyType(
    {
        "estimator": Signature(
            inputs={"log_ratio": _LOG_RATIO},
            optional=_view(without=("log_ratio", "ratio", "advantage", *_WHOLE_UPDATE)),
            returns="φ, float [N, T], differentiable",
            example='''def huber(log_ratio, *, width):
    """κ²/2 near 0, linear beyond ±width."""
    size = log_ratio.abs()
    return (0.5 * log_ratio.square()).where(size <= width, width * (size - 0.5 * width))
''',
            written='estimator: {name: "mine:huber", width: 1.0}',
        ),
        "divergence": Signature(
            inputs={},
            returns="a klab.harness.objective.Divergence",
            example='''import torch

from klab.harness.objective import Divergence


def chi_squared(*, scale):
    """scale/2·χ²(π‖π_ref), f(δ) = scale/2·(1/δ − 1)."""
    return Divergence(
        plain=lambda kappa: scale / 2 * torch.expm1(kappa),
        nonnegative=lambda kappa: scale / 2 * (torch.expm1(kappa) + torch.expm1(-kappa)),
        coefficient=lambda kappa: scale * torch.expm1(kappa),
        summand=lambda logp, logp_reference: scale / 2 * ((2 * logp - logp_reference).exp() - logp.exp()),
    )
''',
            written='divergence: {name: "mine:chi_squared", scale: 1.0}',
        ),
        "placement": Signature(
            inputs={},
            returns="a klab.harness.objective.Placement",
            example='''from klab.harness.objective import Placement


def final_reward(*, beta):
    """Charges each token its own KL, as a reward."""
    return Placement(reward=lambda phi, mask: beta * phi)
''',
            written='placement: {name: "mine:final_reward", beta: 0.05}',
        ),
        "ratio": Signature(
            inputs={
                "log_ratio": "λ = ℓ − ℓ_old, float [N, T], 0 off the own tokens, with gradient",
                "mask": "own tokens, bool [N, T]",
            },
            optional=_view(without=("log_ratio", "mask", "ratio", *_WHOLE_UPDATE)),
            returns="log ρ, float [N, T], differentiable",
            example='''def half(log_ratio, mask):
    """The square root of the token's ratio."""
    return 0.5 * log_ratio
''',
            written='ratio: "mine:half"',
        ),
        "weight": Signature(
            inputs={"ratio": f"ρ, {_TOKENS}, without gradient", "advantage": f"A, {_TOKENS}, without gradient"},
            optional=_view(without=("ratio", "advantage", *_WHOLE_UPDATE)),
            returns="w, float [N, T]",
            example='''def soft(ratio, advantage, *, tau):
    """ρ, damped the further it is from 1."""
    return ratio * (-tau * (ratio - 1.0).abs()).exp()
''',
            written='weight: {name: "mine:soft", tau: 2.0}',
        ),
        "advantage": Signature(
            inputs={"returns": "a klab.harness.objective.Returns: returns [N, T], rewards [N], mask, groups, …"},
            optional=_view(without=("advantage", "ratio")),
            returns="A, float [N, T]",
            example='''def above_greedy(returns, greedy_rewards):
    """1 where the sample beats the greedy completion, else 0."""
    better = (returns.rewards > greedy_rewards).to(returns.returns.dtype)
    return better[:, None].expand_as(returns.returns)
''',
            written='advantage: "mine:above_greedy"',
        ),
        "aggregation": Signature(
            inputs={
                "terms": "float [N, T], 0 off the own tokens, of some rows of the update",
                "mask": "own tokens of these rows, bool [N, T]",
                "totals": "a klab.harness.objective.Totals of the whole update",
            },
            returns="a scalar; those of the micro-batches of an update must add up to that of the whole",
            example='''def per_trajectory_root(terms, mask, totals):
    """Sum of each trajectory over the square root of its length, averaged over trajectories."""
    return (terms.sum(1) / mask.sum(1).clamp(min=1).sqrt()).sum() / totals.trajectories
''',
            written='aggregation: "mine:per_trajectory_root"',
        ),
        "path": Signature(
            inputs={
                "logp": f"ℓ, {_TOKENS}, with gradient",
                "log_rho": f"log ρ, {_TOKENS}, with gradient",
            },
            returns="what w·A multiplies, float [N, T], differentiable",
            example='''def average(logp, log_rho):
    """Half of each gradient path."""
    return 0.5 * (logp + log_rho)
''',
            written='path: "mine:average"',
        ),
    }
)
"""The signature of the user's own values, by axis."""

SOLVER = Signature(
    inputs={
        "log_rho": f"log ρ, {_TOKENS}, without gradient",
        "mask": "own tokens of the loss in the whole update, bool [N, T]",
    },
    optional=_view(without=("mask",)),
    returns="a dict of what the weight is then called with: scalars, or tensors whose first dimension is N",
    example='''def largest(log_rho, mask):
    """The largest ratio of the update."""
    return {"top": log_rho.where(mask, -float("inf")).amax().exp()}


def relative(ratio, advantage, *, top):
    """The ratio as a share of the update's largest one."""
    return ratio / top


relative.solver = largest
''',
    written='weight: "mine:relative"',
)
"""A weight whose parameters depend on the whole update: a function with the attribute `solver`, itself a function that
is called once per update. Parameters of the grid file go to whichever of the two has them."""
