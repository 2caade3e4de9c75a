"""The answer in words. Nothing is said to differ unless its verdict is "differs"."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from klab.reports.inference.design import TASK, Design
from klab.reports.inference.family import DIFFERS, EQUIVALENT

if TYPE_CHECKING:
    from klab.reports.inference.analysis import Analysis


_ONE_SEED = "One seed per cell: nothing can be inferred, and no difference here is evidence"


def headline(found: Analysis, design: Design, lost: bool, higher: bool, fitted: bool = False) -> str:
    """The answer to "what made a difference, and what is best?" in two or three sentences.

    Args:
        lost: no baseline has a score.
        fitted: effects are those of a model of all cells, which needs no baseline cell.
    """
    if not design.score.size:
        return f"No run has a score: none of {int(design.planned.sum())} finished."
    if fitted and lost:
        lead = _fitted_difference(found, design)
    elif not design.compared:
        lead = "There is no baseline: nothing is compared, and no verdict is given"
    elif lost:
        lead = "The baseline has no score: nothing is compared with it, and no verdict is given"
    elif design.n.max() < 2:
        lead = _ONE_SEED
    else:
        lead = _difference(found, design)
    return f"{lead}. {_best(found, design, higher)}"


def notes(design: Design, lost: bool, fitted: bool = False) -> tuple[str, ...]:
    """What a reader should know first: few seeds, lost, diverged and stopped runs; arguments as of `headline`."""
    found = []
    n = design.n
    tested = n[n >= 2]
    if tested.size and tested.min() == 2:
        found.append("Some cells have two seeds only: weak evidence, and differences must be very large to be seen.")
    if lost and fitted and design.score.size:
        found.append(
            "No cell with a score is the baseline: cells are not compared one by one. Effects are those of values "
            f"against the first value of their axis ({', '.join(_shown(levels[0]) for levels in design.levels)})."
        )
    elif lost and design.score.size:
        found.append(f"Choose {'another' if design.compared else 'a'} baseline to have verdicts.")
    lost_runs = int(design.planned.sum() - n.sum())
    if lost_runs:
        found.append(
            f"{_count(lost_runs, 'run')} of {int(design.planned.sum())} without a score "
            f"count{'s' if lost_runs == 1 else ''} as missing data."
        )
    diverged = int(design.diverged.sum())
    if diverged:
        found.append(
            f"{_count(diverged, 'diverged run')} count{'s' if diverged == 1 else ''} as the worst score that a "
            "finished run of the task reached."
        )
    if stopped := int(design.stopped.sum()):
        found.append(
            f"{_count(stopped, 'run')} stopped as hopeless (training.stop) count{'s' if stopped == 1 else ''} with the "
            "last evaluation before the stop, carried forward: a censored score, not what all updates would have given."
        )
    return tuple(found)


def _difference(found: Analysis, design: Design) -> str:
    acting = found.interactions[found.interactions["verdict"] == DIFFERS]
    moving = found.effects[found.effects["verdict"] == DIFFERS]
    size = {row["axis"]: abs(row["difference"]) for row in found.effects.to_dict("records")}
    rows = sorted(acting.to_dict("records"), key=lambda row: -abs(row["difference"]))
    for row in rows:
        # Half of the interaction outweighs both effects: the sign of each depends on the other axis.
        if abs(row["difference"]) / 2 > max(np.nan_to_num(size.get(row[key], 0.0)) for key in ("axis", "other")):
            return _crossed(row)
    if len(moving):
        strongest = sorted(moving.to_dict("records"), key=lambda row: -abs(row["difference"]))
        shown = _and([_effect(row, design) for row in strongest[:3]])
        more = f" (and {len(strongest) - 3} more)" if len(strongest) > 3 else ""
        also = f"; {rows[0]['axis']} and {rows[0]['other']} also act together" if rows else ""
        return f"{shown}{more} made the difference{also}"
    if rows:
        return _crossed(rows[0])
    compared = found.contrasts if found.across.empty else pd.concat([found.contrasts, found.across])
    differing = found.contrasts[found.contrasts["verdict"] == DIFFERS]
    if len(differing):
        top = max(differing.to_dict("records"), key=lambda row: abs(row["difference"]))
        name = _cell({column: top[column] for column in design.columns}, design)
        cells = _count(len(found.contrasts), "cell")
        return f"{len(differing)} of {cells} moved from the baseline, most {name} ({_interval(top)})"
    if (compared["verdict"] == DIFFERS).any():
        top = max(
            found.across[found.across["verdict"] == DIFFERS].to_dict("records"), key=lambda row: abs(row["difference"])
        )
        name = _cell({axis: top[axis] for axis in design.axes}, design)
        return f"Over all tasks, {name} moved from the baseline ({_interval(top)})"
    if len(compared) and (compared["verdict"] == EQUIVALENT).all():
        return f"All cells are within ±{found.delta:g} of the baseline"
    if not np.isfinite(compared["p"]).any():
        return (
            "No cell shares two seeds with the baseline: nothing can be inferred" if len(compared) else "One cell only"
        )
    n = design.n[design.n > 0]
    seeds = f"{n.min()}" if n.min() == n.max() else f"{n.min()} to {n.max()}"
    more = found.contrasts["more_seeds"].min()
    would = f" (the clearest contrast would need about {int(more)} more)" if np.isfinite(more) else ""
    return f"No difference from the baseline can be told at {seeds} seeds per cell{would}"


def _fitted_difference(found: Analysis, design: Design) -> str:
    """What the model of a fraction says, in which no cell is the baseline."""
    if design.n.max() < 2:
        return _ONE_SEED
    if (found.effects["verdict"] == DIFFERS).any() or (found.interactions["verdict"] == DIFFERS).any():
        return _difference(found, design)
    return "No effect of an axis or of a pair of axes can be told"


def _effect(row: Mapping[Any, Any], design: Design) -> str:
    reference = design.levels[design.axes.index(row["axis"])][0]
    return f"{row['axis']} ({_shown(row['value'])} against {_shown(reference)}: {_interval(row)})"


def _crossed(row: Mapping[Any, Any]) -> str:
    return (
        f"{row['axis']} and {row['other']} act together: what {row['axis']} {_shown(row['value'])} does to the score "
        f"changes by {_interval(row)} with {row['other']} {_shown(row['other_value'])}"
    )


def _best(found: Analysis, design: Design, higher: bool) -> str:
    best = found.best
    if best is None:
        return "No cell has a score"
    name = _cell(best.cell, design)
    interval = f" [{_number(best.low)}, {_number(best.high)}]" if np.isfinite(best.low) else ""
    over = " over all tasks" if len(design.tasks) > 1 else ""
    table = found.across if len(design.tasks) > 1 else found.contrasts
    keys = [column for column in design.columns if column in best.cell]
    row = next((r for r in table.to_dict("records") if all(_same(r[k], best.cell[k]) for k in keys)), None)
    if row is None:
        return f"The baseline has the best mean{over}: {_number(best.mean)}{interval}."
    sign = 1 if higher else -1
    if row["verdict"] == DIFFERS and sign * row["difference"] > 0:
        mean = f"{_number(best.mean)}{interval}"
        return f"Best is {name} with a mean{over} of {mean}, {_interval(row)} against the baseline."
    return f"No winner: the best mean{over} is that of {name}, {_number(best.mean)}{interval}."


def _same(first: Any, second: Any) -> bool:
    return first is second or repr(first) == repr(second)


def _cell(cell: dict[str, Any], design: Design) -> str:
    """The values in which a cell differs from the baseline; all where there is none."""
    parts = []
    for axis, levels in zip(design.axes, design.levels, strict=True):
        idle = axis in cell and cell[axis] is None and levels[0] is not None
        if axis in cell and len(levels) > 1 and not idle and not (design.compared and _same(cell[axis], levels[0])):
            parts.append(f"{axis} {_shown(cell[axis])}")
    if TASK in cell and len(design.tasks) > 1:
        parts.append(f"on {_shown(cell[TASK])}")
    return ", ".join(parts) or ("the baseline" if design.compared else "the only cell")


def _shown(value: Any) -> str:
    return "–" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _number(value: float) -> str:
    return f"{value:.3f}".replace("-", "−") if np.isfinite(value) else "–"


def _interval(row: Mapping[Any, Any]) -> str:
    def signed(value: float) -> str:
        return f"{value:+.3f}".replace("-", "−")

    return f"{signed(row['difference'])} [{signed(row['low'])}, {signed(row['high'])}]"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _and(words: list[str]) -> str:
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]
