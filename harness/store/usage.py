"""What the cells of a run have used so far, from their attempts: hours of GPUs, of cores, and by the clock."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from klab.grid import UserError

if TYPE_CHECKING:
    from klab.harness.store.cell_folder import CellFolder
    from klab.harness.store.run import Run

_Span = tuple[float, float]


@dataclass(frozen=True)
class Usage:
    """Hours of GPUs, of cores, and by the clock. Names are those of the section `budget`."""

    gpu_hours: float = 0.0
    cpu_hours: float = 0.0
    hours: float = 0.0

    def __add__(self, other: Usage) -> Usage:
        return Usage(self.gpu_hours + other.gpu_hours, self.cpu_hours + other.cpu_hours, self.hours + other.hours)

    def of(self, name: str) -> float:
        """One of the three, by its name."""
        return float(getattr(self, name))


def used(run: Run, now: float | None = None) -> Usage:
    """What the attempts of all cells of a run have used until now.

    Cells that one process trains together count once. An attempt that was killed counts until its last sign of life.
    A cell whose folder is damaged counts for nothing.

    Args:
        now: seconds since 1970; None: by this machine's clock.
    """
    moment = time.time() if now is None else now
    jobs: dict[tuple[Any, ...], list[_Span]] = {}
    for identity in run.cells:
        try:
            attempts = spans(run.cell(identity), moment)
        except UserError:
            continue
        for start, end in attempts:
            key = (start.get("host"), start.get("pid"), _gpus(start), _cores(start))
            jobs.setdefault(key, []).append((float(start["at"]), end))
    lengths = {key: _length(found) / 3600 for key, found in jobs.items()}
    return Usage(
        sum(hours * key[2] for key, hours in lengths.items()),
        sum(hours * key[3] for key, hours in lengths.items()),
        _length(span for found in jobs.values() for span in found) / 3600,
    )


def span(run: Run, now: float | None = None) -> _Span | None:
    """When the first attempt of a cell began and the last one ended, in seconds since 1970; None where none was made.

    Args:
        now: as in `used`.
    """
    moment = time.time() if now is None else now
    found = []
    for identity in run.cells:
        with suppress(UserError):
            found += [(float(start["at"]), end) for start, end in spans(run.cell(identity), moment)]
    return (min(begin for begin, _ in found), max(end for _, end in found)) if found else None


def spans(folder: CellFolder, now: float) -> list[tuple[Mapping[str, Any], float]]:
    """Every attempt of a cell: how it started, and when it ended, in seconds since 1970.

    Raises:
        UserError: a file of the cell is damaged.
    """
    events = folder.attempts()
    found: list[tuple[Mapping[str, Any], float]] = []
    for place, event in enumerate(events):
        if event["event"] != "started":
            continue
        begin, rest = float(event["at"]), events[place + 1 :]
        after = next((each for each in rest if each["event"] in ("started", "ended", "cancelled")), None)
        if after is not None and after["event"] != "started":
            end = float(after["at"])
        elif after is not None:  # killed; the next attempt noted what was last seen of it
            end = _number(after.get("seen"))
        elif _is_alive(folder, event):
            end = now
        else:
            end = _number((folder.heartbeat() or {}).get("at"))
        found.append((event, max(begin, end)))
    return found


def _is_alive(folder: CellFolder, start: Mapping[str, Any]) -> bool:
    holder = folder.claim_holder()
    return holder is not None and holder.get("pid") == start.get("pid")


def _gpus(start: Mapping[str, Any]) -> int:
    counted = start.get("gpus")
    if isinstance(counted, int):
        return counted
    return len([name for name in str(start.get("gpu", "")).split(",") if name.strip() not in ("", "-1")])


def _cores(start: Mapping[str, Any]) -> int:
    counts = (start.get("processes"), start.get("threads"))
    processes, threads = (count if isinstance(count, int) and count > 0 else 1 for count in counts)
    return processes * threads


def _length(found: Iterable[_Span]) -> float:
    """Seconds that at least one of the spans covers."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(found):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else 0.0


def shown(usage: Usage, limits: Mapping[str, float], units: Mapping[str, str]) -> Sequence[str]:
    """What was used of every limit, in words: `3.2 of 200 GPU-hours`."""
    return [f"{usage.of(name):.3g} of {limit:g} {units[name]}" for name, limit in limits.items()]
