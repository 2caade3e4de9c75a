"""`klab plan`: cells, jobs and estimated time of a grid file, and what is wrong with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from klab.grid import Cell, Grid, UserError
from klab.grid.schema.sections import Resources
from klab.grid.tuning import Stages, launched, stages
from klab.grid.variant import format_value
from klab.harness.cli.arguments import RUNS, GridArgument, JsonOption, RunsOption, grid_of
from klab.harness.cli.checked import CheckOption, Checks, show_notes
from klab.harness.cli.collector import uncollected, uncollected_unless
from klab.harness.cli.memory import JobMemory
from klab.harness.cli.merged import AT_ONCE, MergeOption, merged_grid
from klab.harness.cli.sight import DetectOption, DeviationOption, PilotOption, deviation_of, sight
from klab.harness.cli.table import console, duration, show
from klab.harness.cli.text import say, show_json
from klab.harness.dispatch.backends import Pack
from klab.harness.dispatch.budget import Price, Verdict, forecast, judge
from klab.harness.dispatch.gpus import default_device
from klab.harness.dispatch.launch import price_of
from klab.harness.dispatch.local.backend import LocalExecutor
from klab.harness.dispatch.packing.estimate import Estimate, estimate
from klab.harness.dispatch.packing.packs import Plan, make_packs
from klab.harness.dispatch.packing.step_times import HardwareKey, read_step_times
from klab.harness.dispatch.profiles import resolve_resources
from klab.harness.dispatch.tuning import pending
from klab.harness.store import Run, scan
from klab.harness.store.usage import Usage, used

_SHOWN = 40

_SIZES_FROM = {
    "cells_per_job": "as asked for (cells_per_job)",
    "measured": "from measured step times",
    "partly measured": "from measured step times where there are any, else the default",
    "default": "the default; no step time was measured here yet",
}


@uncollected_unless("measure")
def plan(
    grid: GridArgument,
    runs: RunsOption = RUNS,
    max_parallel: Annotated[int | None, typer.Option(min=1, help="Jobs at a time; default: cores or GPUs.")] = None,
    cells_per_job: Annotated[int | None, typer.Option(min=1, help="Cells that one job trains together.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="List every configuration.")] = False,
    merge: MergeOption = True,
    measure: Annotated[
        bool, typer.Option("--measure", help=f"Compare gradients even of more than {AT_ONCE} new objectives.")
    ] = False,
    check: CheckOption = True,
    pilot: PilotOption = None,
    sd: DeviationOption = None,
    detect: DetectOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what a grid file would run, what it would cost, and which differences it could see. Writes nothing."""
    with uncollected():
        study = grid_of(grid)
    folder = runs / study.name
    if detect is not None and not 0 < detect < float("inf"):
        raise UserError("not a difference above 0", key="--detect", value=detect)
    deviation = deviation_of(pilot, sd, runs, study)
    checks = Checks(study, folder, check)
    unmeasured = 0
    written = sum(len(cell.spellings) for cell in study.cells if cell.seed == study.seeds[0])
    distinct = len(study.groups)
    if merge:
        merged = merged_grid(study, folder, at_most=None if measure else AT_ONCE, quiet=as_json)
        study, unmeasured = merged.grid, merged.unmeasured
    device = default_device((cell.policy.name for cell in study.cells), study.resources.gpus)
    size = cells_per_job or study.resources.cells_per_job
    begun = launched(study)
    found = checks.finish(begun, JobMemory.planned(_resources(study), size, device))
    with uncollected():
        resolved = {cell.id: cell.resolved() for cell in begun.cells}
    done = _done(folder, list(resolved))
    left = {identity: settings for identity, settings in resolved.items() if identity not in done}
    workers = max_parallel or study.resources.max_parallel or LocalExecutor(device=device).slots()
    place = HardwareKey.for_launch("local", study.resources, device)
    planned = make_packs(left, size, workers, read_step_times(runs, place))
    packs = planned.packs
    times = estimate(left, packs, runs, workers)
    two = stages(study)
    later = _second_stage(study, folder) if two else {}
    if later:
        second = make_packs(later, size, workers, read_step_times(runs, place)).packs
        more = estimate(later, second, runs, workers)
        times = replace(times, seconds=times.seconds + more.seconds) if times and more else times or more
    verdict = _budget(study, folder, left, packs, runs, workers, device)
    seen = sight(study, deviation, detect)
    if as_json:
        record = {**_record(begun, folder, resolved, done, planned, workers, times), "sight": seen.record()}
        if two:
            counts = {"tuning": len(two.tuning), "untuned": len(two.untuned), "chosen": two.chosen + len(two.kept)}
            record["stages"] = {**counts, "open": len(later)}
        record |= {} if verdict is None else {"budget": verdict.record()}
        show_json({**record, "notes": found.notes, "memory": [need.record() for need in found.memory]})
        return
    screen = console()
    screen.print(
        f"[bold]{escape(study.name)}[/]: {len(study.cells)} cells = {len(study.groups)} configurations × "
        f"{len(study.seeds)} seeds, design {study.design}"
    )
    if len(study.groups) < written:
        screen.print(
            f"{written} written configurations; {distinct} without idle settings; "
            f"{len(study.groups)} different algorithms"
        )
    if two:
        for line in _stage_lines(study, two):
            say(line)
    if done:
        screen.print(f"{len(done)} of them have a result in {folder}", markup=False)
    first = {cell.group: cell for cell in reversed(study.cells)}
    groups = study.groups if everything else study.groups[:_SHOWN]
    show(("configuration", "stands for", "because"), [_line(first[group], study) for group in groups])
    if len(groups) < len(study.groups):
        screen.print(f"… and {len(study.groups) - len(groups)} more (--all)")
    equalities = _equalities(study)
    for equality in equalities if everything else equalities[:_SHOWN]:
        screen.print(f"same algorithm, run once: {' = '.join(equality)} (measured: equal gradients)")
    if unmeasured:
        screen.print(f"{unmeasured} objectives were never compared by measurement; --measure does, and so does launch")
    show_notes(found.notes, quiet=False)
    lines = [line for need in found.memory for line in (need.line(), need.passes_line()) if line is not None]
    for line in dict.fromkeys(lines):
        say(line)
    for number, claim in enumerate(study.claims, 1):
        say(f"claim {number}: {claim.claim.claim} ({claim.compared})")
    for line in seen.lines():
        say(line)
    for line in verdict.lines(planned=True) if verdict is not None else ():
        say(line)
    if not packs and not later:
        screen.print("nothing is left to run")
        return
    then = f", then {len(later)} cells of the second stage" if later else ""
    screen.print(
        f"{len(packs)} jobs of {_sizes(packs)} cells{then}, {workers} at a time; estimated time {_time(times)}"
    )
    screen.print(f"cells per job: {_SIZES_FROM[planned.sizes_from]}")


