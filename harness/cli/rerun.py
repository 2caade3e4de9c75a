"""`klab rerun`: repeat one cell in the foreground and compare its numbers with the stored ones."""

from __future__ import annotations

import math
import struct
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from klab.grid import Cell, UserError, catalogue, user_code
from klab.grid.parameters import TERMS
from klab.grid.yaml_document import parse_value
from klab.harness.cli.arguments import RUNS, DeviceOption, JsonOption, RunArgument, RunsOption, study_of
from klab.harness.cli.repetition import repeat
from klab.harness.cli.rerun_archived import rerun_archived
from klab.harness.cli.table import console
from klab.harness.cli.text import show_json
from klab.harness.store import CellFolder, Run
from klab.harness.store.archive import Archive

_SECTIONS = ("objective", "task", "policy", "training")
_SHOWN = ("reward_final", "accuracy_final", "reverse_kl_final", "updates")


def rerun(
    run: RunArgument,
    cell: Annotated[str, typer.Argument(metavar="CELL", help="A cell's id, or any part that no other has.")],
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Change a setting, as training.lr=1e-3; may be repeated.")
    ] = None,
    keep: Annotated[
        Path | None, typer.Option("--keep", help="Keep the repetition as a run folder here; default: a scratch folder.")
    ] = None,
    device: DeviceOption = None,
    runs: RunsOption = RUNS,
    as_json: JsonOption = False,
) -> None:
    """Repeat one cell in the foreground, and say whether its numbers are those that were stored, bit for bit.

    Timings are not compared. With --set it is another cell: its main numbers are shown beside the stored ones. Of an
    archive the digests of the cell's numbers are compared, and where they differ, how far the numbers are apart. Exit
    code 1: the cell failed or the numbers differ.
    """
    opened = study_of(run, runs)
    if isinstance(opened, Archive):
        rerun_archived(opened, cell, settings or [], keep, device, as_json)
        return
    stored = opened.cell(cell)
    repeated = changed(stored, settings or [])
    with (
        tempfile.TemporaryDirectory(prefix="klab-rerun-") as scratch,
        user_code.searching(known=opened.user_code(stored.id)),
    ):
        place = keep or Path(scratch) / "run"
        folder = repeat(opened, repeated, place, device, _hardware(opened, repeated), quiet=as_json)
        error = folder.error()
        difference = None if settings else compare(stored, folder)
        results = {"stored": _main_numbers(stored), "repeated": _main_numbers(folder)}
        timeouts = {"stored": timeouts_of(stored), "repeated": timeouts_of(folder)}
        lives = {"stored": kernels_of(stored), "repeated": kernels_of(folder)}
        devices = {"stored": device_of(stored), "repeated": device_of(folder)}
        versions = other_versions(versions_of(stored), versions_of(folder))
    same = error is None and difference is None
    inputs = opened.changed_inputs(stored.id)
    if as_json:
        verdict = None if settings else same
        found = {"cell": repeated.id, "same": verdict, "difference": difference, "error": error, **results}
        show_json(
            {
                **found,
                "changed_inputs": inputs,
                "other_versions": versions,
                "kernels": lives,
                "devices": devices,
                "reward_timeouts": timeouts,
            }
        )
    else:
        _say(stored, repeated, results, error, difference, compared=not settings)
        if not settings and (text := _say_versions(versions, difference)):
            console().print(text, markup=False, soft_wrap=True)
        if inputs:
            text = f"Changed since the cell was trained: {', '.join(inputs)}. Of code, the run's copies were used."
            console().print(text, markup=False, soft_wrap=True)
        if not settings and (other := other_kernels(**lives)):
            console().print(other, markup=False, soft_wrap=True)
        if not settings and (unlike := other_device(**devices)):
            console().print(unlike, markup=False, soft_wrap=True)
        if not settings and any(timeouts.values()):
            console().print(_say_timeouts(**timeouts), soft_wrap=True, markup=False)
    if not same:
        raise typer.Exit(1)


