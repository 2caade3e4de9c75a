"""The grid file: one YAML document that describes a study, read into a `Grid` of cells."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from klab.grid.accelerate_file import check_accelerate_file, launcher_kind
from klab.grid.cell import Cell
from klab.grid.cell_builder import CellBuilder
from klab.grid.claim_cells import read_claims
from klab.grid.claims import StatedClaim
from klab.grid.engines import refuse_launcher, refuse_moving_references, refuse_unequal_shares
from klab.grid.errors import UserError
from klab.grid.expansion import expand
from klab.grid.fractional import Fraction
from klab.grid.schema.budget import Budget
from klab.grid.schema.evaluate import Evaluations
from klab.grid.schema.notify import Notify
from klab.grid.schema.policy import automatic_dtype
from klab.grid.schema.sections import AnalysisPlan, Launcher, Resources, load_section
from klab.grid.score import parse_score
from klab.grid.short_ids import matching_ids
from klab.grid.tuning import Tuning, read_tuning
from klab.grid.variant import Variant, VariantFactory
from klab.grid.yaml_document import parse_yaml, read_text

KEYS = {
    "name": "name of the study, and of its folder under `runs/`: letters, digits, `-`, `_`, `.`; required",
    "description": "a sentence for the report",
    "task": "where rewards come from: a name, or a mapping with `name` and its settings; required",
    "policy": "which model is trained: a name, or a mapping with `name` and its settings; default `tiny`",
    "training": "how every cell is trained",
    "objective": "the baseline: the name of an algorithm, or a mapping with `algorithm`, axis values and parameters",
    "design": "how axes make cells: `product` (default), `one_at_a_time`, `zip`, `list`, or "
    "`{name: fractional, cells: 200, holdout: 20}`",
    "axes": "the values to compare, by dotted key",
    "cells": "with `design: list`, the changes of each cell by dotted key",
    "exclude": "rules that remove cells",
    "seeds": "a count (seeds 0, 1, …) or a list of seeds; default 1",
    "tune": "settings that every configuration chooses for itself: values by dotted key, `seeds` of the choice, and "
    "`untuned: false` where the configurations as written need not run beside",
    "analysis": "what the study will be asked: score, margin, contrasts, most seeds; recorded by the first launch",
    "claims": "sentences about cells, each of which the report says to hold here, to be contradicted, or to be open",
    "evaluate": "what finished policies are evaluated on besides their task: `{lm_eval: [gsm8k]}`",
    "resources": "what a job gets",
    "budget": "the most that the study may use: `{gpu_hours: 200}`",
    "notify": "whom the study tells of its end, of failures and of divergence: `{command: [...], webhook: ${NAME}}`",
    "track": "`tensorboard`, `wandb`, `mlflow`, `trackio`, or a list of them",
}
"""The keys of a grid file, with their meaning."""

TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")
"""What `track` may name."""

_NAME_LIMIT = 80


@dataclass(frozen=True)
class Equality:
    """Cells that were found to be the same algorithm, by their ids.

    Attributes:
        runs: the cell that is trained.
        merged: the cells that it stands for.
        groups: the groups of all of them.
    """

    runs: str
    merged: tuple[str, ...]
    groups: tuple[str, ...]


@dataclass(frozen=True)
class Grid:
    """A study: its cells, and what is needed to run and to report them.

    Attributes:
        cells: in a deterministic order.
        axes: each varied field by its dotted key, with its values as written.
        baseline: the group of the configuration without changes; None where the study does not contain it.
        file, text: where the grid file is, and what it says.
        equalities: cells that were merged because their gradients are equal (`klab.harness.dispatch.merging`).
        analysis: the analysis as stated in the file; None where it states none.
        stated: the groups that the stated contrasts compare with the baseline.
        claims: what is claimed of the cells, and which of them each claim compares.
        budget: the most that it may use; None: no limit.
        notify: whom it tells of its events; None: nobody.
        evaluations: what finished policies are evaluated on besides their task; None: nothing.
        tuning: what every configuration chooses for itself before it runs; `cells` are the configurations as written.
        fraction: with design fractional, what was chosen, and from how many.
    """

    name: str
    description: str
    cells: tuple[Cell, ...]
    axes: Mapping[str, tuple[Any, ...]]
    design: str
    seeds: tuple[int, ...]
    baseline: str | None
    resources: Resources
    track: tuple[str, ...]
    file: str
    text: str
    equalities: tuple[Equality, ...] = ()
    analysis: AnalysisPlan | None = None
    stated: tuple[str, ...] = ()
    tuning: Tuning | None = None
    budget: Budget | None = None
    notify: Notify | None = None
    fraction: Fraction | None = None
    evaluations: Evaluations | None = None
    claims: tuple[StatedClaim, ...] = ()

    @cached_property
    def groups(self) -> tuple[str, ...]:
        """Configurations without their seeds, in order."""
        return tuple(dict.fromkeys(cell.group for cell in self.cells))

    def cell(self, identity: str) -> Cell:
        """The cell with this id, or the only one whose id contains it.

        Raises:
            UserError: when there is none, or more than one.
        """
        cells = {cell.id: cell for cell in self.cells}
        found = matching_ids(identity, cells)
        if len(found) != 1:
            problem = "no such cell" if not found else f"{len(found)} cells fit"
            raise UserError(problem, file=self.file, value=identity, allowed=found or cells)
        return cells[found[0]]


def load_grid(path: str | Path) -> Grid:
    """Reads a grid file.

    Raises:
        UserError: naming the file, the key, the value, and the nearest valid one.
    """
    file = Path(path)
    return parse_grid(read_text(file), file)


def parse_grid(text: str, file: str | Path) -> Grid:
    """The grid that a file's text describes; ``file`` is named in errors."""
    data = parse_yaml(text, file)
    try:
        return _grid(data, str(file), text)
    except UserError as error:
        raise error.with_location(file=file) from None


