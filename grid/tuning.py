"""Tuning: every configuration of a study picks its own settings, on seeds that the study does not use again.

A study with `tune` runs in two stages. In the first, every configuration (an *arm*) runs with every setting on the
tuning seeds. It then keeps the setting with the best mean score, and the second stage runs what was kept on the study's
own seeds. What is kept stands in the resolved configuration of a cell of the second stage: it is a cell like others.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from klab.grid.cell import Cell
from klab.grid.cell_builder import CellBuilder
from klab.grid.errors import UserError
from klab.grid.variant import Variant, VariantFactory, as_mapping, format_value, split_key

if TYPE_CHECKING:
    from klab.grid.grid_file import Grid

FIRST_SEED = 1_000_000
"""Where a count of tuning seeds begins; seeds that are added to a study later stay far below."""

_OPTIONS = ("seeds", "untuned")


@dataclass(frozen=True)
class Setting:
    """One setting that an arm may keep.

    Attributes:
        values: the tuned fields by dotted key.
        cell: the arm with this setting and the first tuning seed; its group is that of the arm with the setting.
    """

    values: Mapping[str, Any]
    cell: Cell

    @property
    def words(self) -> str:
        """The values in one line."""
        return ", ".join(f"{key}={format_value(value)}" for key, value in self.values.items())


@dataclass(frozen=True)
class Tuning:
    """What `tune` says.

    Attributes:
        values: the values to choose from, by dotted key; all combinations are tried.
        seeds: of the first stage only.
        untuned: whether the arms as written also run on the study's seeds, so that the report can say what tuning
            changed.
        arms: by group of an arm as written, its settings in the order of the file; those that are the same cell there
            stand once.
    """

    values: Mapping[str, tuple[Any, ...]]
    seeds: tuple[int, ...]
    untuned: bool
    arms: Mapping[str, tuple[Setting, ...]]

    def changes_algorithms(self, grid: Grid) -> bool:
        """Whether a setting changes the objective, or whether updates are on policy: arms that are one algorithm as
        written then need not be one with every setting."""
        written = {cell.group: cell for cell in grid.cells}
        return any(
            setting.cell.objective != written[group].objective
            or setting.cell.training.on_policy != written[group].training.on_policy
            for group, settings in self.arms.items()
            if group in written
            for setting in settings
        )


@dataclass(frozen=True)
class Stages:
    """The cells of both stages, as far as they are known before the first has run.

    Attributes:
        tuning: of the first stage. An arm that has but one setting needs none.
        untuned: the arms as written, on the study's seeds.
        kept: of arms with one setting, which are known from the beginning.
        chosen: how many cells the second stage has beside, whose settings the first decides.
    """

    tuning: tuple[Cell, ...]
    untuned: tuple[Cell, ...]
    kept: tuple[Cell, ...]
    chosen: int


def read_tuning(
    given: object,
    read_seeds: Any,
    study_seeds: Sequence[int],
    axes: Mapping[str, Any],
    variants: Iterable[Variant],
    builder: CellBuilder,
) -> Tuning:
    """The section `tune` of a grid file.

    Args:
        given: the section.
        read_seeds: reads a count or a list of seeds, as the study's own.
        study_seeds, axes, variants: of the study.
        builder: builds cells, and takes account of settings without effect.

    Raises:
        UserError: naming the key, the value and the nearest valid one.
    """
    section = as_mapping("tune", given)
    values = {key: _values(key, listed, axes) for key, listed in section.items() if key not in _OPTIONS}
    if not values:
        raise UserError("tunes nothing", key="tune", hint="For example tune: {training.lr: [1.0e-4, 3.0e-4], seeds: 2}")
    if "seeds" not in section:
        raise UserError("missing: on how many seeds of its own?", key="tune.seeds")
    untuned = section.get("untuned", True)
    if not isinstance(untuned, bool):
        raise UserError("not true or false", key="tune.untuned", value=untuned)
    seeds = _seeds(section["seeds"], read_seeds, study_seeds)
    combinations = [dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())]
    if len(combinations) < 2:
        raise UserError("has one value only: there is nothing to choose from", key="tune", value=next(iter(values)))
    arms: dict[str, tuple[Setting, ...]] = {}
    for variant in variants:
        factory = VariantFactory(variant)
        settings: dict[str, Setting] = {}
        for combination in combinations:
            try:
                cell = builder.cell(factory.variant(combination.items()), seeds[0])
            except UserError as error:
                raise error.with_location(prefix="tune") from None
            settings.setdefault(cell.group, Setting(combination, cell))
        arm = builder.cell(variant, study_seeds[0]).group
        known = arms.setdefault(arm, tuple(settings.values()))
        if [setting.cell.group for setting in known] != list(settings):
            raise UserError(
                "tells configurations apart that are one as written",
                key="tune",
                value=variant.spelling,
                hint="Write a setting of the study under which they differ, or tune something else.",
            )
    return Tuning(values, seeds, untuned, arms)


def stages(grid: Grid) -> Stages | None:
    """The cells of both stages of a study; None of one that tunes nothing. Merged arms are left out."""
    if grid.tuning is None:
        return None
    arms = {group: grid.tuning.arms[group] for group in grid.groups}
    tuning: dict[str, Cell] = {}
    kept: dict[str, Cell] = {}
    chosen = 0
    for settings in arms.values():
        if len(settings) == 1:
            kept.update((cell.id, cell) for cell in settings[0].cell.with_seeds(grid.seeds))
            continue
        chosen += len(grid.seeds)
        for setting in settings:
            tuning.update((cell.id, cell) for cell in setting.cell.with_seeds(grid.tuning.seeds))
    untuned = {cell.id: cell for cell in grid.cells} if grid.tuning.untuned else {}
    known = tuple(cell for identity, cell in kept.items() if identity not in untuned)
    return Stages(tuple(tuning.values()), tuple(untuned.values()), known, chosen)


def launched(grid: Grid) -> Grid:
    """The study with the cells that a launch begins with: the first stage, and what else is known before it has run."""
    found = stages(grid)
    return grid if found is None else replace(grid, cells=(*found.tuning, *found.untuned, *found.kept))


def _values(key: str, listed: object, axes: Mapping[str, Any]) -> tuple[Any, ...]:
    where = f"tune.{key}"
    try:
        section, field = split_key(key)
    except UserError as error:
        raise UserError("unknown setting", key="tune", value=key, allowed=(*_OPTIONS, *error.allowed)) from None
    if section in ("task", "policy") or field == "algorithm":
        raise UserError("is what is compared, not how it is trained: it cannot be tuned", key=where)
    if field is None:
        raise UserError("is a whole section: tune one field of it", key=where, hint="For example training.lr.")
    if any(_overlap(key, axis) for axis in axes):
        raise UserError("is an axis of the study", key=where, hint="Compare a setting or tune it, not both.")
    if not isinstance(listed, list) or not listed:
        raise UserError("not a list of values", key=where, value=listed)
    for index, value in enumerate(listed):
        if any(value == other and type(value) is type(other) for other in listed[:index]):
            raise UserError("duplicate value", key=where, value=value)
    return tuple(listed)


def _overlap(first: str, second: str) -> bool:
    """Whether two keys name a field of the same setting; `training.critic` and its fields are one."""
    one, other = (key.removeprefix("objective.").split(".")[:2] for key in (first, second))
    shorter = min(len(one), len(other))
    return one[:shorter] == other[:shorter]


def _seeds(given: object, read_seeds: Any, study_seeds: Sequence[int]) -> tuple[int, ...]:
    try:
        seeds: tuple[int, ...] = read_seeds(given)
    except UserError as error:
        raise UserError(error.problem, key="tune.seeds", value=given) from None
    if not isinstance(given, list):
        seeds = tuple(FIRST_SEED + seed for seed in seeds)
    for seed in seeds:
        if seed in study_seeds:
            raise UserError("is a seed of the study: tuning has seeds of its own", key="tune.seeds", value=seed)
    return seeds
