"""The analysis that a study states beforehand, as the manifest keeps it: every version, none ever replaced."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from klab.harness.store import files

if TYPE_CHECKING:
    from pathlib import Path

    from klab.grid import Grid
    from klab.grid.schema.sections import AnalysisPlan

_KEY = "analysis"


@dataclass(frozen=True)
class Version:
    """What a grid file stated at one launch.

    Attributes:
        plan: its section `analysis`; None where it had none.
        digest: SHA-256 of the section.
        at: when it was recorded, in seconds since 1970; None for a run that is older than the record.
        results: how many cells of the run had a result by then. 0: nobody can have looked.
        cells: the groups that its contrasts compare with the baseline.
    """

    plan: AnalysisPlan | None
    digest: str
    at: float | None
    results: int
    cells: tuple[str, ...]

    @property
    def beforehand(self) -> bool:
        """Whether it was stated before there was anything to look at."""
        return self.results == 0 and self.at is not None


def versions(manifest: Mapping[str, Any], file: Path) -> tuple[Version, ...]:
    """All versions, the first launch's first; one that states nothing for a run without a record.

    Raises:
        UserError: the record is damaged.
    """
    from klab.grid import UserError
    from klab.grid.schema.sections import load_section

    found = []
    try:
        for record in manifest.get(_KEY) or [_nothing()]:
            plan: Any = None if record["plan"] is None else load_section("analysis", record["plan"])
            found.append(
                Version(plan, str(record["digest"]), record["at"], int(record["results"]), tuple(record["cells"]))
            )
    except (UserError, KeyError, TypeError, ValueError):
        raise files.damaged_file(file, "does not say which analysis was stated") from None
    return tuple(found)


def recorded(
    manifest: dict[str, Any], existing: Mapping[str, Any] | None, grid: Grid, results: Callable[[], int]
) -> dict[str, Any]:
    """The manifest with what the grid states now, after what was stated before; itself where that is the same.

    Args:
        existing: the manifest before, if there was one.
        results: counts the cells that have a result.
    """
    plan = None if grid.analysis is None else grid.analysis.model_dump(mode="json")
    known = manifest.get(_KEY) or ([] if existing is None else [_nothing()])
    if known and known[-1]["digest"] == _digest(plan):
        return manifest
    record = {
        "plan": plan,
        "digest": _digest(plan),
        "at": time.time(),
        "results": results(),
        "cells": list(grid.stated),
    }
    return {**manifest, _KEY: [*known, record]}


def _nothing() -> dict[str, Any]:
    return {"plan": None, "digest": _digest(None), "at": None, "results": 0, "cells": []}


def _digest(plan: Mapping[str, Any] | None) -> str:
    return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()
