"""Curves in one line of text. Imports nothing heavy: `klab watch` draws with it."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

BLOCKS = "▁▂▃▄▅▆▇█"


def sparkline(
    values: Sequence[float | None], width: int = 24, low: float | None = None, high: float | None = None
) -> str:
    """`values` as block characters, averaged into at most `width` columns; a gap where nothing is finite.

    Args:
        low, high: ends of the scale; by default those of the values.
    """
    numbers = [value if value is not None and math.isfinite(value) else None for value in values]
    if not numbers:
        return ""
    columns = min(width, len(numbers))
    bins = [numbers[i * len(numbers) // columns : (i + 1) * len(numbers) // columns] for i in range(columns)]
    means = [sum(known) / len(known) if (known := [v for v in part if v is not None]) else None for part in bins]
    means = [mean if mean is not None and math.isfinite(mean) else None for mean in means]  # sums may overflow
    present = [mean for mean in means if mean is not None]
    if not present:
        return " " * columns
    bottom = min(present) if low is None else low
    top = max(present) if high is None else high
    height = min(top - bottom, sys.float_info.max)

    def block(mean: float) -> str:
        share = min(max((mean - bottom) / height, 0.0), 1.0) if height > 0 else 0.4  # the difference may overflow
        return BLOCKS[min(7, int(share * 8))]

    return "".join(" " if mean is None else block(mean) for mean in means)
