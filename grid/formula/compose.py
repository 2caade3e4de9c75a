"""The loss of an objective and its gradient as equations, composed from the LaTeX of its values.

Only settings that act appear (`klab.grid.canonical`). The loss is what the code computes for one update, with its
stop-gradients; the gradient is the expectation of what the code computes. Every other symbol has an equation of its
own, down to log-probabilities and rewards.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from klab.grid.catalogue import AXES, PARAMETERS, value_of
from klab.grid.formula.custom import custom_divergence, custom_value
from klab.grid.formula.notation import Atom, equations, parse
from klab.grid.formula.symbols import names
from klab.grid.formula.terms import BONUS, ENTROPY, HIGH_ENTROPY, PENALTIES
from klab.grid.formula.training import follows_entropy, loss_terms, outer_equations, surrogate_factor
from klab.grid.objective import Objective
from klab.grid.parameters import TERMS
from klab.grid.schema.training import TrainingSection
from klab.grid.user_code import names_user_code

OLD = r"^{\mathrm{old}}"


@dataclass(frozen=True, slots=True)
class Equation:
    """One printed equation, both sides in the catalogue's notation."""

    left: str
    right: str


@dataclass(frozen=True, slots=True)
class Part:
    """The LaTeX of one chosen value: its formula, its gradient, and the equations of symbols of its own."""

    latex: str
    gradient: str
    own: tuple[Equation, ...]


@dataclass(frozen=True, slots=True)
class Composition:
    """The equations of an objective in the order in which they are printed.

    Attributes:
        equations: loss, gradient, and every symbol that they use.
        own: left sides of symbols that belong to one value.
        parameters: the numbers in use: symbol, name and value, by printed symbol.
        active: the canonical form that was composed.
    """

    equations: tuple[Equation, ...]
    own: frozenset[str]
    parameters: Mapping[str, tuple[str, Any]]
    active: Mapping[str, Any]


def compose(objective: Objective, on_policy: bool = False, training: TrainingSection | None = None) -> Composition:
    """The equations of an objective.

    Args:
        objective: the point on the axes.
        on_policy: whether the training schedule makes every ratio 1; as `training` says where that is given.
        training: settings that add terms or factors to the loss: the trust region, corrections of the sampler, ….
    """
    on_policy = on_policy if training is None else training.on_policy
    active = objective.canonical(on_policy)
    parts = {axis: _part(axis, active[axis], active) for axis in AXES if axis in active}
    placed = dict(equations(parts["placement"].latex))
    definitions = [
        *_loss(active, parts, placed, training),
        *_advantage(active, parts, placed),
        *_importance(active, parts),
        Equation(*ENTROPY),
        *_divergence(active, parts),
        *(Equation(*pair) for pair in outer_equations(training)),
    ]
    own = frozenset(equation.left for part in parts.values() for equation in part.own)
    parameters = {
        PARAMETERS[name].latex: (name, value)
        for key, value in active.items()
        if (name := key if key in TERMS else key.partition(".")[2]) in PARAMETERS and PARAMETERS[name].latex
    }
    return Composition(_used(definitions, own | parameters.keys()), own, parameters, active)


def _part(axis: str, name: str, active: Mapping[str, Any]) -> Part:
    value = custom_value(axis, name) if names_user_code(name) else value_of(axis, name)
    latex, gradient = value.latex, value.gradient
    if axis == "estimator":
        divergence = active.get("divergence", "reverse")
        if names_user_code(divergence):
            latex, gradient = custom_divergence(divergence, name)
        else:
            latex, gradient = value_of("divergence", divergence).estimates.get(name, (latex, gradient))
    own = []
    main = {"latex": latex, "gradient": gradient}
    if axis not in ("placement", "path"):
        for field, text in main.items():
            first, *others = equations(text) if text else [("", "")]
            main[field] = first[1]
            own += [Equation(*pair) for pair in others]
    return Part(main["latex"], main["gradient"], tuple(own))


def _loss(
    active: Mapping[str, Any], parts: Mapping[str, Part], placed: Mapping[str, str], training: TrainingSection | None
) -> list[Equation]:
    """The loss and its gradient."""
    outer = " ".join(filter(None, (surrogate_factor(training), HIGH_ENTROPY if "entropy_share" in active else "")))
    weighted = " ".join(filter(None, (outer, "w_{j}" if active.get("weight", "one") != "one" else "", "A_{j}")))
    path = dict(equations(parts["path"].latex))["s_{j}"]
    surrogate = path.replace(r"\ell_{j}", placed.get("s_{j}", r"\ell_{j}"))
    terms = [rf"\operatorname{{sg}}[{weighted}] {_factor(surrogate)}"]
    slopes = [f"{weighted} {_factor(_gradient(parts['path'].gradient, parts))}"]
    if active.get("weight") in PENALTIES:
        terms.append(rf"\operatorname{{sg}}[{outer}] Q_{{j}}" if outer else "Q_{j}")
        slopes.append(f"{outer} {PENALTIES[active['weight']]}".strip())
    if placed.get("K_{j}", "0") != "0":
        terms.append(placed["K_{j}"])
        slopes.append(_gradient(parts["placement"].gradient, parts))
    for term, slope in loss_terms(training):
        terms.append(term)
        slopes.append(slope)
    average = parts["aggregation"].latex
    bonus = BONUS if "entropy_bonus" in active or follows_entropy(training) else ("", "")
    drawn = r"\mathbb{E}_{\pi}" if training is not None and training.on_policy else rf"\mathbb{{E}}_{{\pi{OLD}}}"
    return [
        Equation("L", f"-{_averaged(average, terms, bonus[0])}"),
        Equation(r"\mathbb{E}[\nabla L]", f"-{drawn}[{_averaged(average, slopes, bonus[1])}]"),
    ]


