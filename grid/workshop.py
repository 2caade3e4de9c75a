"""From written points to cells: algorithms filled in, parameters that do not apply dropped, idle settings noticed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from grid.algorithms import load_algorithm
from grid.catalogue import AXES, PARAMETERS, is_import_path, value_of
from grid.cell import Cell
from grid.expansion import Point
from grid.mistake import Mistake
from grid.objective import Objective, split_value
from grid.sections import Section, TrainingSection, load_section

NEUTRAL = {"placement": "none", "ratio": "none", "weight": "one", "path": "score"}
"""Values that say that nothing happens: where the axis is idle, they are true rather than silent no-ops."""


class Workshop:
    """Builds the cells of one grid file, each distinct section once, and keeps account of what acts anywhere."""

    def __init__(self) -> None:
        self._sections: dict[str, Section] = {}
        self._seen: dict[int, tuple[Mapping[str, Any], Section]] = {}
        self._objectives: dict[str, Objective] = {}
        self._reasons: dict[str, str] = {}
        self._acting: set[str] = set()
        self._merged: dict[str, Mapping[str, Any]] = {}

    def cell(self, point: Point, seed: int, count: bool = True) -> Cell:
        """The cell of a point; with ``count``, its settings enter the account of `refuse_idle`."""
        task = self._section("task", point.sections["task"])
        policy = self._section("policy", point.sections["policy"])
        algorithm, written = _layers(point)
        objective = self._objective(_applicable(written))
        training = self._training(point, algorithm)
        idle = idle_training(training, objective)
        if count:
            self._account(point, objective, training.on_policy)
            self._account_training(point, idle)
        if idle:
            training = training.model_copy(update=dict.fromkeys(idle))
        return Cell(objective, task, policy, training, seed, algorithm, (point.spelling,))  # type: ignore[arg-type]

    def settings(self, point: Point) -> dict[str, Any]:
        """All objective settings of a point, as exclude rules see them."""
        _, written = _layers(point)
        return self._objective(_applicable(written)).settings()

    def refuse_idle(self) -> None:
        """Raises a Mistake when a written setting acts in no cell at all: a silent no-op."""
        for key, reason in self._reasons.items():
            if key not in self._acting:
                raise Mistake(
                    f"acts in no cell of this grid: {reason}", key=key, hint="Remove it, or change what makes it idle."
                )

    def _training(self, point: Point, algorithm: str | None) -> TrainingSection:
        """The written training settings, on top of those that belong to the named algorithm."""
        written = point.sections["training"]
        own = load_algorithm(algorithm).training if algorithm else {}
        if own:
            written = self._merged.setdefault(f"{algorithm}:{written!r}", {**own, **written})
        return self._section("training", written)  # type: ignore[return-value]

    def _account_training(self, point: Point, idle: Mapping[str, str]) -> None:
        for name in point.sections["training"]:
            if name in idle:
                self._reasons.setdefault(f"training.{name}", idle[name])
            else:
                self._acting.add(f"training.{name}")

    def _section(self, kind: str, given: Mapping[str, Any]) -> Section:
        known = self._seen.get(id(given))
        if known is not None and known[0] is given:
            return known[1]
        key = f"{kind}:{given!r}"
        if key not in self._sections:
            self._sections[key] = load_section(kind, given)
        self._seen[id(given)] = given, self._sections[key]
        return self._sections[key]

    def _objective(self, settings: dict[str, Any]) -> Objective:
        key = repr(settings)
        if key not in self._objectives:
            self._objectives[key] = Objective(**settings)
        return self._objectives[key]

    def _account(self, point: Point, objective: Objective, on_policy: bool) -> None:
        used = {name for axis in AXES for name in objective.arguments(axis)}
        idle = objective.form(on_policy).idle
        for key, value in point.sections["objective"].items():
            if key == "algorithm":
                continue
            names = [key]
            if isinstance(value, Mapping) and not is_import_path(value.get("name")):
                names += [name for name in value if name != "name"]
            for name in names:
                if name in idle and getattr(objective, name) == NEUTRAL.get(name):
                    continue
                if name in idle:
                    self._reasons.setdefault(name, idle[name])
                elif name in AXES or name in used:
                    self._acting.add(name)
                else:
                    self._reasons.setdefault(name, "no chosen value uses this parameter")


def idle_training(training: TrainingSection, objective: Objective) -> dict[str, str]:
    """Training settings that do nothing beside this objective, and why."""
    idle = {}
    if training.critic is not None and objective.advantage != "gae" and not is_import_path(objective.advantage):
        idle["critic"] = "only the advantage 'gae' reads a critic's values"
    canonical = objective.form(training.on_policy).canonical
    has_beta = "placement.beta" in canonical or is_import_path(objective.placement)
    if training.beta_control is not None and not has_beta:
        idle["beta_control"] = "no KL term has a coefficient"
    if training.trust_region is not None and training.on_policy:
        idle["trust_region"] = "every ratio is 1: one update per rollout"
    return idle


def _layers(point: Point) -> tuple[str | None, dict[str, Any]]:
    """The named algorithm of a point, and its settings with the written ones on top."""
    written = dict(point.sections["objective"])
    named = written.pop("algorithm", None)
    if named is None:
        return None, written
    overrides: dict[str, Any] = {}
    if isinstance(named, Mapping):
        overrides = {key: value for key, value in named.items() if key != "name"}
        named = named.get("name")
    if not isinstance(named, str):
        raise Mistake("not a name", key="algorithm", value=named)
    for key in overrides:
        if key not in AXES and key not in PARAMETERS:
            raise Mistake("unknown key", key="algorithm", value=key, allowed=[*AXES, *PARAMETERS])
    return named, {**load_algorithm(named).objective, **overrides, **written}


def _applicable(written: Mapping[str, Any]) -> dict[str, Any]:
    """The settings without the parameters that no chosen value uses, validated all the same."""
    chosen = {axis: split_value(axis, written.get(axis, AXES[axis].default)) for axis in AXES}
    used = {name for axis, (value, _) in chosen.items() for name in value_of(axis, value).parameters}
    own = {name for _, extra in chosen.values() for name in extra}
    result: dict[str, Any] = {}
    for key, value in written.items():
        if key in AXES:
            result[key] = dict(value) if isinstance(value, Mapping) else value
            continue
        if key not in PARAMETERS:
            raise Mistake("unknown key", key=key, value=value, allowed=[*AXES, *PARAMETERS])
        PARAMETERS[key].validated(value)
        if key in used and key not in own:
            result[key] = value
    return result
