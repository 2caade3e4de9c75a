"""Stopped runs in a comparison: how far its verdicts depend on what these runs would have reached.

A run that `training.stop` ended counts with its last evaluation, carried forward; what all updates would have given is
not known. The bound: the same analysis once more with the stopped runs of every cell at the worst score that a run of
the task reached and those of the baseline at the best one, and once the other way round. Between these lies every
difference to the baseline, whatever within that range the stopped runs would have reached.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from klab.reports.inference import DIFFERS, Analysis
from klab.reports.words import MARK


@dataclass(frozen=True)
class Sensitivity:
    """What the bounds of a comparison are.

    Attributes:
        worst, best: the range of the scores that finished and stopped runs have.
        low, high: per row of the analysis's contrasts, the ends of its difference; NaN where neither the cell nor the
            baseline has a stopped run.
        depends: per row, whether its verdict is another one at an end.
        axes: axes and pairs of axes whose verdict is another one at an end.
        runs: how many stopped runs count.
    """

    worst: float
    best: float
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    depends: NDArray[np.bool_]
    axes: tuple[str, ...]
    runs: int

    def words(self, score: str) -> str:
        """The bound in two sentences."""
        count = int(self.depends.sum())
        put = (
            f"With stopped runs at {self.worst:.3g} and the baseline's at {self.best:.3g} (the range of this task's "
            f"{score}), and the other way round, "
        )
        if not count and not self.axes:
            return f"{put}every verdict is the same: none depends on what stopped runs would have reached."
        changed = f"{count} of {len(self.depends)} verdicts against the baseline change" if count else ""
        axes = (
            f"{'; so do those on' if count else 'the verdicts change on'} {', '.join(self.axes)}" if self.axes else ""
        )
        return f"{put}{changed}{axes}: these depend on what stopped runs would have reached ({MARK})."


def sensitivity(
    frame: pd.DataFrame,
    is_baseline: NDArray[np.bool_],
    analysis: Analysis,
    again: Callable[[pd.DataFrame], Analysis],
    higher: bool,
) -> Sensitivity | None:
    """The bounds of an analysis; None where no stopped run counts in it.

    Args:
        frame: what was analysed: one task, a row per run.
        is_baseline: per row, whether it is a run of the baseline.
        analysis: of that frame.
        again: analyses another frame with the same settings.
        higher: whether a higher score is better.
    """
    state = frame["state"].to_numpy(dtype=object)
    score = pd.to_numeric(frame["score"], errors="coerce").to_numpy(dtype=np.float64)
    scored = np.isfinite(score) & np.isin(state, ("finished", "stopped"))
    stopped = scored & (state == "stopped")
    if not stopped.any():
        return None
    ends = float(score[scored].min()), float(score[scored].max())
    worst, best = ends if higher else ends[::-1]

    def bounded(cells: float, baseline: float) -> Analysis:
        moved = np.where(stopped, np.where(is_baseline, baseline, cells), score)
        return again(frame.assign(score=moved))

    found = [analysis, bounded(worst, best), bounded(best, worst)]
    differences = np.stack([each.contrasts["difference"].to_numpy(dtype=np.float64) for each in found])
    verdicts = np.stack([_signed(each.contrasts) for each in found])
    columns = [str(name) for name in analysis.cells if name in analysis.contrasts and name not in ("low", "high")]
    own = {_key(row, columns): bool(row["stopped"]) for row in analysis.cells.to_dict("records")}
    reference = bool((stopped & is_baseline).any())
    touched = np.asarray(
        [reference or own[_key(row, columns)] for row in analysis.contrasts.to_dict("records")], dtype=np.bool_
    )
    low, high = (np.where(touched, end(differences, axis=0), np.nan) for end in (np.min, np.max))
    axes = [*_changed(found, "effects", ("axis",)), *_changed(found, "interactions", ("axis", "other"))]
    depends = np.asarray((verdicts != verdicts[0]).any(axis=0), dtype=np.bool_)
    return Sensitivity(worst, best, low, high, depends, tuple(axes), int(stopped.sum()))


def _key(row: object, columns: Sequence[str]) -> str:
    assert isinstance(row, dict)
    return repr([row[name] for name in columns])


def _signed(table: pd.DataFrame) -> NDArray[np.object_]:
    """The verdicts, of two opposite differences two."""
    signs = np.sign(table["difference"].to_numpy(dtype=np.float64))
    named = [
        f"{verdict} {sign:+.0f}" if verdict == DIFFERS else str(verdict)
        for verdict, sign in zip(table["verdict"], signs, strict=True)
    ]
    return np.asarray(named, dtype=object)


def _changed(found: Sequence[Analysis], name: str, keys: tuple[str, ...]) -> list[str]:
    """The rows of a table of the first analysis that have another verdict in one of the others."""
    tables: list[pd.DataFrame] = [getattr(each, name) for each in found]
    return [
        " × ".join(str(tables[0].at[row, key]) for key in keys)
        for row in range(len(tables[0]))
        if len({str(table["verdict"].iloc[row]) for table in tables}) > 1
    ]
