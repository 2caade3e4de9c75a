"""Confirming claims: both sides of those that an exploration decided, on fresh seeds, as a run of its own that judges
the same claims by these seeds alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from klab.grid import Grid, UserError
from klab.grid.schema.sections import AnalysisPlan
from klab.grid.score import DEFAULT_SCORE
from klab.harness.store.confirmation import KEY, confirms
from klab.reports.claims import Judged, judged, stated_claims
from klab.reports.confirmation import confirming, origin
from klab.reports.inference import UNDECIDED
from klab.reports.study import Study
from klab.reports.words import difference_span


@dataclass(frozen=True)
class ConfirmedClaim:
    """A claim in the exploration and in its confirmation, in words; `fresh` rests on fresh seeds only."""

    claim: str
    explored: str
    fresh: str


def claims_confirmation(study: Study, undecided: bool, seeds: int, name: str) -> tuple[Grid, dict[str, Any]]:
    """The grid of a confirmation of claims, and what its manifest says of the exploration.

    Claims of which some cell is not chosen are left out of it.

    Args:
        study: the exploration, of one run.
        undecided: whether cells of undecided claims are chosen, too.
        name: of the new run.

    Raises:
        UserError: no claim was stated, or none is decided.
    """
    (run,) = study.runs
    found = judged(study)
    if not found:
        raise UserError("states no claim about cells that it has", file=run.path)
    wanted = [each for each in found if undecided or each.verdict != UNDECIDED]
    if not wanted:
        raise UserError(
            f"none of its {len(found)} claims is decided", file=run.path, hint="--undecided confirms them all the same."
        )
    named = {group for each in wanted for group in (*each.cells, *each.against)}
    groups = [group for group in study.configurations if group in named]
    kept = [each for each in stated_claims(study) if {*each.cells, *each.against} <= named]
    names = {each.claim.claim for each in kept}
    record = {
        "cells": {},
        "of": len(study.configurations),
        "claims": {each.claim: _explored(each) for each in found},
        "dropped": [each.claim for each in found if each.claim not in names],
        "asked": asked_for(undecided),
        **origin(run),
    }
    grid = confirming(
        run,
        groups,
        seeds,
        name,
        description=f"Confirmation of {run.name}: the cells of its claims on fresh seeds",
        baseline=next((base for base in study.baselines.values() if base in named), None),
        analysis=AnalysisPlan(score=study.conduct.score or DEFAULT_SCORE, delta=study.conduct.delta),
        claims=tuple(kept),
    )
    return grid, {KEY: record}


def asked_for(undecided: bool) -> str:
    """Which claims a confirmation is of."""
    return "all" if undecided else "decided"


def confirmed_claims(study: Study, found: Sequence[Judged]) -> list[dict[str, Any]]:
    """For the page of a confirmation of claims: exploration and fresh seeds side by side, per run that is one."""
    entries = []
    for run in study.runs:
        record = confirms(run)
        if record is None or "claims" not in record:
            continue
        rows = [
            ConfirmedClaim(each.claim, str(record["claims"][each.claim]), _explored(each))
            for each in found
            if each.claim in record["claims"]
        ]
        entries.append({"run": record["run"], "of": record["of"], "rows": rows, "dropped": record["dropped"]})
    return entries


def _explored(claim: Judged) -> str:
    spans = [
        f"{f'{row.task} ' if len(claim.rows) > 1 else ''}{difference_span(row.estimate, row.low, row.high)}, "
        f"{row.n} seeds"
        for row in claim.rows
    ]
    return f"{claim.words}: {'; '.join(spans)}"