def _budget(
    study: Grid,
    folder: Path,
    left: Mapping[str, Mapping[str, Any]],
    packs: Sequence[Pack],
    runs: Path,
    workers: int,
    device: str | None,
) -> Verdict | None:
    """What the budget leaves of the packs: by what cells took, else by the time limits that Slurm would get; None
    without a budget."""
    if study.budget is None:
        return None
    wanted = _resources(study)
    local = LocalExecutor(device=device)
    here = price_of(local, study.resources)
    asked = Price.on_slurm(wanted)
    price = Price(max(here.gpus, asked.gpus), asked.cores, asked.limit)
    spent = used(Run.open(folder)) if (folder / "manifest.json").exists() else Usage()
    return judge(study.budget, packs, forecast(left, packs, runs, price, workers) if packs else None, spent)


def _stage_lines(study: Grid, two: Stages) -> list[str]:
    """What a study that tunes runs, stage by stage."""
    assert study.tuning is not None
    arms = len(study.groups)
    settings = "; ".join(
        f"{key} from {', '.join(map(format_value, values))}" for key, values in study.tuning.values.items()
    )
    beside = f"; beside it {len(two.untuned)} cells as written" if two.untuned else ""
    alone = f" ({len(two.kept)} more need no choice)" if two.kept else ""
    return [
        f"first stage: every configuration chooses {settings}: {len(two.tuning)} cells on {len(study.tuning.seeds)} "
        f"seeds of their own{beside}",
        f"second stage: {arms} configurations with what they chose: {two.chosen} cells{alone}",
    ]


