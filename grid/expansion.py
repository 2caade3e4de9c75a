"""From axes to points: the designs product, one_at_a_time, zip and list, and exclude rules."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from klab.grid.errors import Mistake
from klab.grid.schema.sections import TrainingSection
from klab.grid.variant import SECTIONS, Change, Point, Spread, mapping, place

DESIGNS = ("product", "one_at_a_time", "zip", "list")
LARGEST = 1_000_000


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
        changes: Iterable[list[Change]] = listed
    else:
        if "cells" in data:
            raise Mistake("cells belong to design: list", key="cells")
        axes = _axes(data.get("axes", {}))
        changes = _designed(design, axes)
    points: list[Point] = []
    spread = Spread(baseline)
    seen: set[tuple[int, ...]] = set()
    for change in changes:
        point = spread.point(change)
        if design == "one_at_a_time" and not point.changes:
            point = baseline
        identity = tuple(id(point.sections[name]) for name in SECTIONS)
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
    for key, values in mapping("axes", axes).items():
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


def _designed(design: str, axes: Mapping[str, tuple[Any, ...]]) -> Iterator[list[Change]]:
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


def _listed(cells: object) -> tuple[list[list[Change]], dict[str, tuple[Any, ...]]]:
    if not isinstance(cells, list) or not cells:
        raise Mistake("design list needs a list of cells", key="cells", value=cells)
    changes = [list(mapping(f"cells.{index}", entry).items()) for index, entry in enumerate(cells)]
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
        wanted = [(place(name), value) for name, value in mapping(key, rule).items()]
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
