"""The designs of a grid file (product, one_at_a_time, zip, list, fractional) and exclude rules: axes to variants."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from klab.grid.errors import UserError
from klab.grid.fractional import Fraction, FractionalDesign, choose, read_design
from klab.grid.matching import Settings, is_same, setting_of
from klab.grid.variant import SECTIONS, Change, Variant, VariantFactory, as_mapping, split_key

DESIGNS = ("product", "one_at_a_time", "zip", "list", "fractional")
MAX_VARIANTS = 1_000_000


@dataclass(frozen=True)
class Expansion:
    """What a design and its exclude rules leave.

    Attributes:
        variants: without the excluded ones.
        axes: the written values of every varied field.
        design: the name of the design.
        fraction: of design fractional, what was chosen; None of others.
    """

    variants: list[Variant]
    axes: dict[str, tuple[Any, ...]]
    design: str
    fraction: Fraction | None = None


def expand(
    baseline: Variant, data: Mapping[str, Any], settings: Settings, identity: Callable[[Variant], str]
) -> Expansion:
    """The variants of the design without the excluded ones.

    Args:
        baseline: the unchanged configuration.
        data: the grid file.
        settings: what exclude rules look at (`CellBuilder.settings`).
        identity: a variant's group.
    """
    design, fraction = _design(data)
    if design == "list":
        if "axes" in data:
            raise UserError("design list takes cells, not axes", key="axes")
        listed, axes = _listed(data.get("cells"))
        changes: Iterable[list[Change]] = listed
    else:
        if "cells" in data:
            raise UserError("cells belong to design: list", key="cells")
        axes = _axes(data.get("axes", {}))
        changes = _designed(design, axes)
    variants: list[Variant] = []
    factory = VariantFactory(baseline)
    seen: set[tuple[int, ...]] = set()
    for change in changes:
        variant = factory.variant(change)
        if design == "one_at_a_time" and not variant.changes:
            variant = baseline
        sections = tuple(id(variant.sections[name]) for name in SECTIONS)
        if sections in seen:
            if design == "one_at_a_time" and not variant.changes:
                continue
            raise UserError("duplicate cell", key="cells" if design == "list" else "axes", value=variant.spelling)
        seen.add(sections)
        variants.append(variant)
    kept = _excluded(variants, data.get("exclude", []), settings)
    if not kept:
        raise UserError("the grid is empty: nothing is left to run", key="exclude" if variants else "axes")
    if fraction is None:
        return Expansion(kept, axes, design)
    codes = dict(
        zip(map(id, variants), itertools.product(*(range(len(values)) for values in axes.values())), strict=True)
    )
    return _fraction(kept, axes, [codes[id(variant)] for variant in kept], fraction, identity)


def _design(data: Mapping[str, Any]) -> tuple[str, FractionalDesign | None]:
    given = data.get("design", "list" if "cells" in data else "product")
    name = given.get("name") if isinstance(given, Mapping) else given
    if not isinstance(name, str) or name not in DESIGNS:
        raise UserError("unknown design", key="design", value=name, allowed=DESIGNS)
    if name == "fractional":
        return name, read_design(as_mapping("design", {"name": name} if given == name else given))
    if isinstance(given, Mapping) and len(given) > 1:
        raise UserError(
            f"design {name} takes no settings", key="design", value=next(key for key in given if key != "name")
        )
    return name, None


def _fraction(
    kept: list[Variant],
    axes: dict[str, tuple[Any, ...]],
    codes: list[tuple[int, ...]],
    design: FractionalDesign,
    identity: Callable[[Variant], str],
) -> Expansion:
    """The chosen variants and those held out. Of several spellings of a configuration only the first is a candidate."""
    names = [identity(variant) for variant in kept]
    first = {name: index for index, name in reversed(list(enumerate(names)))}
    distinct = sorted(first.values())
    start = next((place for place, index in enumerate(distinct) if not kept[index].changes), None)
    chosen, held_out = choose([codes[index] for index in distinct], design, start)
    fitted, predicted = ([distinct[place] for place in places] for places in (chosen, held_out))
    fraction = Fraction(
        candidates=len(distinct),
        codes=tuple(codes[index] for index in fitted),
        levels=tuple(len(values) for values in axes.values()),
        held_out=tuple(names[index] for index in predicted),
    )
    return Expansion([kept[index] for index in fitted + predicted], axes, "fractional", fraction)


def _axes(axes: object) -> dict[str, tuple[Any, ...]]:
    result: dict[str, tuple[Any, ...]] = {}
    for key, values in as_mapping("axes", axes).items():
        split_key(key)
        if not isinstance(values, list):
            raise UserError("not a list of values", key=f"axes.{key}", value=values)
        if not values:
            raise UserError("needs at least one value", key=f"axes.{key}", value=values)
        for index, value in enumerate(values):
            if any(value == other and type(value) is type(other) for other in values[:index]):
                raise UserError("duplicate value", key=f"axes.{key}", value=value)
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
            raise UserError("design zip needs lists of one length", key="axes", value=lengths)
        yield from ([*zip(axes, values, strict=True)] for values in zip(*axes.values(), strict=True))
        return
    size = 1
    for values in axes.values():
        size *= len(values)
    if size > MAX_VARIANTS:
        raise UserError(f"the product has {size} cells; at most {MAX_VARIANTS} are allowed", key="axes")
    yield from ([*zip(axes, values, strict=True)] for values in itertools.product(*axes.values()))


def _listed(cells: object) -> tuple[list[list[Change]], dict[str, tuple[Any, ...]]]:
    if not isinstance(cells, list) or not cells:
        raise UserError("design list needs a list of cells", key="cells", value=cells)
    changes = [list(as_mapping(f"cells.{index}", entry).items()) for index, entry in enumerate(cells)]
    axes: dict[str, list[Any]] = {}
    for change in changes:
        for key, value in change:
            split_key(key)
            values = axes.setdefault(key, [])
            if value not in values:
                values.append(value)
    return changes, {key: tuple(values) for key, values in axes.items()}


def _excluded(variants: list[Variant], rules: object, settings: Settings) -> list[Variant]:
    if not isinstance(rules, list):
        raise UserError("not a list of rules", key="exclude", value=rules)
    for index, rule in enumerate(rules):
        key = f"exclude.{index}"
        wanted = [(split_key(name), value) for name, value in as_mapping(key, rule).items()]
        if not wanted:
            raise UserError("an empty rule would exclude everything", key=key, value=rule)
        kept = [
            variant
            for variant in variants
            if not all(is_same(setting_of(variant, settings, where), value) for where, value in wanted)
        ]
        if len(kept) == len(variants):
            raise UserError("this rule matches no cell", key=key, value=rule)
        variants = kept
    return variants
