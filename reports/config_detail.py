"""The page within the page: everything about one configuration."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from klab.grid import Cell
from klab.reports.comparison import Comparison
from klab.reports.figures.series import Cube, RunStates, cube, mean_curve, run_states, smoothed
from klab.reports.formulas import PrintedFormula, of_cell
from klab.reports.frame import records
from klab.reports.statistics import Array
from klab.reports.study import Study

_WIDTH, _HEIGHT, _PAD = 220.0, 90.0, 4.0
_BUDGET = 24_000
_TEXT_BUDGET = 4_000_000
_QUANTITIES = (
    ("metrics", "reward_mean", "training reward"),
    ("evaluations", "reverse_kl", "KL to the reference"),
    ("metrics", "entropy", "entropy"),
    ("metrics", "ess", "effective sample size"),
    ("metrics", "kl_behaviour", "KL to the behaviour policy"),
    ("metrics", "beta", "β"),
    ("metrics", "trust_coefficient", "coefficient of the trust region"),
    ("metrics", "entropy_coefficient", "coefficient of the entropy bonus"),
    ("metrics", "explained_variance", "variance explained by the critic"),
)
"""What is drawn per configuration, where some cell has it and it is not 0 everywhere."""


class Panel(NamedTuple):
    """A small curve: SVG path data of the mean, of the band and of each seed; the range of the vertical axis; the
    last mean.
    """

    title: str
    mean: str
    band: str
    seeds: list[str]
    low: str
    high: str
    last: str


@dataclass(frozen=True)
class Detail:
    """One configuration; texts are untrusted."""

    group: str
    label: str
    spellings: list[str]
    settings: list[tuple[str, str, bool]]
    runs: list[dict[str, Any]]
    panels: list[Panel]
    samples: list[tuple[str, list[dict[str, Any]]]]
    errors: list[tuple[int, str]]
    command: str
    algorithm: str
    formula: PrintedFormula | None


def details(study: Study, comparison: Comparison) -> list[Detail]:
    """Every configuration of a task, in the order of the ranking. Curves get coarser as configurations get many."""
    cells = study.cells[study.cells["task"] == comparison.task]
    by_group = _by(records(cells), "group")
    cubes = [
        (title, cube(study, comparison, frame, column))
        for source, column, title in _QUANTITIES
        if column in (frame := getattr(study, source)) and frame[column].fillna(0.0).any()
    ]
    states = run_states(study, comparison)
    points = int(np.clip(_BUDGET // max(len(by_group), 1), 14, 60))
    shown = 8 if len(by_group) <= 100 else 0
    position = {group: i for i, group in enumerate(comparison.groups)}
    kept = 3 if len(by_group) <= 200 else 1
    length = int(np.clip(_TEXT_BUDGET // (12 * max(len(by_group), 1)), 200, 1500))
    samples = _by(records(study.samples[study.samples["cell"].isin(set(cells["cell"]))]), "cell")
    base = settings(study.configurations[comparison.baseline]) if comparison.baseline else {}
    found = []
    for group in comparison.table["group"]:
        scores = dict(zip(comparison.seeds, comparison.scores[position[group]].tolist(), strict=True))
        part = [row | {"score": scores[row["seed"]]} for row in by_group[group]]
        cell = study.configurations[group]
        own = settings(cell)
        found.append(
            Detail(
                group=group,
                label=study.labels[group],
                spellings=[text for text in cell.spellings if text != "baseline"],
                settings=[(key, value, bool(base) and base.get(key) != value) for key, value in own.items()],
                runs=part,
                panels=[
                    panel
                    for title, data in cubes
                    if (panel := _panel(title, data, states, position[group], points, shown)) is not None
                ],
                samples=_samples(part, samples, kept, length),
                errors=[(row["seed"], row["error"]) for row in part if isinstance(row["error"], str) and row["error"]],
                command=rerun_command(study, part[0]["run"], part[0]["cell"]),
                algorithm=cell.algorithm or "",
                formula=of_cell(cell, len(by_group)),
            )
        )
    return found


def rerun_command(study: Study, name: str, identity: str) -> str:
    """What to type to repeat a cell."""
    path = study.runs[study.names.index(name)].path
    near = os.path.relpath(path)
    shown = near if not near.startswith("..") else str(path)
    return f"klab rerun {shlex.quote(shown)} {shlex.quote(identity)}"


def settings(cell: Cell) -> dict[str, str]:
    """The resolved configuration, active settings only, as dotted keys."""
    return {key: value for section, values in cell.canonical().items() for key, value in _flat(section, values)}


def _flat(key: str, value: object) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _flat(f"{key}.{name}", inner)
    elif "." in key:
        yield key, "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _by(rows: list[dict[str, Any]], key: str) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row[key], []).append(row)
    return found


def _samples(
    part: list[dict[str, Any]], samples: Mapping[str, list[dict[str, Any]]], kept: int, length: int
) -> list[tuple[str, list[dict[str, Any]]]]:
    """Completions of the first seed that has any, by moment of its training, texts cut to `length`."""
    for run in part:
        moments: dict[int, list[dict[str, Any]]] = {}
        for row in samples.get(run["cell"], []):
            moments.setdefault(int(row["update"]), []).append(row)
        if moments:
            return [
                (
                    "at the start" if update == 0 else f"after {update} updates",
                    [_cut(row, length) for row in rows[:kept]],
                )
                for update, rows in sorted(moments.items())
            ]
    return []


def _cut(row: dict[str, Any], length: int) -> dict[str, Any]:
    texts = {key: row[key] for key in ("prompt", "completion")}
    return row | {key: text if len(text) <= length else text[:length] + "…" for key, text in texts.items()}


def _panel(title: str, data: Cube, states: RunStates, row: int, points: int, shown: int) -> Panel | None:
    values = data.values[row]
    present = np.isfinite(values).any(0)
    if not present.any():
        return None
    updates, values = data.updates[present], values[:, present]
    values = smoothed(values, max(updates.size // 20, 1) | 1) if updates.size > 40 else values
    if updates.size > points:
        kept = np.unique(np.linspace(0, updates.size - 1, points).astype(int))
        updates, values = updates[kept], values[:, kept]
    own = RunStates(states.ended[row : row + 1], states.cut[row : row + 1])
    if (curve := mean_curve(Cube(updates, values[None]), own, [0])) is None:
        return None
    spread = values[np.isfinite(values)]
    low, high = float(spread.min()), float(spread.max())
    if high <= low:
        low, high = low - 0.5, high + 0.5
    length = max(int(updates[-1] - updates[0]), 1)
    x = _PAD + (_WIDTH - 2 * _PAD) * (updates - updates[0]) / length
    at = _PAD + (_WIDTH - 2 * _PAD) * (curve.updates - updates[0]) / length

    def y(heights: Array) -> Array:
        return np.asarray(np.clip(_HEIGHT - _PAD - (_HEIGHT - 2 * _PAD) * (heights - low) / (high - low), 0.0, _HEIGHT))

    band = np.isfinite(curve.low) & np.isfinite(curve.high)
    outline = ""
    if band.sum() > 1:
        outline = (
            _path(
                np.concatenate([at[band], at[band][::-1]]),
                np.concatenate([y(curve.high)[band], y(curve.low)[band][::-1]]),
            )
            + "Z"
        )
    lines = (
        [_path(x[finite], y(seed)[finite]) for seed in values[:shown] if (finite := np.isfinite(seed)).sum() > 1]
        if len(values) > 1
        else []
    )
    return Panel(title, _path(at, y(curve.mean)), outline, lines, f"{low:.3g}", f"{high:.3g}", f"{curve.mean[-1]:.3g}")


def _path(x: Array, y: Array) -> str:
    return "M" + "L".join(f"{a:.0f},{b:.1f}" for a, b in zip(x, y, strict=True))
