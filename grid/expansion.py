"""From axes to points: the designs product, one_at_a_time, zip and list, and exclude rules."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from grid.catalogue import AXES, PARAMETERS
from grid.mistake import Mistake
from grid.sections import TrainingSection

DESIGNS = ("product", "one_at_a_time", "zip", "list")
SECTIONS = ("task", "policy", "training", "objective")
LARGEST = 1_000_000
_OBJECTIVE_KEYS = ("algorithm", *AXES, *PARAMETERS)


@dataclass(frozen=True)
class Point:
    """The written settings of one configuration: the four sections, and how it differs from the baseline."""

    sections: Mapping[str, Mapping[str, Any]]
    changes: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def from_sections(cls, data: Mapping[str, Any]) -> Point:
        """The baseline: the sections as they stand in the grid file."""
        sections: dict[str, Mapping[str, Any]] = {}
        for name in SECTIONS:
            given = data.get(name, {"name": "tiny"} if name == "policy" else {})
            if isinstance(given, str) and name in ("task", "policy"):
                given = {"name": given}
            if isinstance(given, str) and name == "objective":
                given = {"algorithm": given}
            if not isinstance(given, Mapping):
                raise Mistake("not a mapping", key=name, value=given)
            sections[name] = given
        for key in sections["objective"]:
            if key not in _OBJECTIVE_KEYS:
                raise Mistake("unknown key", key="objective", value=key, allowed=_OBJECTIVE_KEYS)
        return cls(sections)

    def changed(self, changes: Iterable[tuple[str, Any]]) -> Point:
        """This point with some dotted fields set; a change to the written value is no change."""
        sections = dict(self.sections)
        real: list[tuple[str, Any]] = []
        for key, value in changes:
            section, field = place(key)
            before = sections[section]
            if field is None:
                after = {**before, **_mapping(key, value)} if section == "training" else _mapping(key, value)
            else:
                after = _with(before, field, value)
            if after != before:
                real.append((key, value))
            sections[section] = after
        return Point(sections, (*self.changes, *real))

    @property
    def spelling(self) -> str:
        """The changes as one line, as a person would write them."""
        return ", ".join(f"{key}={shown(value)}" for key, value in self.changes) or "baseline"


def shown(value: Any) -> str:
    """An axis value in few characters, for labels and tables."""
    if isinstance(value, Mapping):
        rest = ", ".join(f"{key}={shown(item)}" for key, item in value.items() if key != "name")
        return f"{value['name']}({rest})" if "name" in value and rest else str(value.get("name", rest))
    return f"{value:g}" if isinstance(value, float) else str(value)


def place(key: str) -> tuple[str, str | None]:
    """Which section and field a dotted axis key means; None stands for the whole section.

    Raises:
        Mistake: for a key that means nothing.
    """
    if key in _OBJECTIVE_KEYS:
        return "objective", key
    if key in ("task", "policy", "training"):
        return key, None
    section, _, field = key.partition(".")
    if section == "objective" and field in _OBJECTIVE_KEYS:
        return "objective", field
    if section == "training" and field.partition(".")[0] in TrainingSection.model_fields:
        return section, field
    if section in ("task", "policy") and field:
        return section, field
    allowed = [
        *_OBJECTIVE_KEYS,
        *(f"training.{name}" for name in TrainingSection.model_fields),
        "task",
        "policy",
        "training",
    ]
    raise Mistake("unknown axis", key="axes", value=key, allowed=allowed)


def expand(
    baseline: Point, data: Mapping[str, Any], settings: Callable[[Point], Mapping[str, Any]]
) -> tuple[list[Point], dict[str, tuple[Any, ...]]]:
    """All points of the design that no exclude rule removes, and the written values of every varied field.

    Args:
        baseline: the unchanged configuration.
        data: the grid file.
        settings: the objective settings of a point with its named algorithm filled in; exclude rules look at these.
    """
    design = data.get("design", "list" if "cells" in data else "product")
    if design not in DESIGNS:
        raise Mistake("unknown design", key="design", value=design, allowed=DESIGNS)
    if design == "list":
        if "axes" in data:
            raise Mistake("design list takes cells, not axes", key="axes")
        listed, axes = _listed(data.get("cells"))
        changes: Iterable[list[tuple[str, Any]]] = listed
    else:
        if "cells" in data:
            raise Mistake("cells belong to design: list", key="cells")
        axes = _axes(data.get("axes", {}))
        changes = _designed(design, axes)
    points: list[Point] = []
    seen: set[str] = set()
    for change in changes:
        point = baseline.changed(change)
        if design == "one_at_a_time" and not point.changes:
            point = baseline
        identity = repr(point.sections)
        if identity in seen:
            if design == "one_at_a_time" and not point.changes:
                continue
            raise Mistake("this cell stands twice", key="cells" if design == "list" else "axes", value=point.spelling)
        seen.add(identity)
        points.append(point)
    kept = _excluded(points, data.get("exclude", []), settings)
    if not kept:
        raise Mistake("the grid is empty: nothing is left to run", key="exclude" if points else "axes")
    return kept, axes


def _axes(axes: object) -> dict[str, tuple[Any, ...]]:
    result: dict[str, tuple[Any, ...]] = {}
    for key, values in _mapping("axes", axes).items():
        place(key)
        if not isinstance(values, list):
            raise Mistake("not a list of values", key=f"axes.{key}", value=values)
        if not values:
            raise Mistake("has no values", key=f"axes.{key}", value=values)
        for index, value in enumerate(values):
            if any(value == other and type(value) is type(other) for other in values[:index]):
                raise Mistake("this value stands twice", key=f"axes.{key}", value=value)
        result[key] = tuple(values)
    return result


def _designed(design: str, axes: Mapping[str, tuple[Any, ...]]) -> Iterator[list[tuple[str, Any]]]:
    if design == "one_at_a_time":
        yield []
        for key, values in axes.items():
            yield from ([(key, value)] for value in values)
        return
    if design == "zip":
        lengths = {key: len(values) for key, values in axes.items()}
        if len(set(lengths.values())) > 1:
            raise Mistake("design zip needs lists of one length", key="axes", value=lengths)
        yield from ([*zip(axes, values, strict=True)] for values in zip(*axes.values(), strict=True))
        return
    size = 1
    for values in axes.values():
        size *= len(values)
    if size > LARGEST:
        raise Mistake(f"the product has {size} points; at most {LARGEST} are allowed", key="axes")
    yield from ([*zip(axes, values, strict=True)] for values in itertools.product(*axes.values()))


def _listed(cells: object) -> tuple[list[list[tuple[str, Any]]], dict[str, tuple[Any, ...]]]:
    if not isinstance(cells, list) or not cells:
        raise Mistake("design list needs a list of cells", key="cells", value=cells)
    changes = [list(_mapping(f"cells.{index}", entry).items()) for index, entry in enumerate(cells)]
    axes: dict[str, list[Any]] = {}
    for change in changes:
        for key, value in change:
            place(key)
            values = axes.setdefault(key, [])
            if value not in values:
                values.append(value)
    return changes, {key: tuple(values) for key, values in axes.items()}


def _excluded(points: list[Point], rules: object, settings: Callable[[Point], Mapping[str, Any]]) -> list[Point]:
    if not isinstance(rules, list):
        raise Mistake("not a list of rules", key="exclude", value=rules)
    for index, rule in enumerate(rules):
        key = f"exclude.{index}"
        wanted = [(place(name), value) for name, value in _mapping(key, rule).items()]
        if not wanted:
            raise Mistake("an empty rule would exclude everything", key=key, value=rule)
        kept = [point for point in points if not all(_matches(point, settings, *item) for item in wanted)]
        if len(kept) == len(points):
            raise Mistake("this rule matches no cell", key=key, value=rule)
        points = kept
    return points


def _matches(
    point: Point, settings: Callable[[Point], Mapping[str, Any]], where: tuple[str, str | None], wanted: Any
) -> bool:
    section, field = where
    fields = settings(point) if section == "objective" and field != "algorithm" else point.sections[section]
    present: Any = fields
    for part in field.split(".") if field else ():
        present = present.get(part) if isinstance(present, Mapping) else None
    if section == "training" and field in TrainingSection.model_fields and present is None:
        present = TrainingSection.model_fields[field].default
    options = wanted if isinstance(wanted, list) else [wanted]
    return any(_same(present, option) for option in options)


def _same(present: Any, wanted: Any) -> bool:
    if isinstance(wanted, Mapping) and isinstance(present, Mapping):
        return all(present.get(key) == value for key, value in wanted.items())
    if isinstance(present, Mapping):
        return bool(present.get("name") == wanted)
    return bool(present == wanted)


def _with(section: Mapping[str, Any], field: str, value: Any) -> dict[str, Any]:
    """A section with one field set; a dotted field reaches into the section inside it (`critic.lr`)."""
    name, _, rest = field.partition(".")
    if not rest:
        return {**section, name: value}
    inside = section.get(name)
    return {**section, name: _with(inside if isinstance(inside, Mapping) else {}, rest, value)}


def _mapping(key: str, value: object) -> Mapping[str, Any]:
    if isinstance(value, str) and key in ("task", "policy"):
        return {"name": value}
    if not isinstance(value, Mapping):
        raise Mistake("not a mapping", key=key, value=value)
    return value