def changed(folder: CellFolder, settings: Sequence[str]) -> Cell:
    """The cell with dotted settings replaced.

    Raises:
        UserError: for a setting that does not exist or is not valid.
    """
    if not settings:
        return folder.cell()
    resolved = {key: dict(value) if isinstance(value, Mapping) else value for key, value in folder.resolved().items()}
    for setting in settings:
        key, equals, text = setting.partition("=")
        section, dot, name = key.partition(".")
        value = _value(setting, text)
        if key == "seed" and equals:
            resolved["seed"] = value
        elif not equals or not dot or section not in _SECTIONS:
            allowed = ["seed", *(f"{each}.{field}" for each in _SECTIONS for field in resolved[each])]
            raise UserError("is not section.name=value", key="--set", value=key, allowed=allowed)
        elif name not in resolved[section] and section != "objective":
            allowed = [f"{section}.{field}" for field in resolved[section]]
            raise UserError("there is no such setting", key="--set", value=key, allowed=allowed)
        else:
            resolved[section][name] = value
    _drop_unused(resolved["objective"], {setting.partition("=")[0] for setting in settings})
    for stale in ("id", "id_version", "spellings", "algorithm"):
        resolved.pop(stale, None)
    try:
        return Cell.from_resolved(resolved)
    except UserError as error:
        raise error.with_location(prefix="--set") from None


def _value(setting: str, text: str) -> object:
    try:
        return parse_value(text)
    except UserError as error:
        raise UserError(f"not a value in YAML: {error.problem}", key="--set", value=setting) from None


def _drop_unused(objective: dict[str, Any], named: set[str]) -> None:
    """Leave out parameters of values that --set replaced."""
    used = {
        parameter
        for axis in catalogue.AXES.values()
        if (value := axis.values.get(str(objective.get(axis.name)))) is not None
        for parameter in value.parameters
    }.union(TERMS)
    for name in [name for name in objective if name in catalogue.PARAMETERS]:
        if name not in used and f"objective.{name}" not in named:
            del objective[name]


def compare(stored: CellFolder, repeated: CellFolder) -> str | None:
    """The first number in which two runs of a cell differ, in words; None when all have the same bits."""
    for name, before, after in (
        ("metrics", stored.metrics(), repeated.metrics()),
        ("evaluations", stored.evaluations(), repeated.evaluations()),
    ):
        for row, (old, new) in enumerate(zip(before, after, strict=False)):
            found = _first_difference(old, new)
            if found is not None:
                return f"{name}, update {old.get('update', row)}, {found}"
        if len(before) > len(after):
            return f"{name}: {len(before)} rows were stored, the repetition has {len(after)}"
    if stored.result() is not None and len(stored.metrics()) != len(repeated.metrics()):
        return f"metrics: {len(stored.metrics())} rows were stored, the repetition has {len(repeated.metrics())}"
    return None


def timeouts_of(folder: CellFolder) -> int:
    """How often a reward that a time limit decided was used, in the updates and evaluations of a cell."""
    return sum(row.get("reward_timeouts") or 0 for row in (*folder.metrics(), *folder.evaluations()))


def _say_timeouts(stored: int, repeated: int) -> str:
    return (
        f"Rewards that a time limit decided (reward_timeouts): {stored} in the stored cell, {repeated} here. "
        "They depend on the speed of the machine, so numbers may differ for that."
    )


def kernels_of(folder: CellFolder) -> list[dict[str, str]]:
    """The kernels that a cell was computed with, in order of first appearance: more than one where it moved."""
    records = [event for event in folder.attempts() if event["event"] == "started"]
    found: list[dict[str, str]] = []
    for record in [*records, (folder.result() or {}).get("hardware") or {}]:
        kernels = record.get("kernels")
        if isinstance(kernels, dict) and kernels not in found:
            found.append(kernels)
    return found


def other_kernels(stored: Sequence[Mapping[str, str]], repeated: Sequence[Mapping[str, str]]) -> str | None:
    """What to know where two runs of a cell, or two lives of one, had other kernels; None: all were alike."""
    if not stored or not repeated:
        return None
    before, now = (" then ".join(map(_assignments, lives)) for lives in (stored, repeated))
    if len(stored) > 1:
        return f"The stored cell was computed with {before}: its bits belong to no single machine. Here: {now}."
    if stored[0] == repeated[0]:
        return None
    return (
        f"The stored numbers were computed with {before}, these with {now}: their last digits may differ for that. "
        "Set those variables for `klab rerun` to repeat them, where this processor has those kernels."
    )


