"""A curve of bounded size: of however many points, it keeps mean, lowest and highest of `BUCKETS` stretches at most."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

BUCKETS = 192
"""Stretches of a curve; when a point lies beyond the last one, neighbours are joined and each is twice as wide."""
LARGEST = 2**40
"""Points beyond this update are left out."""


@dataclass(frozen=True, slots=True)
class Point:
    """One stretch of a curve: the mean of its updates, and mean, lowest and highest of its values."""

    x: float
    y: float
    low: float
    high: float


class Series:
    """One number over updates."""

    __slots__ = ("_counts", "_highs", "_lows", "_xs", "_ys", "last", "width")

    def __init__(self) -> None:
        self.width = 1
        self.last: float | None = None
        self._counts = array("q")
        self._xs, self._ys, self._lows, self._highs = array("d"), array("d"), array("d"), array("d")

    def add(self, update: int, value: object) -> None:
        """Add a point; what is no finite number, as in the last rows of a diverged run, is no point."""
        y = finite(value)
        if y is None or not 0 <= update <= LARGEST:
            return
        self.last = y
        place = update // self.width
        while place >= BUCKETS:
            self._join()
            place = update // self.width
        missing = place + 1 - len(self._counts)
        if missing > 0:
            self._counts.extend([0] * missing)
            for kept in (self._xs, self._ys):
                kept.extend([0.0] * missing)
            self._lows.extend([math.inf] * missing)
            self._highs.extend([-math.inf] * missing)
        self._counts[place] += 1
        self._xs[place] += update
        self._ys[place] += y
        self._lows[place] = min(self._lows[place], y)
        self._highs[place] = max(self._highs[place], y)

    def points(self, width: int = 1) -> Iterator[tuple[int, Point]]:
        """The stretches that have points, each with its number, `width` updates (or this series' own width) long."""
        joined = max(1, width // self.width)
        for begin in range(0, len(self._counts), joined):
            part = slice(begin, begin + joined)
            count = sum(self._counts[part])
            if count:
                y = sum(self._ys[part]) / count
                x = sum(self._xs[part]) / count
                yield begin // joined, Point(x, y, min(self._lows[part]), max(self._highs[part]))

    def _join(self) -> None:
        self.width *= 2
        pairs = range(0, len(self._counts), 2)
        self._counts = array("q", (sum(self._counts[i : i + 2]) for i in pairs))
        self._xs = array("d", (sum(self._xs[i : i + 2]) for i in pairs))
        self._ys = array("d", (sum(self._ys[i : i + 2]) for i in pairs))
        self._lows = array("d", (min(self._lows[i : i + 2]) for i in pairs))
        self._highs = array("d", (max(self._highs[i : i + 2]) for i in pairs))


def mean_of(many: Sequence[Series]) -> list[Point]:
    """The mean of several curves where all that have points have one, with the lowest and highest of the curves there:
    the line never jumps because another run has ended or lags behind.
    """
    width = max((each.width for each in many), default=1)
    places = [found for each in many if (found := dict(each.points(width)))]
    if not places:
        return []
    common = set(places[0]).intersection(*places[1:])
    return [_mean([found[place] for found in places]) for place in sorted(common)]


def _mean(points: Sequence[Point]) -> Point:
    ys = [point.y for point in points]
    if len(points) == 1:
        return points[0]
    return Point(sum(point.x for point in points) / len(points), sum(ys) / len(ys), min(ys), max(ys))


def columns(points: Iterable[Point]) -> dict[str, list[float | None]]:
    """Points as columns for the page, five digits each; without a band where it is a line everywhere."""
    points = list(points)
    found = {"x": [_short(point.x) for point in points], "y": [_short(point.y) for point in points]}
    if any(point.low < point.high for point in points):
        found["low"] = [_short(point.low) for point in points]
        found["high"] = [_short(point.high) for point in points]
    return found


def spark(series: Series, most: int = 32) -> list[float | None]:
    """The curve in at most so many values, for a line in a table."""
    points = [point.y for _, point in series.points()]
    size = max(1, -(-len(points) // most))
    return [_short(sum(part) / len(part)) for i in range(0, len(points), size) if (part := points[i : i + size])]


def finite(value: object) -> float | None:
    """A finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _short(value: float) -> float | None:
    return float(f"{value:.5g}") if math.isfinite(value) else None