def _grid(data: dict[str, Any], file: str, text: str) -> Grid:
    for key in data:
        if key not in KEYS:
            raise UserError("unknown key", value=key, allowed=KEYS)
    name = _name(data.get("name"))
    description = data.get("description", "")
    if not isinstance(description, str):
        raise UserError("not a text", key="description", value=description)
    seeds = _seeds(data.get("seeds", 1))
    resources = _resources(data.get("resources", {}), Path(file))
    if "task" not in data:
        raise UserError("missing: which task is trained?", key="task")
    baseline = Variant.from_sections(data)
    builder = CellBuilder(automatic_dtype(resources.gpus, resources.gpu_type))
    expansion = expand(
        baseline, data, builder.settings, lambda variant: builder.cell(variant, seeds[0], count=False).group
    )
    variants, axes = expansion.variants, expansion.axes
    cells: dict[str, Cell] = {}
    spellings: dict[str, dict[str, None]] = {}
    first = [builder.cell(variant, seeds[0]) for variant in variants]
    for cell in first:
        known = cells.setdefault(cell.id, cell)
        if known is not cell and known.identity != cell.identity:
            raise UserError("two different cells have the same id; change a value slightly", value=cell.id)
        spellings.setdefault(cell.id, {}).update(dict.fromkeys(cell.spellings))
    if resources.launcher is not None:
        refuse_launcher(cell.training for cell in cells.values())
        refuse_moving_references((cell.training for cell in cells.values()), launcher_kind(resources.launcher))
    refuse_unequal_shares((cell.training for cell in cells.values()), resources.nodes * resources.processes_per_node)
    cells = _with_seeds(cells, spellings, seeds)
    tuning = read_tuning(data["tune"], _seeds, seeds, axes, variants, builder) if "tune" in data else None
    builder.refuse_idle()
    base = next((variant for variant in variants if not variant.changes), None)
    base_group = builder.cell(base, seeds[0]).group if base else _baseline(builder, baseline, cells.values())
    analysis = _analysis(data, seeds)
    return Grid(
        name=name,
        description=description.strip(),
        cells=tuple(cells.values()),
        axes=axes,
        design=expansion.design,
        seeds=seeds,
        baseline=base_group,
        resources=resources,
        track=_track(data.get("track", [])),
        file=file,
        text=text,
        analysis=analysis,
        stated=_stated(analysis, builder, baseline, base_group, cells.values()) if analysis else (),
        tuning=tuning,
        budget=load_section("budget", data["budget"]) if "budget" in data else None,  # type: ignore[arg-type]
        notify=load_section("notify", data["notify"]) if "notify" in data else None,  # type: ignore[arg-type]
        fraction=expansion.fraction,
        evaluations=_evaluations(data["evaluate"], Path(file)) if "evaluate" in data else None,
        claims=read_claims(data["claims"], variants, first, axes, builder.settings, baseline, analysis)
        if "claims" in data
        else (),
    )


def _evaluations(given: object, file: Path) -> Evaluations:
    """The section, with its files where they are: relative to the grid file."""
    section: Evaluations = load_section("evaluate", given)  # type: ignore[assignment]
    names = []
    for name in section.lm_eval:
        path = file.parent / Path(name).expanduser()
        if not name.endswith((".yaml", ".yml")):
            names.append(name)
        elif path.is_file():
            names.append(str(path.absolute()))
        else:
            raise UserError("no such file", key="evaluate.lm_eval", value=name, hint="It is relative to the grid file.")
    return section.model_copy(update={"lm_eval": tuple(names)})


