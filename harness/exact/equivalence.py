"""Finds cells that are the same algorithm: equal canonical forms, or equal gradients on probe updates.

Two cells are the same when their tasks, policies, schedules and seeds are equal and their objectives have the same
gradient, to a relative 1e-12, on the probe updates of `klab.harness.exact.probes`. Objectives with equal canonical
forms need no measurement; the others are compared by their fingerprints (`klab.harness.exact.fingerprints`).

Two exceptions, in which equal gradients of the loss are not enough:

* Where training uses more of an objective than its gradient, only equal canonical forms count: a critic learns the
  returns, which may contain a KL penalty; a sampler's correction multiplies the surrogate and not the KL term.
* Probes cannot tell apart two thresholds between which no probe ratio lies. Off-policy, objectives whose ratios or
  weights have different thresholds are never merged by measurement; but the bound of `dual_clip` does nothing where no
  advantage is negative. Shares of tokens (`entropy_share`, those of Clip-Cov and KL-Cov) keep objectives apart always.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from klab.grid import Cell, Objective
from klab.grid.schema.sections import TrainingSection
from klab.harness.exact.fingerprints import Fingerprints, Progress, fingerprints, known_fingerprints

TOLERANCE = 1e-12
"""Largest relative difference of two gradients that count as equal."""

FLOOR = 1e-14
"""Differences below this share of the whole update's gradient count as rounding in every block."""

BLOCKS = 4
"""Blocks of a fingerprint: no drift, mild drift, strong drift, and one-token trajectories with a grid of ratios."""

_THRESHOLDS = frozenset(
    f"{axis}.{name}"
    for axis in ("ratio", "weight")
    for name in (
        "eps_low", "eps_high", "c", "cap", "low", "high", "ess", "ceiling", "tv_low", "tv_high", "kl_low", "kl_high",
        "truncation", "drift", "worst", "moment", "influence", "safety", "clip_low", "clip_high", "cov_share",
        "log_low", "log_high", "log_ceiling", "growth", "tv_limit", "least_weight", "budget", "band",
    )
)  # fmt: skip
"""Parameters at which a weight or a ratio changes its formula."""

_SELECTION = ("entropy_share", "weight.cov_share", "weight.cov_low", "weight.cov_high")
"""Parameters that choose tokens of an update whatever the ratios are."""

ByKey = dict[tuple[str, bool, str], list[Cell]]
"""Cells by everything but the objective, whether they are on-policy, and canonical form."""


@dataclass(frozen=True)
class EquivalenceClass:
    """Cells that are the same algorithm.

    Attributes:
        members: in the order given; the first is the representative.
        representative: the cell that is trained for all of them.
        reason: why they are the same, one clause per distinct cause; empty for a class of one spelling.
    """

    members: tuple[Cell, ...]
    representative: Cell
    reason: str


def equivalence_classes(
    cells: Iterable[Cell],
    *,
    cache: Path | None = None,
    known: Fingerprints | None = None,
    progress: Progress | None = None,
) -> list[EquivalenceClass]:
    """Group cells into classes of equal algorithms, in the order of their first members.

    Imports torch only when some fingerprint is in neither `cache` nor the canonical form of another cell.

    Args:
        cells: the cells of a study.
        cache: folder of known fingerprints; `cache_folder()` when None.
        known: what `contested_fingerprints` read there.
        progress: called while fingerprints are computed.
    """
    by_key, objectives = _by_key(cells)
    contested = _contested(by_key)
    wanted = {key: objective for key, objective in objectives.items() if key in contested}
    marks = fingerprints(wanted, cache=cache, known=known, progress=progress)

    forms_of: dict[tuple[str, bool], list[str]] = defaultdict(list)
    for shared, on_policy, canonical in by_key:
        forms_of[shared, on_policy].append(canonical)
    partitions: dict[tuple[tuple[str, ...], bool], list[list[str]]] = {}
    classes: list[EquivalenceClass] = []
    for (shared, on_policy), forms in forms_of.items():
        alike = (tuple(forms), on_policy)
        if alike not in partitions:
            partitions[alike] = _partition(forms, on_policy, marks)
        for equal in partitions[alike]:
            members = tuple(cell for form in equal for cell in by_key[shared, on_policy, form])
            classes.append(EquivalenceClass(members, members[0], _reason(members, len(equal) > 1)))
    position = {id(cell): index for index, cell in enumerate(cell for found in by_key.values() for cell in found)}
    return sorted(classes, key=lambda found: position[id(found.representative)])


def contested_fingerprints(
    cells: Iterable[Cell], *, cache: Path | None = None
) -> tuple[Fingerprints, dict[tuple[str, bool], Objective]]:
    """What `equivalence_classes` needs: the fingerprints that the cache has, and the objectives of those it lacks.

    Needs no torch.
    """
    by_key, objectives = _by_key(cells)
    keys = _contested(by_key)
    known = known_fingerprints(keys, cache=cache) if keys else {}
    return known, {key: objective for key, objective in objectives.items() if key in keys and key not in known}


def count_classes(objectives: Iterable[Objective], on_policy: bool, *, cache: Path | None = None) -> dict[str, int]:
    """How many combinations remain: `written`, `canonical` (inactive axes merged), `measured` (equal gradients)."""
    written = 0
    forms: dict[tuple[str, bool], Objective] = {}
    for objective in objectives:
        written += 1
        forms.setdefault((objective.canonical_text(on_policy), on_policy), objective)
    marks = fingerprints(forms, cache=cache)
    measured = _partition([form for form, _ in forms], on_policy, marks)
    return {"written": written, "canonical": len(forms), "measured": len(measured)}


