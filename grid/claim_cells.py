"""Which configurations of a study the claims of its grid file compare.

A claim has two sides. Configurations are matched on every axis on which the sides are not told apart: a match holds
those of both sides that have the same values there, on one task. An axis that does nothing in a cell fits any value,
and the baseline's first where the cell is compared with the baseline. Where a task has no match, all cells of both
sides are one, and their means are compared. A configuration that is one algorithm on both sides says nothing and is
left out.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from klab.grid.catalogue import AXES, PARAMETERS
from klab.grid.cell import Cell
from klab.grid.cell_builder import NEUTRAL, idle_training
from klab.grid.claims import Match, StatedClaim, compared, has_margin, same_algorithm
from klab.grid.errors import UserError
from klab.grid.matching import Settings, is_same, setting_of
from klab.grid.parameters import TERMS
from klab.grid.schema.sections import AnalysisPlan, Claim, load_section
from klab.grid.schema.task import REWARD_MODEL, ProxyTask, same_task
from klab.grid.score import parse_score
from klab.grid.variant import Variant, format_value, split_key

Rows = list[int]
"""Places in the list of variants."""


def read_claims(
    given: object,
    variants: Sequence[Variant],
    cells: Sequence[Cell],
    axes: Mapping[str, Sequence[Any]],
    settings: Settings,
    baseline: Variant,
    plan: AnalysisPlan | None,
) -> tuple[StatedClaim, ...]:
    """The section `claims` of a grid file.

    Args:
        given: the section.
        variants, cells: every variant of the study and its cell, which gives its group.
        axes: the keys that the study varies, with their values as written.
        settings: a variant's settings (`CellBuilder.settings`).
        baseline: the configuration without changes.
        plan: the stated analysis.

    Raises:
        UserError: for an unknown key or value, a side without cells, and sides that are the same cells.
    """
    if not isinstance(given, list) or not given:
        raise UserError("not a list of claims", key="claims", value=given)
    reader = _Reader(variants, cells, axes, settings, baseline)
    found: list[StatedClaim] = []
    for index, each in enumerate(given):
        key = f"claims.{index}"
        claim: Claim = load_section(key, each)  # type: ignore[assignment]
        if any(claim.claim == other.claim.claim for other in found):
            raise UserError("duplicate claim", key=f"{key}.claim", value=claim.claim)
        if claim.score is not None:
            parse_score(claim.score, f"{key}.score")
        if claim.expect == "equal" and not has_margin(claim, plan):
            raise UserError(
                "missing: which differences of this score count as none?",
                key=f"{key}.delta",
                hint="No interval shows that two cells are equal, only that they differ by less than delta.",
            )
        found.append(reader.stated(claim, key))
    return tuple(found)


class _Reader:
    """Finds the cells that claims name among the variants of a study."""

    def __init__(
        self,
        variants: Sequence[Variant],
        cells: Sequence[Cell],
        axes: Mapping[str, Sequence[Any]],
        settings: Settings,
        baseline: Variant,
    ) -> None:
        self.variants, self.cells, self.settings, self.baseline = variants, cells, settings, baseline
        self.written = axes
        proxies = any(isinstance(cell.task, ProxyTask) for cell in cells)
        within = REWARD_MODEL if proxies else ()
        self.axes = tuple(axis for axis in axes if split_key(axis)[0] != "task" or split_key(axis)[1] in within)
        self.own = {split_key(axis)[1] for axis in self.axes}
        self.tasks = [same_task(cell.task) for cell in cells]

    def stated(self, claim: Claim, key: str) -> StatedClaim:
        sides = {"where": claim.where, "cells": claim.cells, "against": claim.against}
        wanted = {side: self._checked(f"{key}.{side}", given) for side, given in sides.items() if given is not None}
        rows = self._rows(f"{key}.where", wanted["where"], range(len(self.variants)))
        cells = self._rows(f"{key}.cells", wanted["cells"], rows)
        if claim.against is None:
            named = [axis for axis in self.axes if any(_related(name, axis) for name in claim.cells)]
            apart = set(named)
            base = {axis: self._value(self.baseline, axis) for axis in named}
            against = [
                row for row in rows if all(self._value(self.variants[row], axis) == base[axis] for axis in named)
            ]
            cells = [row for row in cells if row not in set(against)]
        else:
            against = self._rows(f"{key}.against", wanted["against"], rows)
            apart = {axis for axis in self.axes if _on(axis, wanted["cells"]) != _on(axis, wanted["against"])}
            if set(cells) == set(against):
                raise UserError("its two sides are the same cells", key=f"{key}.against", value=claim.against)
            if both := set(cells) & set(against):
                raise UserError(f"{len(both)} of these are among its cells", key=f"{key}.against", value=claim.against)
        if not against:
            raise UserError(
                "no cell of this grid has the baseline's values there: what are they compared with?",
                key=f"{key}.against",
                hint="Name the cells to compare with.",
            )
        if not cells:
            raise UserError("are the baseline's own values", key=f"{key}.cells", value=claim.cells)
        if not {self.tasks[row] for row in cells} & {self.tasks[row] for row in against}:
            raise UserError(
                "its two sides have no task in common: cells are compared within a task", key=key, value=claim.claim
            )
        shared = [axis for axis in self.axes if axis not in apart]
        found = compared(self._matched(cells, against, shared, claim.against is None))
        if not found:
            raise same_algorithm(key, claim)
        matched = {group for match in found for group in (*match.cells, *match.against)}
        return StatedClaim(claim, found, len({*self._groups((*cells, *against))} - matched))

    def _matched(self, cells: Rows, against: Rows, shared: Sequence[str], default: bool) -> Iterable[Match]:
        """The matches, task by task, in the order of the study."""
        for task in dict.fromkeys(self.tasks[row] for row in cells):
            one, other = ([row for row in rows if self.tasks[row] == task] for rows in (cells, against))
            idle = {axis: self._value(self.baseline, axis) for axis in shared} if default else {}
            alike = compared(self._alike(one, other, shared, idle)) or compared(self._alike(one, other, shared, {}))
            yield from alike
            if alike or not other:
                continue
            itself = [row for row in other if all(self._has_baseline_value(row, axis) for axis in self.axes)]
            yield Match(self._groups(one), self._groups(itself if default and itself else other), alike=False)

    def _alike(self, one: Rows, other: Rows, axes: Sequence[str], idle: Mapping[str, str]) -> Iterable[Match]:
        """Cells of both sides with the same values on these axes.

        Args:
            idle: the value that a cell counts as having on an axis that does nothing in it; without one it fits any.
        """
        values = {row: [self._acting_value(row, axis) or idle.get(axis) for axis in axes] for row in (*one, *other)}
        fixed = [all(row[place] is not None for row in values.values()) for place in range(len(axes))]
        kinds: dict[tuple[str | None, ...], tuple[Rows, Rows]] = {}
        for side, rows in enumerate((one, other)):
            for row in rows:
                kind = tuple(value for value, acts in zip(values[row], fixed, strict=True) if acts)
                kinds.setdefault(kind, ([], []))[side].append(row)
        for first, second in kinds.values():
            found: dict[tuple[str | None, ...], tuple[dict[int, None], dict[int, None]]] = {}
            for row, partner in itertools.product(first, second):
                both = list(zip(values[row], values[partner], strict=True))
                if all(x is None or y is None or x == y for x, y in both):
                    sides = found.setdefault(tuple(y if x is None else x for x, y in both), ({}, {}))
                    sides[0][row] = sides[1][partner] = None
            for cells, against in found.values():
                yield Match(self._groups(cells), self._groups(against))

    def _groups(self, rows: Iterable[int]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.cells[row].group for row in rows))

    def _rows(self, key: str, wanted: Mapping[str, Any], among: Iterable[int]) -> Rows:
        """The variants that fit; a restriction of both sides leaves out none in which its key does nothing."""
        conditions = [(split_key(name), value) for name, value in wanted.items()]
        found = [row for row in among if all(self._fits(row, *each, key.endswith(".where")) for each in conditions)]
        if not found:
            raise UserError("no cell of this grid fits", key=key, value=dict(wanted))
        return found

    def _fits(self, row: int, where: tuple[str, str | None], value: Any, restriction: bool) -> bool:
        if is_same(setting_of(self.variants[row], self.settings, where), value):
            return True
        return restriction and where[0] == "objective" and _is_idle(self.cells[row], str(where[1]))

    def _checked(self, key: str, given: Mapping[str, Any]) -> dict[str, Any]:
        """The conditions of a side, every value one that some cell has; labels (`power(q=0.5)`) as what they stand
        for."""
        if not given and not key.endswith(".where"):
            raise UserError("names no value of an axis", key=key, value=given, allowed=self.written)
        return {name: self._values(key, name, value) for name, value in given.items()}

    def _values(self, key: str, name: str, value: Any) -> list[Any]:
        try:
            where = split_key(name)
        except UserError:
            where = None
        if where is None or not any(_related(name, axis) for axis in self.written):
            raise UserError("is no axis of this study", key=key, value=name, allowed=self.written)
        present = {
            json.dumps(found, sort_keys=True, default=str): found
            for found in (setting_of(variant, self.settings, where) for variant in self.variants)
        }
        labels = {format_value(written): written for written in self.written.get(name, ())} or {
            format_value(self._without_own(where, found)): found for found in present.values()
        }
        chosen = []
        for option in value if isinstance(value, list) else [value]:
            if any(is_same(found, option) for found in present.values()):
                chosen.append(option)
            elif isinstance(option, str) and option in labels:
                chosen.append(labels[option])
            else:
                raise UserError(
                    "no cell of this grid has this value", key=f"{key}.{name}", value=option, allowed=labels
                )
        if not chosen:
            raise UserError("names no value", key=f"{key}.{name}", value=value)
        return chosen

    def _has_baseline_value(self, row: int, axis: str) -> bool:
        return self._acting_value(row, axis) in (None, self._value(self.baseline, axis))

    def _acting_value(self, row: int, axis: str) -> str | None:
        """The value of a cell on an axis, as JSON; None where the axis does nothing in it."""
        (section, field), cell = split_key(axis), self.cells[row]
        if section == "objective" and _is_idle(cell, str(field)):
            return None
        if section == "training" and str(field).partition(".")[0] in idle_training(cell.training, cell.objective):
            return None
        return self._value(self.variants[row], axis)

    def _value(self, variant: Variant, axis: str) -> str:
        """The value of a variant on an axis, as JSON; `null` is what its named algorithm brings along, where algorithms
        are compared."""
        where = section, field = split_key(axis)
        if section == "objective" and field != "algorithm" and "algorithm" in self.own:
            found = variant.sections[section].get(str(field))
        else:
            found = self._without_own(where, setting_of(variant, self.settings, where))
        return json.dumps(found, sort_keys=True, default=str)

    def _without_own(self, where: tuple[str, str | None], value: Any) -> Any:
        """The value of an axis of the objective without the parameters that are axes themselves."""
        if where[0] != "objective" or where[1] not in AXES or not isinstance(value, Mapping):
            return value
        return {name: each for name, each in value.items() if name == "name" or name not in self.own}


def _related(name: str, axis: str) -> bool:
    """Whether a key of a claim says something about an axis: the same field, a field of it, or what it is a field of; a
    named algorithm brings settings of the objective."""
    (section, one), (other, two) = split_key(name), split_key(axis)
    if section != other:
        return False
    if one is None or two is None:
        return True
    if two == "algorithm" and (one in AXES or one in PARAMETERS):
        return True
    first, second = one.split("."), two.split(".")
    shorter = min(len(first), len(second))
    return first[:shorter] == second[:shorter]


def _is_idle(cell: Cell, field: str) -> bool:
    """Whether an axis or a parameter of the objective does nothing in this cell; a value like `none` is one."""
    form = cell.objective.canonical_form(cell.training.on_policy)
    if field in AXES:
        acts = field in form.canonical and field not in form.idle
        return not acts and getattr(cell.objective, field) not in NEUTRAL.values()
    if field in PARAMETERS and field not in TERMS:
        return not any(name.endswith(f".{field}") for name in form.canonical)
    return False


def _on(axis: str, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """What a side asks of an axis."""
    return {name: value for name, value in wanted.items() if _related(name, axis)}