def _resources(given: object, file: Path) -> Resources:
    """The section, with the launcher's configuration where it is: beside the grid file, or in the working folder."""
    resources: Resources = load_section("resources", given)  # type: ignore[assignment]
    if resources.launcher is None or resources.launcher.accelerate is None:
        return resources
    written = Path(resources.launcher.accelerate).expanduser()
    found = next((path for path in (file.parent / written, written) if path.is_file()), None)
    if found is None:
        raise UserError("no such file", key="resources.launcher.accelerate", value=str(written))
    check_accelerate_file(found, resources)
    return resources.model_copy(update={"launcher": Launcher(accelerate=str(found.absolute()))})


def _analysis(data: Mapping[str, Any], seeds: Sequence[int]) -> AnalysisPlan | None:
    if "analysis" not in data:
        return None
    plan: AnalysisPlan = load_section("analysis", data["analysis"])  # type: ignore[assignment]
    for name in plan.scores:
        parse_score(name, "analysis.score")
    if plan.stop is not None and plan.stop.seeds < len(seeds):
        raise UserError(
            f"fewer than the {len(seeds)} seeds of the study", key="analysis.stop.seeds", value=plan.stop.seeds
        )
    return plan


def _stated(
    plan: AnalysisPlan, builder: CellBuilder, baseline: Variant, base_group: str | None, cells: Iterable[Cell]
) -> tuple[str, ...]:
    """The groups of the stated contrasts."""
    groups = dict.fromkeys(cell.group for cell in cells)
    factory = VariantFactory(baseline)
    found: dict[str, None] = {}
    for index, change in enumerate(plan.contrasts):
        key = f"analysis.contrasts.{index}"
        if base_group is None:
            raise UserError("there is no baseline to compare with in this grid", key=key, value=change)
        try:
            group = builder.cell(factory.variant(change.items()), 0, count=False).group
        except UserError as error:
            raise error.with_location(prefix=key) from None
        if group == base_group:
            raise UserError("is the baseline itself", key=key, value=change)
        if group not in groups:
            raise UserError("no cell of this grid is the baseline with these changes", key=key, value=change)
        if group in found:
            raise UserError("duplicate contrast", key=key, value=change)
        found[group] = None
    return tuple(found)


def _with_seeds(
    first: Mapping[str, Cell], spellings: Mapping[str, Mapping[str, None]], seeds: Sequence[int]
) -> dict[str, Cell]:
    """The cells of every seed, with all spellings, from the cells of the first seed."""
    cells: dict[str, Cell] = {}
    for identity, cell in first.items():
        words = spellings[identity]
        if len(words) > 1:
            cell = replace(cell, spellings=tuple(words))
        for seeded in cell.with_seeds(seeds):
            if seeded.id in cells:
                raise UserError("two different cells have the same id; change a value slightly", value=seeded.id)
            cells[seeded.id] = seeded
    return cells


def _baseline(builder: CellBuilder, variant: Variant, cells: Iterable[Cell]) -> str | None:
    """The group of the baseline configuration where some cell has it, in whatever spelling."""
    try:
        group = builder.cell(variant, 0, count=False).group
    except UserError:
        return None
    return group if any(cell.group == group for cell in cells) else None


def _name(name: object) -> str:
    if isinstance(name, int | float):
        raise UserError("text belongs here", key="name", value=name, hint=f"Put it in quotes: '{name}'.")
    if not isinstance(name, str) or not name.strip():
        raise UserError("missing: the study needs a name", key="name", value=name)
    allowed = all(letter.isalnum() or letter in "-_." for letter in name)
    if not allowed or name.startswith(".") or len(name) > _NAME_LIMIT:
        raise UserError("is a folder's name: letters, digits, '-', '_' and '.' only", key="name", value=name)
    return name


def _seeds(seeds: object) -> tuple[int, ...]:
    if isinstance(seeds, int) and not isinstance(seeds, bool):
        if not 1 <= seeds <= 100_000:
            raise UserError("not a count of at least 1 or a list of seeds", key="seeds", value=seeds)
        return tuple(range(seeds))
    if (
        isinstance(seeds, list)
        and seeds
        and all(isinstance(seed, int) and not isinstance(seed, bool) for seed in seeds)
    ):
        if len(set(seeds)) < len(seeds):
            raise UserError("duplicate seed", key="seeds", value=seeds)
        if min(seeds) < 0 or max(seeds) >= 2**63:
            raise UserError("seeds are whole numbers from 0 to 2^63 − 1", key="seeds", value=seeds)
        return tuple(seeds)
    raise UserError("not a count of at least 1 or a list of seeds", key="seeds", value=seeds)


def _track(track: object) -> tuple[str, ...]:
    names = [track] if isinstance(track, str) else track
    if not isinstance(names, list):
        raise UserError("not a list", key="track", value=track, allowed=TRACKERS)
    for name in names:
        if name not in TRACKERS:
            raise UserError("unknown tracker", key="track", value=name, allowed=TRACKERS)
    return tuple(dict.fromkeys(names))
