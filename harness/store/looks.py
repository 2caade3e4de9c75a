"""The looks at a study: how many seeds per cell it had whenever seeds were added, and when."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

_KEY = "looks"


def looks(manifest: Mapping[str, Any]) -> tuple[int, ...]:
    """Seeds per cell at each look, the newest last; there is another look wherever seeds were added to results."""
    found = manifest.get(_KEY)
    if not isinstance(found, list):
        return (len(manifest["seeds"]),)
    return tuple(int(look["seeds"]) for look in found)


def recorded(
    manifest: dict[str, Any], existing: Mapping[str, Any] | None, results: Callable[[], int]
) -> dict[str, Any]:
    """The manifest with its present number of seeds as the newest look; itself where that is the same.

    Args:
        existing: the manifest before, if there was one.
        results: counts the cells that had a result before.
    """
    seeds = len(manifest["seeds"])
    record = {"seeds": seeds, "at": time.time()}
    if existing is None:
        return {**manifest, _KEY: [record]}
    known = list(existing.get(_KEY) or [{"seeds": len(existing["seeds"]), "at": existing["created"]}])
    if seeds <= known[-1]["seeds"]:
        return manifest
    # Seeds that were added before there was any result are no second look.
    return {**manifest, _KEY: [*(known if results() else known[:-1]), record]}


def extended(
    manifest: Mapping[str, Any], seeds: Sequence[int], most: int, cells: int, undecided: bool
) -> dict[str, Any]:
    """What the manifest says after these seeds were added to some cells.

    Args:
        most: seeds per cell that there will be at most.
        cells: how many cells got them.
        undecided: whether only those did whose comparison was open.
    """
    known = list(manifest.get(_KEY) or [{"seeds": len(manifest["seeds"]), "at": manifest["created"]}])
    number = len(manifest["seeds"]) + len(seeds)
    look = {"seeds": number, "at": time.time(), "cells": cells, "undecided": undecided}
    return {
        "seeds": [*manifest["seeds"], *seeds],
        "extended": [*manifest.get("extended", ()), *seeds],
        "most_seeds": most,
        _KEY: [*known, look],
    }


def most_seeds(manifest: Mapping[str, Any]) -> int | None:
    """Most seeds per cell as was said when seeds were first added; None where nothing was."""
    found = manifest.get("most_seeds")
    return int(found) if isinstance(found, int) else None