def _by_key(cells: Iterable[Cell]) -> tuple[ByKey, dict[tuple[str, bool], Objective]]:
    """Cells by shared settings, schedule and canonical form; and one objective of every form."""
    by_key: ByKey = defaultdict(list)
    objectives: dict[tuple[str, bool], Objective] = {}
    for cell in cells:
        on_policy = cell.training.on_policy
        canonical = cell.objective.canonical_text(on_policy)
        by_key[_shared_settings(cell), on_policy, canonical].append(cell)
        objectives.setdefault((canonical, on_policy), cell.objective)
    return by_key, objectives


def _shared_settings(cell: Cell) -> str:
    """What equal algorithms must have in common beside their gradients, as text."""
    apart = _uses_more_than_the_gradient(cell.training)
    form = cell.objective.canonical_text(cell.training.on_policy) if apart else ""
    return f"{cell.sections}@{cell.seed}{form}"


def _uses_more_than_the_gradient(training: TrainingSection) -> bool:
    """Whether training reads more of an objective than the gradient of its loss."""
    corrected = training.sampler is not None and training.sampler.multiplies
    return training.critic is not None or corrected


def _contested(by_key: ByKey) -> set[tuple[str, bool]]:
    """Canonical forms that share everything else with another form: only those need a fingerprint."""
    forms: dict[tuple[str, bool], set[str]] = defaultdict(set)
    for shared, on_policy, canonical in by_key:
        forms[shared, on_policy].add(canonical)
    return {(form, on) for (_, on), found in forms.items() if len(found) > 1 for form in found}


def _partition(forms: Sequence[str], on_policy: bool, marks: Mapping[tuple[str, bool], list[float]]) -> list[list[str]]:
    """Split canonical forms into classes of equal fingerprints, in order of appearance."""
    if len(forms) == 1:
        return [list(forms)]
    position = {form: _position(marks[form, on_policy]) for form in forms}
    runs: list[list[str]] = []
    for form in sorted(forms, key=position.__getitem__):
        slack = 10 * TOLERANCE * _size(marks[form, on_policy])
        if runs and math.isfinite(slack) and position[form] - position[runs[-1][-1]] <= slack:
            runs[-1].append(form)
        else:
            runs.append([form])
    place = {form: index for index, form in enumerate(forms)}
    classes: list[list[str]] = []
    for run in runs:
        open_classes: list[list[str]] = []
        for form in sorted(run, key=place.__getitem__):
            for members in open_classes:
                if _equal(marks[members[0], on_policy], marks[form, on_policy]) and all(
                    _select_alike(member, form) and (on_policy or _compatible(member, form)) for member in members
                ):
                    members.append(form)
                    break
            else:
                open_classes.append([form])
        classes.extend(open_classes)
    return sorted(classes, key=lambda members: place[members[0]])


def _position(mark: Sequence[float]) -> float:
    """One number that equal fingerprints share up to rounding: the first projections, summed over the blocks."""
    total = sum(mark[1 :: _per_block(mark)])
    return total if math.isfinite(total) else math.inf


def _size(mark: Sequence[float]) -> float:
    """Norm of the whole update's gradient."""
    return math.hypot(*mark[:: _per_block(mark)])


def _per_block(mark: Sequence[float]) -> int:
    return len(mark) // BLOCKS


def _near(first: Sequence[float], second: Sequence[float], whole: float) -> bool:
    """Whether one block's norm and projections agree to `TOLERANCE` of its norm."""
    slack = TOLERANCE * max(first[0], second[0]) + FLOOR * whole
    return all(abs(a - b) <= slack for a, b in zip(first, second, strict=True))


def _equal(first: Sequence[float], second: Sequence[float]) -> bool:
    if not all(map(math.isfinite, (*first, *second))):
        return False
    step, whole = _per_block(first), max(_size(first), _size(second))
    return all(
        _near(first[start : start + step], second[start : start + step], whole) for start in range(0, len(first), step)
    )


def _select_alike(first: str, second: str) -> bool:
    """Whether two canonical forms choose the tokens of an update alike."""
    here, there = json.loads(first), json.loads(second)
    return all(here.get(name) == there.get(name) for name in _SELECTION)


def _compatible(first: str, second: str) -> bool:
    """Whether the ratios and weights of two canonical forms agree in their thresholds, and in what both have."""
    here, there = json.loads(first), json.loads(second)
    shared = [key for key in here if key.startswith("weight.") and key in there]
    idle = {"weight.c"} if here["advantage"] == there["advantage"] == "positive" else set[str]()
    thresholds = [{key: form[key] for key in _THRESHOLDS.intersection(form) - idle} for form in (here, there)]
    return thresholds[0] == thresholds[1] and all(here[key] == there[key] for key in shared)


def _reason(members: Sequence[Cell], measured: bool) -> str:
    causes: dict[str, None] = {}
    if len(members) > 1 or any(len(cell.spellings) > 1 for cell in members):
        for cell in members:
            for name, cause in cell.objective.canonical_form(cell.training.on_policy).idle.items():
                causes[f"inactive {name}: {cause}"] = None
    if measured:
        causes["measured: equal gradients on the probe updates"] = None
    return "; ".join(causes)
