"""Cells into packs: which cells one job trains together."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from harness.dispatch.executor import Pack

PACK_SIZE = 8
"""Cells per job unless the grid file says otherwise: stacking gains nothing beyond, and a killed job costs more."""

STACKED_BYTES = 2**25
"""Weights up to this size are worth stacking by default; of a larger model each cell gets a job of its own."""

_WEIGHTS = ("*.safetensors", "*.bin")

_FREE = ("lr", "schedule", "warmup_updates", "weight_decay", "adam_beta1", "adam_beta2", "adam_eps", "clip_norm")
"""Training settings that may differ between stacked cells, because they act on one cell's slice only."""


def shape(resolved: Mapping[str, Any]) -> str:
    """Cells with equal shapes can be stacked; seeds, objectives and optimizer settings may differ."""
    training = {key: value for key, value in resolved["training"].items() if key not in _FREE}
    return json.dumps([resolved["task"], resolved["policy"], training], sort_keys=True)


def shapes(cells: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """The shape of every cell; one that shares its sections with another cell is not worked out again."""
    known: dict[tuple[int, ...], str] = {}
    found: dict[str, str] = {}
    for identity, resolved in cells.items():
        key = tuple(id(resolved[name]) for name in ("task", "policy", "training"))
        if key not in known:
            known[key] = shape(resolved)
        found[identity] = known[key]
    return found


def make_packs(cells: Mapping[str, Mapping[str, Any]], size: int | None = None, workers: int = 1) -> list[Pack]:
    """Packs of cells of equal shape, in the given order.

    Args:
        cells: id -> resolved cell.
        size: cells per pack at most; None chooses so that the workers end together and no pack exceeds `PACK_SIZE`,
            with packs of one for policies that are not small.
        workers: jobs that run at the same time.
    """
    alike: dict[str, list[str]] = {}
    for identity, form in shapes(cells).items():
        alike.setdefault(form, []).append(identity)
    packs = []
    for members in alike.values():
        most = size or (None if _small(cells[members[0]]["policy"]) else 1)
        packs += [Pack(tuple(part)) for part in _split(members, most, share(len(members), len(cells), workers))]
    return packs


def _small(policy: Mapping[str, Any]) -> bool:
    """Whether a policy's weights are known to be small: a tiny policy's, or those in a folder of this machine."""
    if policy.get("name") != "hf":
        return True
    folder = Path(str(policy["model"])).expanduser()
    if not folder.is_dir():
        return False
    return sum(file.stat().st_size for pattern in _WEIGHTS for file in folder.glob(pattern)) <= STACKED_BYTES


def share(members: int, total: int, workers: int) -> int:
    """How many of the workers a group of `members` out of `total` cells keeps busy; at least one."""
    return max(1, round(workers * members / total))


def _split(members: list[str], size: int | None, workers: int) -> Iterable[list[str]]:
    if size is not None:
        return [members[start : start + size] for start in range(0, len(members), size)]
    rounds = math.ceil(len(members) / (PACK_SIZE * workers))
    count = min(len(members), rounds * workers)
    small, larger = divmod(len(members), count)
    starts = [position * small + min(position, larger) for position in range(count + 1)]
    return [members[begin:end] for begin, end in pairwise(starts)]
