"""The table of what peers train: families of objectives with the peer's settings, and the one that a cell belongs to.

`tests/parity` runs the peer's own code with the settings of every point of every family and compares gradients. A cell
is exportable where a family has it, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from klab.grid import Objective, UserError
from klab.grid.catalogue import AXES, PARAMETERS, value_of
from klab.grid.parameters import TERMS
from klab.harness.export.setting import Setting

_UNWEIGHTED = {"ratio": "none", "weight": "one"}
"""What an objective has where nothing is written on an axis of its canonical form: every weight is 1."""


@dataclass(frozen=True)
class Condition:
    """What must hold among the parameters of a family's objectives.

    Attributes:
        key: the parameter that is blamed.
        holds: whether it does.
        reason: why not, as a clause.
    """

    key: str
    holds: Callable[[Objective], bool]
    reason: str


@dataclass(frozen=True)
class Family:
    """Objectives that a peer trains: all combinations of some axis values.

    Attributes:
        name: what the peer calls it.
        target: what the settings are arguments of.
        axes: the values of every axis; an axis that is left out has all of its values only where it is idle.
        settings: the peer's settings of one of these objectives.
        fixed: parameters that cannot be chosen there.
        conventions: parameters (`std`, `eps`) that the peer has its own way; what is exported differs by them, and the
            difference is said.
        conditions: what else must hold.
        terms: those of `klab.grid.parameters.TERMS` that the peer has.
    """

    name: str
    target: str
    axes: Mapping[str, tuple[str, ...]]
    settings: Callable[[Objective], dict[str, Any]]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    conventions: Mapping[str, Any] = field(default_factory=dict)
    conditions: tuple[Condition, ...] = ()
    terms: tuple[str, ...] = ()

    def points(self, **parameters: Any) -> Iterator[Objective]:
        """Every objective of the family, with these parameters where an axis value takes them."""
        for values in product(*(self.axes[axis] for axis in AXES)):
            chosen = dict(zip(AXES, values, strict=True))
            had = {name: value for name, value in parameters.items() if name not in TERMS or name in self.terms}
            objective = _objective(chosen, {**had, **self.conventions, **self.fixed})
            if all(condition.holds(objective) for condition in self.conditions):
                yield objective

    def stand_in(self, objective: Objective, on_policy: bool) -> Objective:
        """The family's objective that has the gradient of this one but for the conventions.

        Raises:
            UserError: there is none; the key is the axis or parameter that differs.
        """
        canonical = {**_UNWEIGHTED, **objective.canonical(on_policy)}
        chosen = {}
        for axis in AXES if objective.ratio == "none" else ("weight", *AXES):  # where weights are 1 no ratio acts
            values = self.axes[axis]
            asked = str(canonical.get(axis, values[0]))  # an idle axis reads as what the peer has anyway
            if asked not in values and on_policy and asked == _UNWEIGHTED.get(axis):
                asked = values[0]  # every weight is 1
            if asked not in values:
                raise UserError(
                    f"{self.name} has only {', '.join(values)} on this axis",
                    key=axis,
                    value=getattr(objective, axis),
                )
            chosen[axis] = asked
        for name, value in objective.terms.items():
            if name not in self.terms:
                raise UserError(f"{self.name} has no such term", key=name, value=value)
        own = {name: getattr(objective, name) for name in _parameters(objective)} | objective.terms
        own |= {key.partition(".")[2]: value for key, value in canonical.items() if "." in key}
        found = _objective(chosen, {**own, **self.conventions, **self.fixed})
        for key, value in found.canonical(on_policy).items():
            name = key.partition(".")[2]
            if name and name not in self.conventions and canonical.get(key, value) != value:
                raise UserError(f"{self.name} has only {value} here", key=name, value=canonical[key])
        for condition in self.conditions:
            if not condition.holds(found):
                raise UserError(condition.reason, key=condition.key, value=getattr(found, condition.key, None))
        return found


def find(families: Sequence[Family], setting: Setting, peer: str) -> tuple[Family, Objective, list[str]]:
    """The first family that has an objective, its stand-in, and in words what stays different.

    Raises:
        UserError: no family has it; the nearest one says why.
    """
    refusals = []
    for family, on_policy in [(family, schedule) for schedule in _schedules(setting) for family in families]:
        try:
            found = family.stand_in(setting.objective, on_policy)
        except UserError as error:
            refusals.append((family, error))
            continue
        said = [_convention(peer, setting.objective, name, value) for name, value in family.conventions.items()]
        if on_policy and not setting.on_policy:
            said.append(f"equal for one update per rollout; with more, {family.name} weighs by its own ratio")
        return family, found, [line for line in said if line]
    _, nearest = max(refusals, key=lambda each: _agreement(each[0], setting))
    raise UserError(f"{peer} cannot express this cell: {nearest.problem}", key=nearest.key, value=nearest.value)


def _schedules(setting: Setting) -> tuple[bool, ...]:
    """Whether ratios are 1: an algorithm without a schedule whose weights are all 1 may be trained on policy."""
    if setting.training is not None or "weight" in setting.objective.canonical():
        return (setting.on_policy,)
    return (False, True)


def _agreement(family: Family, setting: Setting) -> tuple[int, bool]:
    """How many axes of an objective the family has, and whether the weight is one of them."""
    canonical = {**_UNWEIGHTED, **setting.objective.canonical(setting.on_policy)}
    had = {axis for axis in AXES if str(canonical.get(axis, family.axes[axis][0])) in family.axes[axis]}
    return len(had), "weight" in had


def _convention(peer: str, objective: Objective, name: str, theirs: Any) -> str:
    if name not in _parameters(objective) or getattr(objective, name) == theirs:
        return ""
    if name == "std":
        return (
            f"{peer} divides advantages by the sample standard deviation, this cell by the population's: "
            "a factor √((n − 1)/n); std: sample makes them equal"
        )
    if not theirs:
        return f"{peer} adds 1e-8 to the variance, this cell {getattr(objective, name):g} to the standard deviation"
    return f"{peer} adds {theirs:g} to the standard deviation, this cell {getattr(objective, name):g}"


def _objective(values: Mapping[str, str], parameters: Mapping[str, Any]) -> Objective:
    """An objective, with the parameters that its values take."""
    used = {name for axis, value in values.items() for name in value_of(axis, value).parameters}.union(TERMS)
    return Objective(**values, **{name: value for name, value in parameters.items() if name in used})


def _parameters(objective: Objective) -> set[str]:
    return {name for axis in AXES for name in objective.arguments(axis) if name in PARAMETERS}
