"""Measures every combination of the five main axes into an append-only file, from which it resumes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from klab.grid import Objective, UserError
from klab.grid.catalogue import AXES
from klab.harness.exact.instance import Instance, SharedUpdates
from klab.harness.exact.tabular_setting import Setting

MAIN_AXES = ("estimator", "placement", "ratio", "weight", "advantage")
"""The axes whose product is 7 x 11 x 9 x 26 x 18 = 324,324 combinations."""

_CHUNK = 40


@dataclass(frozen=True, slots=True)
class SweepPlan:
    """Settings of a sweep: instance, drift of the current policy, group size, groups of each Monte Carlo estimate.

    Groups (multisets of trajectories) are enumerated instead of sampled where there are at most `groups` of them.
    """

    vocabulary: int = 3
    horizon: int = 3
    seed: int = 0
    drift: float = 0.3
    group_size: int = 4
    groups: int = 2_000
    aggregation: str = "sequence_mean"


def main_axes_product(aggregation: str = "sequence_mean") -> Iterator[Objective]:
    """Every combination of the main axes, defaults elsewhere."""
    for values in product(*(AXES[axis].values for axis in MAIN_AXES)):
        yield Objective(**dict(zip(MAIN_AXES, values, strict=True)), aggregation=aggregation)


def sweep(
    file: Path,
    objectives: Sequence[Objective] | None = None,
    plan: SweepPlan | None = None,
    *,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Measure every objective, append one line per canonical form to `file`, and return one row per objective.

    Lines that the file already has are not measured again; a torn last line is measured again. Objectives with equal
    canonical forms (off-policy) share one measurement.

    Args:
        file: jsonl; the first line holds the plan.
        objectives: what to measure; `main_axes_product` when None.
        plan: the setting; the default is V = H = 3, drift 0.3, groups of 4, 2,000 groups.
        workers: processes.
        progress: called with (measured, all) canonical forms.

    Raises:
        UserError: the file was written with another plan.
    """
    plan = plan or SweepPlan()
    chosen = list(main_axes_product(plan.aggregation)) if objectives is None else list(objectives)
    keys = [objective.canonical_text() for objective in chosen]
    known = _resume(file, plan)
    forms = dict(zip(keys, chosen, strict=True))
    missing = [(key, objective) for key, objective in forms.items() if key not in known]
    with file.open("a") as stream:
        for measured in _measured(missing, plan, workers):
            stream.write("".join(json.dumps(line) + "\n" for line in measured))
            stream.flush()
            known.update({line["key"]: line["numbers"] for line in measured})
            if progress is not None:
                progress(sum(key in known for key in forms), len(forms))
    return [
        {axis: getattr(objective, axis) for axis in AXES} | known[key]
        for key, objective in zip(keys, chosen, strict=True)
    ]


def _measured(
    missing: Sequence[tuple[str, Objective]], plan: SweepPlan, workers: int
) -> Iterator[list[dict[str, Any]]]:
    chunks = [(plan, missing[start : start + _CHUNK]) for start in range(0, len(missing), _CHUNK)]
    if workers <= 1 or len(chunks) <= 1:
        yield from map(_measure, chunks)
        return
    with ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        yield from pool.map(_measure, chunks)


def _measure(work: tuple[SweepPlan, Sequence[tuple[str, Objective]]]) -> list[dict[str, Any]]:
    plan, chunk = work
    setting, draws = _lab(plan)
    return [
        {"key": key, "numbers": draws.report(objective, setting, plan.group_size).numbers()} for key, objective in chunk
    ]


@lru_cache(maxsize=2)
def _lab(plan: SweepPlan) -> tuple[Setting, SharedUpdates]:
    instance = Instance(plan.vocabulary, plan.horizon, plan.seed)
    draws = SharedUpdates(instance.behaviour, plan.groups * plan.group_size, plan.groups, plan.seed)
    return instance.perturbed(plan.drift), draws


def _resume(file: Path, plan: SweepPlan) -> dict[str, dict[str, Any]]:
    """What an interrupted sweep of the same settings has measured; starts the file where there is none."""
    head = {"schema": 1, "plan": asdict(plan)}
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    if lines and lines[-1:] != [line for line in lines[-1:] if line.endswith("\n")]:
        lines = lines[:-1]  # cut off by a crash
        file.write_text("".join(lines))
    if not lines:
        file.write_text(json.dumps(head) + "\n")
        return {}
    if json.loads(lines[0]) != head:
        raise UserError("this file holds a sweep of another plan", file=str(file), hint="Choose another file.")
    rows = [json.loads(line) for line in lines[1:]]
    return {row["key"]: row["numbers"] for row in rows}
