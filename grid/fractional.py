"""The design `fractional`: some cells of a product of axes, chosen so that effects of axes can be told apart.

The cells are those with the least moment aberration that an exchange of single cells finds: the sum over all pairs of
chosen cells of ∏ (1 + levels) over the axes on which the two agree. Expanded, this weighs the generalized word counts
A₁, A₂, A₃, … of the design by 1, ½, ¼, …, so that single axes are balanced first, then pairs, triples and quadruples:
what main effects and two-way interactions need in order not to be taken for one another. It needs whole numbers only,
hence every machine chooses the same cells.

Source: Xu (2003), Statistica Sinica 13:691 (minimum moment aberration); Xu and Wu (2001), Annals of Statistics 29:1066
(generalized word counts).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from klab.grid.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MAX_CANDIDATES = 100_000
"""Combinations that a fraction may be chosen from; every step looks at all of them."""
_MAX_AXES = 12
_STARTS, _WORK = 24, 5_000_000
"""Several starts, where combinations times cells are few enough: an exchange ends at the nearest minimum."""
_KEYS = ("name", "cells", "holdout", "draw")


@dataclass(frozen=True)
class Fraction:
    """The chosen part of a product.

    Attributes:
        candidates: how many configurations there were to choose from.
        codes: of every configuration that effects are estimated from, the number of its value on each axis.
        levels: how many values each axis has.
        held_out: the groups of the configurations that are predicted.
    """

    candidates: int
    codes: tuple[tuple[int, ...], ...]
    levels: tuple[int, ...]
    held_out: tuple[str, ...]


@dataclass(frozen=True)
class FractionalDesign:
    """What a grid file asks for.

    Attributes:
        cells: configurations that effects are estimated from.
        holdout: further configurations, drawn at random from the rest, that are predicted from those.
        draw: another number gives another fraction of the same quality.
    """

    cells: int
    holdout: int = 0
    draw: int = 0


def read_design(given: Mapping[str, Any]) -> FractionalDesign:
    """The design as written: ``{name: fractional, cells: 200, holdout: 20, draw: 0}``.

    Raises:
        UserError: for an unknown key, and for a number that is none.
    """
    for key in given:
        if key not in _KEYS:
            raise UserError("unknown key", key="design", value=key, allowed=_KEYS)
    if "cells" not in given:
        raise UserError("missing: how many configurations?", key="design.cells")
    least = {"cells": 2, "holdout": 0, "draw": 0}
    numbers = {key: given.get(key, 0) for key in least}
    for key, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, int) or number < least[key]:
            raise UserError(f"not a whole number of at least {least[key]}", key=f"design.{key}", value=number)
    return FractionalDesign(**numbers)


def choose(codes: Sequence[Sequence[int]], design: FractionalDesign, first: int | None) -> tuple[list[int], list[int]]:
    """The chosen combinations and those held out, as increasing indices into `codes`.

    Args:
        codes: ``[N, A]``, every combination there is to choose from: the number of its value on each axis.
        first: the index of a combination that must be among the chosen ones (the baseline); None: there is none.

    Raises:
        UserError: when there are too few or too many combinations, or too many axes.
    """
    import numpy as np

    table = np.asarray(codes, dtype=np.int64)
    count, axes = table.shape
    wanted = design.cells + design.holdout
    if wanted >= count:
        raise UserError(
            f"no fraction: the axes make {count} combinations, and {wanted} are asked for",
            key="design.cells",
            value=design.cells,
            hint="Ask for fewer cells, or use design: product.",
        )
    if count > MAX_CANDIDATES:
        raise UserError(f"{count} combinations; at most {MAX_CANDIDATES} can be chosen from", key="axes")
    if axes > _MAX_AXES:
        raise UserError(f"{axes} axes; a fraction has {_MAX_AXES} at most", key="axes")
    starts = min(max(_WORK // (count * design.cells), 1), _STARTS)
    found: list[tuple[int, list[int]]] = []
    for start in range(starts):
        order = np.asarray(sorted(range(count), key=lambda index: _draw(design.draw, start, index)), dtype=np.int64)
        fixed = None if first is None else int(np.flatnonzero(order == first)[0])
        places, aberration = _exchanged(table[order], design.cells, fixed, grown=start % 2 == 0)
        found.append((aberration, order[places].tolist()))
    taken = set(min(found, key=lambda each: each[0])[1])
    rest = sorted(set(range(count)) - taken, key=lambda index: _draw(design.draw, -1, index))
    return sorted(taken), sorted(rest[: design.holdout])


def _draw(draw: int, start: int, index: int) -> bytes:
    return hashlib.sha256(f"fraction {draw} {start} {index}".encode()).digest()


def _exchanged(codes: NDArray[np.int64], size: int, start: int | None, grown: bool) -> tuple[NDArray[np.int64], int]:
    """Cells exchanged one for one while that lowers the sum over pairs, and that sum.

    Args:
        start: a cell that stays; None: none does.
        grown: begin with the best next cell each time, otherwise with any cells.
    """
    import numpy as np

    factors = [1 + len(set(column.tolist())) for column in codes.T]
    # The largest sum over a design fits into 64 bits for any axes that make so few combinations.
    assert math.prod(factors) * size < 2**62
    chosen = np.empty(size, dtype=np.int64)
    agreement = np.empty((size, len(codes)), dtype=np.int64)
    total = np.zeros(len(codes), dtype=np.int64)
    free = np.ones(len(codes), dtype=bool)
    never = np.iinfo(np.int64).max

    def put(place: int, cell: int) -> None:
        chosen[place] = cell
        agreement[place] = _agreement(codes, codes[cell], factors)
        total[:] += agreement[place]
        free[cell] = False

    for place in range(size):
        following = np.where(free, total, never) if grown else ~free
        put(place, start if place == 0 and start is not None else int(np.argmin(following)))
    kept = 0 if start is None else 1
    while True:
        moved = False
        for place in range(kept, size):
            cell = chosen[place]
            without = total - agreement[place]
            best = int(np.argmin(np.where(free, without, never)))
            if without[best] < without[cell]:
                total[:] = without
                free[cell] = True
                put(place, best)
                moved = True
        if not moved:
            return chosen, int(total[chosen].sum())


def _agreement(codes: NDArray[np.int64], cell: NDArray[np.int64], factors: Sequence[int]) -> NDArray[np.int64]:
    import numpy as np

    result = np.ones(len(codes), dtype=np.int64)
    for axis, factor in enumerate(factors):
        result[codes[:, axis] == cell[axis]] *= factor
    return result
