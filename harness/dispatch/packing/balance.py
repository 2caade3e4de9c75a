"""Pack sizes that minimise the time until the last worker ends, from measured step times.

Measured are seconds per update and cell (`step_times`), by pack size. Of a size that was not measured, seconds per
update of the whole pack lie on the line between its measured neighbours; below the smallest and above the largest, a
cell takes as long as at that one.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections.abc import Collection, Iterable, Mapping, Sequence

START_SECONDS = 1.0
"""What a pack costs besides its updates: a process forked, weights loaded, policies saved."""

LARGEST = 32
"""Cells per pack at most: what a killed job may cost, and the memory that it may take."""

_APART = 2**0.5

NOISE = 1.1
"""Times that differ by less than this factor are alike."""


def without_noise(measured: Mapping[int, float], usual: int) -> dict[int, float]:
    """Seconds per update and cell by pack size, where what hardly differs from the usual size's does not differ: a
    machine is never so quiet that a smaller pack could be preferred for less."""
    known = measured.get(usual)
    if known is None:
        return dict(measured)
    return {size: known if known / NOISE < each < known * NOISE else each for size, each in measured.items()}


def pack_seconds(measured: Mapping[int, float], updates: int, most: int) -> list[float]:
    """Seconds that packs of 1 to `most` cells take, never less for more cells.

    Args:
        measured: pack size -> seconds per update and cell; at least one.
        updates: of each cell.
    """
    found: list[float] = []
    for size in range(1, most + 1):
        seconds = START_SECONDS + updates * _step_seconds(measured, size)
        found.append(max(seconds, found[-1]) if found else seconds)
    return found


def _step_seconds(measured: Mapping[int, float], size: int) -> float:
    known = sorted(measured)
    at = bisect_left(known, size)
    if at == len(known) or at == 0 or known[at] == size:
        return size * measured[known[min(at, len(known) - 1)]]
    below, above = known[at - 1], known[at]
    low, high = below * measured[below], above * measured[above]
    return low + (high - low) * (size - below) / (above - below)


def pack_sizes(count: int, workers: int, seconds: Sequence[float], exploratory_size: int | None = None) -> list[int]:
    """Sizes of packs of `count` cells, in the order in which free workers should take them.

    Equal shares are best where more cells never take less time, so each worker's share of cells is cut into the packs
    that take least together: packs of sizes that differ by one at most, where that costs nothing.

    Args:
        seconds: that packs of 1, 2, … cells take, not decreasing.
        trial: a size to take first, in one pack; it must fit into a worker's share.
    """
    lists = []
    for worker, share in enumerate(even_sizes(count, min(workers, count))):
        first = [exploratory_size] if exploratory_size is not None and worker == 0 else []
        lists.append([*first, *_cut(share - sum(first), seconds)])
    starts = []
    for worker, sizes in enumerate(lists):
        at = 0.0
        for size in sizes:
            starts.append((at, worker, size))
            at += seconds[min(size, len(seconds)) - 1]
    return [size for _, _, size in sorted(starts)]


def exploratory_size(measured: Mapping[int, float], share: int, running: Collection[int] = ()) -> int | None:
    """A size whose step time is worth knowing: half or twice the best one, if nothing near it was measured or is
    `running`, and a worker's `share` of cells has room for a pack of it and one of the best size; for half the size,
    which gains less often, for four of the best."""
    best = min(measured, key=lambda size: (measured[size], -size))
    for size, room in ((2 * best, 3 * best), (best // 2, 4 * best)):
        known = any(size / _APART <= other <= size * _APART for other in (*measured, *running))
        if 1 <= size <= LARGEST and room <= share and not known:
            return size
    return None


def makespan(lengths: Iterable[float], workers: int) -> float:
    """When the last worker ends, if each takes the next pack as soon as it is free."""
    ends = [0.0] * max(1, workers)
    for length in lengths:
        heapq.heapreplace(ends, ends[0] + length)
    return max(ends)


def even_sizes(count: int, parts: int) -> list[int]:
    """`count` in so many sizes that differ by one at most, larger ones first."""
    small, larger = divmod(count, parts)
    return [small + (part < larger) for part in range(parts)]


def _cut(count: int, seconds: Sequence[float]) -> list[int]:
    """The sizes that take least together, one after the other."""
    best = [0.0]
    last = [0]
    for cells in range(1, count + 1):
        choices = ((best[cells - size] + seconds[size - 1], -size) for size in range(1, min(cells, len(seconds)) + 1))
        least, size = min(choices)
        best.append(least)
        last.append(-size)
    sizes = []
    left = count
    while left:
        sizes.append(last[left])
        left -= last[left]
    if not sizes:
        return []
    alike = even_sizes(count, len(sizes))
    if sum(seconds[size - 1] for size in alike) <= best[count] * (1 + 1e-9):
        return alike
    return sorted(sizes, reverse=True)
