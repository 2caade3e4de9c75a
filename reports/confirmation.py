"""Confirming an exploration: its best cells and the baseline on fresh seeds, as a run of its own with a family of its
own."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from klab.grid import Cell, Grid, UserError
from klab.grid.claims import StatedClaim
from klab.grid.schema.sections import AnalysisPlan
from klab.grid.yaml_document import dump_yaml
from klab.harness.store import Run
from klab.harness.store.confirmation import KEY, confirms
from klab.reports.comparison import Comparison
from klab.reports.frame import records
from klab.reports.study import Study
from klab.reports.words import difference_span, mean_span

FIRST_SEED = 2_000_000
"""Where fresh seeds begin: far from those of studies and of tuning."""


@dataclass(frozen=True)
class Confirmed:
    """A configuration in the exploration and in its confirmation, in words.

    `explored` is what the exploration said, which chose it; all else rests on fresh seeds only.
    """

    label: str
    explored: str
    mean: str
    difference: str
    verdict: str


def confirmation(
    study: Study, comparisons: Sequence[Comparison], top: int, seeds: int, name: str
) -> tuple[Grid, dict[str, Any]]:
    """The grid of a confirmation, and what its manifest says of the exploration.

    Args:
        study: the exploration, of one run.
        comparisons: of its tasks, by the score that chooses.
        top: how many cells of each task, the best means first; the baseline comes beside them.
        name: of the new run.

    Raises:
        UserError: the exploration has no baseline or no cell with a score.
    """
    (run,) = study.runs
    chosen: list[str] = []
    bases: list[str] = []
    for comparison in comparisons:
        if comparison.baseline is None:
            raise UserError(f"has no baseline on {comparison.task}: nothing can be confirmed", file=run.path)
        table = comparison.table
        scored = table[np.isfinite(table["mean"]) & (table["group"] != comparison.baseline)]
        chosen += scored["group"].head(top).tolist()
        bases.append(comparison.baseline)
    if not chosen:
        raise UserError("no cell but the baseline has a score", file=run.path)
    score, delta = comparisons[0].score.name, comparisons[0].analysis.delta
    rows = [record for comparison in comparisons for record in records(comparison.table)]
    explored = {
        record["group"]: {
            "label": record["label"],
            "mean": mean_span(record["mean"], record["low"], record["high"]),
            "n": int(record["n"]),
            "verdict": record["verdict"],
        }
        for record in rows
        if record["group"] in (*bases, *chosen)
    }
    record = {"cells": explored, "of": len(rows), "top": top, "score": score, **origin(run)}
    grid = confirming(
        run,
        (*bases, *chosen),
        seeds,
        name,
        description=f"Confirmation of {run.name}: its best cells and its baseline on fresh seeds",
        baseline=bases[0],
        analysis=AnalysisPlan(score=score, delta=delta),
        stated=tuple(chosen),
    )
    return grid, {KEY: record}


def origin(run: Run) -> dict[str, Any]:
    """Which run is confirmed, and its manifest at this time."""
    digest = hashlib.sha256((run.path / "manifest.json").read_bytes()).hexdigest()
    return {"run": run.name, "manifest": digest, "at": time.time()}


def confirming(
    run: Run,
    groups: Sequence[str],
    seeds: int,
    name: str,
    *,
    description: str,
    baseline: str | None,
    analysis: AnalysisPlan,
    stated: tuple[str, ...] = (),
    claims: tuple[StatedClaim, ...] = (),
) -> Grid:
    """The grid of a run with these configurations of another one on as many fresh seeds, which neither that run nor its
    tuning has used."""
    used = {int(run.resolved(identity)["seed"]) for identity in run.cells}
    start = max([FIRST_SEED, *(seed + 1 for seed in used if seed >= FIRST_SEED)])
    fresh = tuple(range(start, start + seeds))
    first = {str(run.resolved(identity)["group"]): identity for identity in reversed(run.cells)}
    cells = [cell for group in groups for cell in run.cell(first[group]).cell().with_seeds(fresh)]
    stating = {"claims": [each.claim.model_dump(mode="json") for each in claims]} if claims else {}
    return Grid(
        name=name,
        description=description,
        cells=tuple(cells),
        axes=_axes(run),
        design="list",
        seeds=fresh,
        baseline=baseline,
        resources=run.resources,
        track=tuple(run.manifest.get("track", ())),
        file=str(run.path / "grid.yaml"),
        text=dump_yaml({"confirms": run.name, **stating, "cells": [_written(cell) for cell in cells]}),
        analysis=analysis,
        stated=stated,
        claims=claims,
    )


def confirmed_rows(study: Study, comparisons: Sequence[Comparison]) -> list[dict[str, Any]]:
    """For the page of a confirmation: exploration and fresh seeds side by side, per run that confirms another."""
    found = []
    for run in study.runs:
        record = confirms(run)
        if record is None or "claims" in record:
            continue
        rows = []
        for each in (row for comparison in comparisons for row in records(comparison.table)):
            explored = record["cells"].get(each["group"])
            if explored is None:
                continue
            base = each["group"] in study.baselines.values()
            words = difference_span(each["difference"], each["difference_low"], each["difference_high"])
            rows.append(
                Confirmed(
                    str(explored["label"]),
                    f"{explored['mean']} ({explored['n']} seeds)",
                    mean_span(each["mean"], each["low"], each["high"]),
                    "the baseline" if base else words,
                    "" if base else each["verdict"],
                )
            )
        found.append({"run": record["run"], "of": record["of"], "rows": rows})
    return found


def _axes(run: Run) -> dict[str, tuple[Any, ...]]:
    axes: Mapping[str, Sequence[Any]] = run.manifest["axes"]
    return {key: tuple(values) for key, values in axes.items()}


def _written(cell: Cell) -> dict[str, Any]:
    return {key: value for key, value in cell.resolved().items() if key not in ("id_version", "spellings")}


def same_request(run: Run, asked: Mapping[str, Any], path: Path) -> None:
    """Raises UserError where an existing confirmation was asked for otherwise.

    Args:
        asked: options of `klab confirm`.
    """
    record = confirms(run)
    if record is None:
        raise UserError("is a run of its own, not a confirmation", file=path, hint="Choose another name with --name.")
    there = {"--seeds": len(run.manifest["seeds"]), "--top": record.get("top"), "--claims": record.get("asked")}
    for key, value in asked.items():
        if value != there[key]:
            raise UserError(
                f"the confirmation {run.name} has {there[key] or 'none'}",
                key=key,
                value=value,
                hint="Repeat the command as it was to go on with it, or choose another name with --name.",
            )