def _averaged(average: str, terms: list[str], bonus: str) -> str:
    """The aggregation of the first term less the others, with a bonus."""
    joined = " - ".join(terms) + bonus
    return average.replace("x_{j}", joined if "(x_{j})" in average else _factor(joined))


def _advantage(active: Mapping[str, Any], parts: Mapping[str, Part], placed: Mapping[str, str]) -> list[Equation]:
    """A, the returns in it, and a critic's targets."""
    advantage, found = parts["advantage"], []
    latex = (
        rf"\operatorname{{white}}({advantage.latex})" if active.get("advantage.whiten") == "batch" else advantage.latex
    )
    if "A_{j}" in placed:
        found.append(Equation("A_{j}", _detached(placed["A_{j}"], active)))
        found.append(Equation("a_{j}", latex))
    else:
        found.append(Equation("A_{j}", latex))
    found += advantage.own
    token_reward = placed.get("u_{j}", r"\mathbf{1}[j = H] R")
    found.append(Equation("u_{j}", _detached(token_reward, active)))
    returns = placed.get("r_{j}", "R")
    if returns == "R":
        return [Equation(each.left, _same_return(each.right, "R")) for each in found]
    returns = _detached(returns, active)
    if "j" in names(returns):
        return [*found, Equation("r_{j}", returns)]
    return [*(Equation(each.left, _same_return(each.right, "r")) for each in found), Equation("r", returns)]


def _same_return(latex: str, symbol: str) -> str:
    """The formula where every own token has the same return."""
    return re.sub(r"(?<![A-Za-z\\])r_\{[ji1]\}", symbol, latex)


def _detached(latex: str, active: Mapping[str, Any]) -> str:
    r"""A KL inside returns or advantages, with its factor c, and φ of the policy that `kl_at` names."""
    factor = r"\frac{\beta}{H}" if active.get("placement.kl_scale") == "mean" else r"\beta"
    latex = latex.replace(r"\beta c", factor)
    if active.get("placement.kl_at") == "rollout":
        latex = re.sub(r"\\varphi_\{\w\}", lambda found: found[0] + OLD, latex)
    return latex


def _importance(active: Mapping[str, Any], parts: Mapping[str, Part]) -> list[Equation]:
    """ρ, λ and w."""
    found = []
    if "ratio" in parts:
        log_rho = parts["ratio"].latex
        power = rf"e^{{{log_rho}}}" if log_rho == r"\lambda_{j}" else rf"\exp({log_rho})"
        found.append(Equation(r"\rho_{j}", "1" if log_rho == "0" else power))
        found += parts["ratio"].own
    if "weight" in parts:
        found = [*found[:1], Equation("w_{j}", parts["weight"].latex), *parts["weight"].own, *found[1:]]
    return [*found, Equation(r"\lambda_{j}", rf"\ell_{{j}} - \ell_{{j}}{OLD}")]


def _divergence(active: Mapping[str, Any], parts: Mapping[str, Part]) -> list[Equation]:
    """φ and κ, of the current policy and of the behaviour policy."""
    found = []
    if "estimator" in parts:
        latex = parts["estimator"].latex
        found.append(Equation(r"\varphi_{j}", latex))
        old = rf"\kappa_{{j}}{OLD}"
        latex = re.sub(r"\\kappa_\{j\}(\^?)", lambda found: f"({old})^" if found[1] else old, latex)
        found.append(Equation(rf"\varphi_{{j}}{OLD}", latex))
        found += parts["estimator"].own
    found.append(Equation(r"\kappa_{j}", r"\ell_{j} - \ell_{j}^{\mathrm{ref}}"))
    return [*found, Equation(rf"\kappa_{{j}}{OLD}", rf"\ell_{{j}}{OLD} - \ell_{{j}}^{{\mathrm{{ref}}}}")]


def _gradient(latex: str, parts: Mapping[str, Part]) -> str:
    """A gradient with those of log ρ and φ written out."""
    for symbol, axis in ((r"\nabla \log \rho_{j}", "ratio"), (r"\nabla \varphi_{j}", "estimator")):
        if axis in parts and symbol in latex:
            alone = latex == symbol or f"({symbol}" in latex
            inner = parts[axis].gradient
            latex = latex.replace(symbol, inner if alone else _factor(inner))
    return latex


def _factor(latex: str) -> str:
    """The formula as a factor: in brackets where it is a sum."""
    row = parse(latex)
    return f"({latex})" if any(node in (Atom("+"), Atom("-")) for node in row) else latex


def _used(definitions: list[Equation], kept: frozenset[str] | set[str]) -> tuple[Equation, ...]:
    """The first two equations, and those whose symbols are used, directly or by others that are."""
    by_name = {_name(equation.left, kept): equation for equation in reversed(definitions[2:])}
    if "r" in by_name:
        by_name["r_{1}"] = by_name["r"]
    wanted: set[str] = set()
    waiting = list(definitions[:2])
    while waiting:
        for name in names(waiting.pop().right, kept):
            if name in by_name and name not in wanted:
                wanted.add(name)
                waiting.append(by_name[name])
    shown = {by_name[name] for name in wanted}
    return tuple(definitions[:2]) + tuple(each for each in definitions[2:] if each in shown)


def _name(left: str, kept: frozenset[str] | set[str]) -> str:
    return names(left, kept)[0]