def _second_stage(study: Grid, folder: Path) -> dict[str, Mapping[str, Any]]:
    """Cells of the second stage that have no result yet; those of unknown settings with the settings as written."""
    if (folder / "manifest.json").exists():
        run = Run.open(folder)
        open_ = [each.id for each in scan(run, sorted(run.grown)).values() if each.result is None]
        return {**pending(run), **{identity: run.resolved(identity) for identity in open_}}
    assert study.tuning is not None
    chooses = {arm for arm, settings in study.tuning.arms.items() if len(settings) > 1}
    return {cell.id: cell.resolved() for cell in study.cells if cell.group in chooses}


def _resources(study: Grid) -> Resources:
    """What the grid file asks for, on top of the profile that it names, if there is such a profile here."""
    try:
        return resolve_resources(study.resources)
    except UserError:
        return study.resources


def _equalities(study: Grid) -> list[tuple[str, ...]]:
    return list(dict.fromkeys(equality.groups for equality in study.equalities))


def _line(cell: Cell, study: Grid) -> tuple[str, str, str]:
    mark = "  (baseline)" if cell.group == study.baseline else ""
    if len(cell.spellings) < 2:
        return cell.group + mark, (cell.spellings or (cell.algorithm or "",))[0], ""
    idle = cell.objective.canonical_form(cell.training.on_policy).idle
    causes = [f"{axis} is idle: {cause}" for axis, cause in idle.items() if axis in study.axes]
    if any(equality.runs == cell.id for equality in study.equalities):
        causes.append("measured: equal gradients")
    return cell.group + mark, " = ".join(cell.spellings), "; ".join(causes)


def _done(folder: Path, identities: Sequence[str]) -> set[str]:
    if not (folder / "manifest.json").exists():
        return set()
    run = Run.open(folder)
    known = set(run.cells)
    shared = [identity for identity in identities if identity in known]
    return {each.id for each in scan(run, shared).values() if each.result is not None}


def _sizes(packs: Sequence[Pack]) -> str:
    sizes = sorted({len(pack.cells) for pack in packs})
    if not sizes:
        return "0"
    return f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"


def _time(times: Estimate | None) -> str:
    if times is None:
        return "unknown: no cell of this shape was measured yet"
    return (
        f"{duration(times.seconds)} ({times.updates_per_second:.3g} updates/s per worker, measured in {times.source})"
    )


def _record(
    study: Grid,
    folder: Path,
    resolved: dict[str, dict[str, Any]],
    done: set[str],
    planned: Plan,
    workers: int,
    times: Estimate | None,
) -> dict[str, Any]:
    return {
        "name": study.name,
        "run": str(folder),
        "baseline": study.baseline,
        "cells": [
            {
                "id": cell.id,
                "group": cell.group,
                "spellings": list(cell.spellings),
                "done": cell.id in done,
                "resolved": resolved[cell.id],
            }
            for cell in study.cells
        ],
        "equalities": [{"runs": each.runs, "merged": list(each.merged)} for each in study.equalities],
        "claims": [
            {"claim": each.claim.claim, "cells": list(each.cells), "against": list(each.against)}
            for each in study.claims
        ],
        "packs": [list(pack.cells) for pack in planned.packs],
        "sizes_from": planned.sizes_from,
        "workers": workers,
        "estimated_seconds": times.seconds if times else None,
        "measured_in": times.source if times else None,
    }
