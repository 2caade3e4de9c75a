"""Splitting a launch into job arrays that share one limit of concurrency."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Chunk:
    """One job array: tasks `first` to `first + count - 1` of a launch, `parallel` of them at a time.

    `after` is the position of the chunk that has to end before this one begins, None when it need not wait.
    """

    first: int
    count: int
    parallel: int
    after: int | None = None


def split_into_arrays(tasks: int, largest: int, cap: int | None = None) -> list[Chunk]:
    """Arrays of nearly equal size, none above `largest`, that together run at most `cap` tasks at a time.

    Each array gets its share of the cap. Where there are more arrays than the cap, they form as many chains as the cap
    allows, in each of which an array waits for the one before it.
    """
    if tasks <= 0:
        return []
    count = math.ceil(tasks / largest)
    chains = count if cap is None else min(count, cap)
    size, larger = divmod(tasks, count)
    share, bigger = (0, 0) if cap is None else divmod(cap, chains)
    found, first = [], 0
    for number in range(count):
        length = size + (number < larger)
        parallel = length if cap is None else min(length, share + (number % chains < bigger))
        found.append(Chunk(first, length, parallel, number - chains if number >= chains else None))
        first += length
    return found
