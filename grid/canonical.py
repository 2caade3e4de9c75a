"""The canonical form of an objective: the axes and parameters that act on the gradient, without those that are idle.

Only facts that follow from the formulas are used here: for example the ratio is idle where the weight is 1 and nothing
else contains it. Equalities between different values (k2 in the loss = k1 in the advantage) are found by comparing
gradients, in `klab.harness.exact.equivalence`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from klab.grid.catalogue import value_of
from klab.grid.user_code import names_user_code

_IN_RETURN = {"reward": "none", "reward_to_go": "none", "reward_and_loss": "loss"}
_WITH_RATIO = ("loss_reweighted", "loss_corrected")


@dataclass(frozen=True, slots=True)
class CanonicalForm:
    """Which settings of an objective act.

    Attributes:
        canonical: the active axes and, as ``axis.parameter``, their parameters; equal for equal algorithms.
        idle: the other settings, each with the reason why it has no effect.
    """

    canonical: dict[str, Any]
    idle: dict[str, str]


_IGNORES_RETURNS = {
    "positive": "the advantage 'positive' looks at the task reward only",
    "term_norm": "the advantage 'term_norm' looks at the terms of the task's reward only",
}
_DRIFT = {"log_ratio", "logp", "logp_behaviour"}
_ONE_DIVERGENCE = ("k2", "abs")


def reads_divergence(estimator: str) -> bool:
    """Whether an estimator differs between divergences: κ²/2 is the second order of all, and |κ| belongs to none."""
    return estimator not in _ONE_DIVERGENCE and not names_user_code(estimator)


def keeps_unit_ratio(weight: str, arguments: Mapping[str, Any]) -> bool:
    """Whether w = 1 where ρ = 1: true of every built-in weight except a mask that excludes 1, and one that drops tokens
    whatever their ratios are."""
    if names_user_code(weight) or weight == "clip_cov":
        return False
    return weight != "mask" or arguments["low"] <= 1.0 <= arguments["high"]


def canonicalize(
    axes: Mapping[str, str],
    arguments: Mapping[str, Mapping[str, Any]],
    on_policy: bool,
    terms: Mapping[str, float] | None = None,
) -> CanonicalForm:
    """The canonical form of a point on the axes.

    Args:
        axes: the chosen value of every axis.
        arguments: the resolved parameters of each chosen value, by axis.
        on_policy: whether the training schedule makes every ratio 1.
        terms: parameters that belong to no axis, those that act.
    """
    value = dict(axes)
    kept = {axis: dict(parameters) for axis, parameters in arguments.items()}
    idle: dict[str, str] = {}

    _one_clip_by_two_names(value, kept)
    _drop_idle_divergence(value, kept, idle)
    _drop_idle_placement(value, kept, idle)
    _drop_idle_weight(value, kept, idle, on_policy)
    _drop_idle_path(value, idle)
    if "placement" in idle:
        kept["placement"] = {}
    if value["placement"] in ("none", "log_ratio"):
        reason = f"placement {value['placement']} has no KL term"
        idle.setdefault("estimator", reason)
        for setting in ("divergence", *kept["divergence"]):
            idle.setdefault(setting, reason)
        value["divergence"] = "reverse"
    elif not names_user_code(value["placement"]):
        _drop_idle_kl_parameters(value, kept, idle, on_policy)

    unweighted = value["weight"] == "one" and "ratio" in idle
    canonical: dict[str, Any] = {}
    for axis, name in value.items():
        if axis == "estimator" and "estimator" in idle:
            continue
        if unweighted and axis in ("ratio", "weight"):
            continue
        if axis == "divergence" and name == "reverse":
            continue
        canonical[axis] = name
        for key, item in kept[axis].items():
            canonical[f"{axis}.{key}"] = item
    return CanonicalForm({**canonical, **(terms or {})}, idle)


def _drop_idle_placement(value: dict[str, str], kept: dict[str, dict[str, Any]], idle: dict[str, str]) -> None:
    placement = value["placement"]
    if "beta" in kept["placement"] and kept["placement"]["beta"] == 0.0:
        idle["placement"] = "beta is 0"
        value["placement"], kept["placement"] = "none", {}
    elif value["advantage"] in _IGNORES_RETURNS and placement in _IN_RETURN:
        reason = _IGNORES_RETURNS[value["advantage"]]
        value["placement"] = _IN_RETURN[placement]
        beta = kept["placement"]["beta"]
        kept["placement"] = {"beta": beta} if value["placement"] == "loss" else {}
        for parameter in ("kl_scale", "kl_at"):
            idle[parameter] = reason
        if value["placement"] == "none":
            idle["placement"] = idle["beta"] = reason


def _one_clip_by_two_names(value: dict[str, str], kept: dict[str, dict[str, Any]]) -> None:
    """`two_sided_clip` is `dual_clip` where its ceiling is no lower than 1 + ε_high: ppo_clip cuts off the rest."""
    weight = kept["weight"]
    if value["weight"] == "two_sided_clip" and weight["ceiling"] >= 1 + weight["eps_high"]:
        value["weight"] = "dual_clip"
        kept["weight"] = {"eps_low": weight["eps_low"], "eps_high": weight["eps_high"], "c": weight["ceiling"]}


def _drop_idle_divergence(value: dict[str, str], kept: dict[str, dict[str, Any]], idle: dict[str, str]) -> None:
    """Also: α = 1 is reverse KL, of which `reinforce` is k1."""
    if not reads_divergence(value["estimator"]):
        reason = f"the estimator {value['estimator']} is the same for every divergence"
        idle.update(dict.fromkeys(("divergence", *kept["divergence"]), reason))
        value["divergence"] = "reverse"
    elif value["divergence"] == "alpha" and kept["divergence"]["alpha"] == 1.0:
        value["divergence"] = "reverse"
    if value["divergence"] == "reverse":
        kept["divergence"] = {}
        if value["estimator"] == "reinforce":
            value["estimator"] = "k1"


def _drop_idle_weight(
    value: dict[str, str], kept: dict[str, dict[str, Any]], idle: dict[str, str], on_policy: bool
) -> None:
    ratio_is_one = value["ratio"] == "none" or on_policy
    if ratio_is_one and value["placement"] == "loss_reweighted":
        value["placement"] = "loss"
    if value["ratio"] == "none" and value["placement"] == "loss_corrected":
        value["placement"] = "loss"
    sees_no_drift = on_policy or (value["ratio"] == "none" and not _DRIFT.intersection(_needs(value["weight"])))
    if sees_no_drift and keeps_unit_ratio(value["weight"], kept["weight"]):
        if value["weight"] != "one":
            reason = "every ratio is 1: one update per rollout" if on_policy else "the ratio is none"
            idle["weight"] = reason
            idle.update(dict.fromkeys(kept["weight"], reason))
        value["weight"], kept["weight"] = "one", {}
    through_ratio = value["path"] == "ratio" and value["ratio"] not in ("token", "none")
    if value["weight"] == "clip_cov" and on_policy and not through_ratio and value["placement"] not in _WITH_RATIO:
        idle["ratio"] = "every ratio is 1: one update per rollout"
        value["ratio"], kept["ratio"] = "none", {}
    if value["weight"] == "one" and not through_ratio and value["placement"] not in _WITH_RATIO:
        if value["ratio"] != "none":
            idle["ratio"] = "every ratio is 1: one update per rollout" if on_policy else "the weight is one"
        else:
            idle["ratio"] = "the weight is one"
        value["ratio"] = "none"


def _needs(weight: str) -> tuple[str, ...]:
    """What a weight looks at beside the ratio and the advantage."""
    return value_of("weight", weight).needs


def _drop_idle_path(value: dict[str, str], idle: dict[str, str]) -> None:
    if value["ratio"] in ("token", "none"):
        idle["path"] = "log ρ and ℓ have the same gradient here"
        value["path"] = "score"


def _drop_idle_kl_parameters(
    value: dict[str, str], kept: dict[str, dict[str, Any]], idle: dict[str, str], on_policy: bool
) -> None:
    if "kl_at" in kept["placement"] and (on_policy or value["estimator"] == "full"):
        del kept["placement"]["kl_at"]
        idle["kl_at"] = "current and behaviour policy are the same" if on_policy else "full is always taken at current"
