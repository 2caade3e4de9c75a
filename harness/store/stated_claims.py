"""The claims that a study states, as the manifest keeps them, with when they were stated.

A claim that is withdrawn after there were results stays in the record.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from klab.harness.store import files

if TYPE_CHECKING:
    from pathlib import Path

    from klab.grid import Grid
    from klab.grid.claims import StatedClaim

KEY = "claims"


@dataclass(frozen=True)
class RecordedClaim:
    """A claim as the manifest keeps it.

    Attributes:
        stated: the claim, and the groups that it compares.
        results: how many cells of the run had a result when it was stated. 0: nobody can have looked.
        withdrawn: how many had one when it was gone from the grid file; None while it stands there.
    """

    stated: StatedClaim
    results: int
    withdrawn: int | None


def recorded_claims(manifest: Mapping[str, Any], file: Path) -> tuple[RecordedClaim, ...]:
    """The claims of a run.

    Raises:
        UserError: the record is damaged.
    """
    from klab.grid import UserError
    from klab.grid.claims import Match, StatedClaim
    from klab.grid.schema.sections import load_section

    found = []
    try:
        for record in manifest.get(KEY, ()):
            claim: Any = load_section("claims", record["claim"])
            matches = [
                Match(tuple(map(str, one)), tuple(map(str, other)), bool(alike))
                for one, other, alike in record["matches"]
            ]
            withdrawn = record["withdrawn"]
            found.append(
                RecordedClaim(
                    StatedClaim(claim, tuple(matches)),
                    int(record["results"]),
                    None if withdrawn is None else int(withdrawn),
                )
            )
    except (UserError, KeyError, TypeError, ValueError, AttributeError):
        raise files.damaged_file(file, "does not say what was claimed") from None
    return tuple(found)


def recorded(
    manifest: dict[str, Any], existing: Mapping[str, Any] | None, grid: Grid, results: Callable[[], int]
) -> dict[str, Any]:
    """The manifest with what the grid claims now, and what it claimed before; itself where that is the same.

    Args:
        existing: the manifest before, if there was one.
        results: counts the cells that have a result.
    """
    known = list(manifest.get(KEY, ()))
    claims = [(each.claim.model_dump(mode="json"), _matches(each)) for each in grid.claims]
    stated = {_name(record["claim"]): record for record in known}
    if [(each["claim"], each["matches"]) for each in known if each["withdrawn"] is None] == claims:
        return manifest
    count = 0 if existing is None else results()
    records = []
    for claim, matches in claims:
        before = stated.pop(_name(claim), None)
        at, seen = (time.time(), count) if before is None else (before["at"], before["results"])
        records.append({"claim": claim, "matches": matches, "at": at, "results": seen, "withdrawn": None})
    for record in stated.values():
        if record["withdrawn"] is not None or count:
            records.append({**record, "withdrawn": count if record["withdrawn"] is None else record["withdrawn"]})
    return {**manifest, KEY: records}


def _matches(stated: StatedClaim) -> list[list[Any]]:
    return [[list(each.cells), list(each.against), each.alike] for each in stated.matches]


def _name(claim: Mapping[str, Any]) -> str:
    """What makes two claims the same: all that they say."""
    return repr(sorted(claim.items(), key=lambda item: item[0]))
