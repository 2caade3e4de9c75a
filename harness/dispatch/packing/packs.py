"""Packs: which cells one job trains together."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, Literal

from klab.grid.schema.training import NUMERICALLY_IDLE, STACKABLE
from klab.harness.dispatch.backends import Pack
from klab.harness.dispatch.packing.balance import (
    LARGEST,
    even_sizes,
    exploratory_size,
    makespan,
    pack_seconds,
    pack_sizes,
    without_noise,
)

PACK_SIZE = 16
"""Cells per job at most, where no step time of their shape was measured and the grid file says nothing."""

STACKED_BYTES = 2**25
"""Weights up to this size are worth stacking by default; of a larger model each cell gets a job of its own."""

_WEIGHTS = ("*.safetensors", "*.bin")

_IDLE = (
    "updates",
    "evaluate_every",
    "evaluation_prompts",
    "evaluation_samples",
    "final_evaluation_samples",
    *NUMERICALLY_IDLE,
)
"""Training settings that do not change what an update takes."""


def stacking_key(resolved: Mapping[str, Any]) -> str:
    """Cells with equal keys can be stacked; seeds, objectives and optimizer settings may differ."""
    training = {key: value for key, value in resolved["training"].items() if key not in STACKABLE}
    return json.dumps([resolved["task"], resolved["policy"], training], sort_keys=True)


def stacking_keys(cells: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """The `stacking_key` of every cell; computed once for cells that share their sections."""
    known: dict[tuple[int, ...], str] = {}
    found: dict[str, str] = {}
    for identity, resolved in cells.items():
        key = tuple(id(resolved[name]) for name in ("task", "policy", "training"))
        if key not in known:
            known[key] = stacking_key(resolved)
        found[identity] = known[key]
    return found


def cost_key(resolved: Mapping[str, Any]) -> str:
    """A short key that is equal for cells whose updates take equally long."""
    training = {key: value for key, value in resolved["training"].items() if key not in (*STACKABLE, *_IDLE)}
    text = json.dumps([resolved["task"], resolved["policy"], training], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Plan:
    """Packs in the order in which workers take them, and where their sizes come from: the user's setting, measured
    step times (of all shapes, or of some), or the default."""

    packs: tuple[Pack, ...]
    sizes_from: Literal["cells_per_job", "measured", "partly measured", "default"]


def make_packs(
    cells: Mapping[str, Mapping[str, Any]],
    size: int | None = None,
    workers: int = 1,
    step_times: Mapping[str, Mapping[int, float]] | None = None,
    running: Collection[int] = (),
) -> Plan:
    """Packs of cells of equal shape.

    They come in the given order, or longest first where there are several shapes, all with known step times.

    Args:
        cells: id -> resolved cell.
        size: cells per pack at most. None chooses so that the workers end together: from step times where they were
            measured, else at most `PACK_SIZE`, with packs of one for policies that are not small.
        workers: jobs that run at the same time.
        step_times: `cost_key` -> pack size -> seconds per update and cell (`read_step_times`).
        running: sizes of packs that run now.
    """
    groups = _groups(cells, step_times or {})
    known = [group for group in groups if group.measured]
    if size is not None or len(known) < len(groups):
        weights = [float(len(group.members)) for group in groups]
    else:
        weights = [group.least() for group in groups]
    packs: list[Pack] = []
    lengths: list[float] = []
    for group, weight in zip(groups, weights, strict=True):
        own = worker_share(weight, sum(weights), workers)
        sizes, seconds = group.sizes(own, size, running)
        bounds = [0, *accumulate(sizes)]
        packs += [Pack(tuple(group.members[begin:end])) for begin, end in pairwise(bounds)]
        lengths += [seconds[each - 1] if seconds else math.nan for each in sizes]
    if size is None and len(known) == len(groups) > 1:
        packs = _longest_first(packs, lengths, workers)
    if size is not None:
        return Plan(tuple(packs), "cells_per_job")
    if not known:
        return Plan(tuple(packs), "default")
    return Plan(tuple(packs), "measured" if len(known) == len(groups) else "partly measured")


@dataclass(frozen=True, slots=True)
class _Group:
    """Cells of one shape; `measured` is empty where nothing was, or where the model is too large for packs."""

    members: list[str]
    updates: int
    small: bool
    measured: Mapping[int, float]

    def least(self) -> float:
        """Seconds of one worker for all of them."""
        return len(self.members) * self.updates * min(self.measured.values())

    def sizes(self, workers: int, size: int | None, running: Collection[int]) -> tuple[list[int], list[float]]:
        """Sizes of packs, and, if known, the seconds of packs of 1, 2, … cells."""
        count = len(self.members)
        if size is not None or not self.small:
            most = size or 1
            return [min(most, count - start) for start in range(0, count, most)], []
        if not self.measured:
            rounds = math.ceil(count / (PACK_SIZE * workers))
            return even_sizes(count, min(count, rounds * workers)), []
        new = exploratory_size(self.measured, math.ceil(count / workers), running)
        usual = max(PACK_SIZE, min(LARGEST, max(self.measured)))
        seconds = pack_seconds(self.measured, self.updates, max(usual, new or 1))
        return pack_sizes(count, workers, seconds[:usual], new), seconds


def _groups(cells: Mapping[str, Mapping[str, Any]], step_times: Mapping[str, Mapping[int, float]]) -> list[_Group]:
    alike: dict[str, list[str]] = {}
    for identity, form in stacking_keys(cells).items():
        alike.setdefault(form, []).append(identity)
    groups = []
    for members in alike.values():
        first = cells[members[0]]
        small = _is_small(first["policy"]) and first["training"].get("engine", "klab") == "klab"
        times = step_times.get(cost_key(first), {}) if small and step_times else {}
        updates = int(first["training"].get("updates", 1))
        groups.append(_Group(members, updates, small, without_noise(times, PACK_SIZE)))
    return groups


def _longest_first(packs: list[Pack], lengths: list[float], workers: int) -> list[Pack]:
    """Longest first, unless the workers would end later than with the packs as given."""
    longest = sorted(range(len(packs)), key=lambda at: -lengths[at])
    if makespan((lengths[at] for at in longest), workers) > makespan(lengths, workers):
        return packs
    return [packs[at] for at in longest]


def _is_small(policy: Mapping[str, Any]) -> bool:
    """Whether a policy's weights are known to be small: a tiny policy's, or those in a folder of this machine."""
    if policy.get("name") != "hf":
        return True
    folder = Path(str(policy["model"])).expanduser()
    if not folder.is_dir():
        return False
    return sum(file.stat().st_size for pattern in _WEIGHTS for file in folder.glob(pattern)) <= STACKED_BYTES


def worker_share(part: float, total: float, workers: int) -> int:
    """How many of the workers a group with `part` of the `total` work keeps busy; at least one."""
    return max(1, round(workers * part / total))
