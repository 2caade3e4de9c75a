"""Estimated wall-clock time of a launch, from finished cells of the same shape."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from klab.grid import UserError
from klab.harness.dispatch.backends import Pack
from klab.harness.dispatch.packing.balance import START_SECONDS, makespan
from klab.harness.dispatch.packing.packs import stacking_key, stacking_keys
from klab.harness.store import Run, scan

_RUNS = 12
_LARGEST = 16 * 2**20


@dataclass(frozen=True, slots=True)
class Estimate:
    """Wall-clock seconds until the last worker is done; the median speed behind it, and the run it was measured in."""

    seconds: float
    updates_per_second: float
    source: str


def estimate(
    cells: Mapping[str, Mapping[str, Any]], packs: Sequence[Pack], runs: Path, workers: int
) -> Estimate | None:
    """The time for these packs on so many workers; None where no cell of some shape was measured under `runs`."""
    measured = cell_seconds(cells, runs)
    if measured is None:
        return None
    seconds, source = measured
    lengths = [START_SECONDS + sum(seconds[identity] for identity in pack.cells) for pack in packs]
    paces = (seconds[identity] / int(cells[identity]["training"]["updates"]) for identity in cells)
    return Estimate(makespan(lengths, workers), 1 / max(1e-9, median(paces)), source)


def cell_seconds(cells: Mapping[str, Mapping[str, Any]], runs: Path) -> tuple[dict[str, float], str] | None:
    """The seconds of training of every cell, as its updates took in finished cells of its shape, and the run that these
    are from; None where some shape was never measured under `runs`."""
    forms = stacking_keys(cells)
    distinct = set(forms.values())
    measured, source = _measured(distinct, runs)
    if not cells or not distinct <= measured.keys():
        return None
    return {name: measured[forms[name]] * int(cells[name]["training"]["updates"]) for name in cells}, source


def _measured(wanted: set[str], runs: Path) -> tuple[dict[str, float], str]:
    """Seconds per update and cell for the wanted shapes, and the newest run that had any of them."""
    found: dict[str, float] = {}
    source = ""
    for path in _newest(runs):
        try:
            run = Run.open(path)
            times: dict[str, list[float]] = {}
            for identity, snapshot in scan(run).items():
                seconds = (snapshot.result or {}).get("seconds")
                updates = (snapshot.result or {}).get("updates")
                if isinstance(seconds, int | float) and isinstance(updates, int) and updates > 0 and seconds > 0:
                    times.setdefault(stacking_key(run.resolved(identity)), []).append(seconds / updates)
        except (UserError, OSError, KeyError):
            continue
        fresh = {each: median(values) for each, values in times.items() if each in wanted and each not in found}
        source = source or (run.name if fresh else "")
        found |= fresh
        if wanted <= found.keys():
            break
    return found, source


def _newest(runs: Path) -> Iterable[Path]:
    manifests = []
    for path in runs.glob("*/manifest.json") if runs.is_dir() else ():
        status = path.stat()
        if status.st_size <= _LARGEST:
            manifests.append((status.st_mtime, path.parent))
    return [path for _, path in heapq.nlargest(_RUNS, manifests)]