def device_of(folder: CellFolder) -> str | None:
    """What a finished cell was trained on: the name of a GPU, or `cpu`."""
    hardware = (folder.result() or {}).get("hardware")
    found = hardware.get("device") if isinstance(hardware, Mapping) else None
    return found if isinstance(found, str) else None


def other_device(stored: str | None, repeated: str | None) -> str | None:
    """What to know where a cell was repeated on another device; None: on the same, or it is not known."""
    if stored is None or repeated is None or stored == repeated:
        return None
    return f"The stored numbers were computed on {stored}, these on {repeated}: they cannot have the same bits."


def _assignments(kernels: Mapping[str, str]) -> str:
    return " ".join(f"{name}={value}" for name, value in kernels.items())


def _first_difference(old: object, new: object, where: str = "") -> str | None:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in [*old, *(key for key in new if key not in old)]:
            if str(key).startswith("seconds"):
                continue
            found = _first_difference(old.get(key), new.get(key), f"{where}.{key}" if where else str(key))
            if found is not None:
                return found
        return None
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = enumerate(zip(old, new, strict=True))
        found_in = (_first_difference(left, right, f"{where}[{place}]") for place, (left, right) in pairs)
        return next((found for found in found_in if found is not None), None)
    return None if _same_bits(old, new) else f"{where}: {old!r} was stored, now {new!r}"


def _same_bits(old: object, new: object) -> bool:
    if isinstance(old, float) and isinstance(new, float):
        return struct.pack("d", old) == struct.pack("d", new) or (math.isnan(old) and math.isnan(new))
    return type(old) is type(new) and old == new


def _hardware(origin: Run, cell: Cell) -> Mapping[str, Any]:
    """What trained the cell, as its result says; empty where the run has none of it."""
    result = origin.cell(cell.id).result() if cell.id in origin.cells else None
    found = (result or {}).get("hardware")
    return found if isinstance(found, Mapping) else {}


def _main_numbers(folder: CellFolder) -> dict[str, Any] | None:
    result = folder.result()
    return None if result is None else {key: result.get(key) for key in ("state", *_SHOWN)}


def versions_of(folder: CellFolder) -> dict[str, object]:
    """The versions of the libraries that a cell was trained with: those of its result, or of its newest start."""
    starts = [event for event in folder.attempts() if event["event"] == "started"]
    for record in (folder.result() or {}, *reversed(starts)):
        found = record.get("versions")
        if isinstance(found, dict):
            return found
    return {}


def other_versions(stored: Mapping[str, object], repeated: Mapping[str, object]) -> dict[str, list[object]]:
    """The libraries of which two runs of a cell had other versions, with both; those that one of them did not record
    are left out."""
    both = [name for name in stored if name in repeated]
    return {name: [stored[name], repeated[name]] for name in both if stored[name] != repeated[name]}


def _say_versions(versions: Mapping[str, Sequence[object]], difference: str | None) -> str | None:
    """What the two runs were made with, where that is not the same or may explain a difference."""
    if not versions:
        return None if difference is None else "Recorded versions are the same."
    changes = "; ".join(f"{name} {before}, now {now}" for name, (before, now) in versions.items())
    return f"The stored numbers were made with {changes}."


def _say(
    stored: CellFolder,
    repeated: Cell,
    results: Mapping[str, Mapping[str, Any] | None],
    error: str | None,
    difference: str | None,
    compared: bool,
) -> None:
    screen = console()
    for name, numbers in results.items():
        text = ", ".join(f"{key} {value}" for key, value in numbers.items()) if numbers else "no result"
        screen.print(f"{name}: {text}", markup=False)
    if error is not None:
        screen.print(error, markup=False, soft_wrap=True)
    elif not compared:
        screen.print(f"another cell: {repeated.id}", soft_wrap=True)
    elif difference is not None:
        screen.print(f"[red]The numbers differ[/]: {escape(difference)}", soft_wrap=True)
    elif stored.result() is None:
        screen.print("[green]Same bits[/] as far as the stored cell got.")
    else:
        screen.print("[green]The numbers match the stored ones bit for bit[/] (timings excluded).")
