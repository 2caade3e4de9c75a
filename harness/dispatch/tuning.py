"""From the first stage of a tuned run to its second: every arm keeps the setting with the best mean score.

A setting is preferred that diverged on fewer tuning seeds, then the one with the higher mean over its finished and
stopped runs (the lower, where a lower score is better; stopped ones count with their last evaluation), then the one
that the grid file names first. A run that failed is missing data; an arm without a single run that counts does not
choose. Nobody chooses before all runs of the first stage have ended, so that the choice does not depend on when it is
made.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from klab.grid import Cell
from klab.grid.score import parse_score
from klab.harness.store import Run, Snapshot, scan
from klab.harness.store.cell_score import cell_score
from klab.harness.store.tuning import Choice, TunedRun, choices, second_stage, write_choices

_LOCK_SECONDS = 120.0


def settle(run: Run) -> list[str]:
    """Let the arms choose whose first stage has ended, and add their cells to the run; the ids of these.

    The caller holds the run's lock. Safe to repeat after a crash at any point: a choice that was recorded stays.
    """
    tuned = run.tuned
    if tuned is None:
        return []
    run.refresh()
    known = choices(run.path)
    places = _first_stage(run, tuned)
    open_ = [arm for arm, settings in tuned.arms.items() if len(settings) > 1 and arm not in known]
    waiting = {identity for arm in open_ for group in tuned.arms[arm] for identity in places.get(group, {}).values()}
    if waiting:
        snapshots = scan(run, waiting)
        if all(_has_ended(each) for each in snapshots.values()):
            made = {
                arm: _choose(run, tuned, arm, places, snapshots)
                for arm in open_
                if not _is_stopped(run, _first_cell(places, tuned, arm))
            }
            fresh = {arm: choice for arm, choice in made.items() if choice is not None}
            if fresh:
                known = {**known, **fresh}
                write_choices(run.path, known)
    cells = [cell for arm, choice in known.items() for cell in _second_stage(run, tuned, choice, places)]
    more = [cell for cell in cells if cell.id not in run.manifest["cells"]]
    if more:
        run.grow(more)
    return [cell.id for cell in more]


def resolved_cells(run: Run, names: Sequence[str]) -> list[str]:
    """The cells that these names mean, some of which may be names of cells whose arm had not chosen when they were
    given. Those whose arm cannot choose yet are left out, and named on standard error.
    """
    tuned = run.tuned
    pending = [name for name in names if name not in run.manifest["cells"]]
    if tuned is None or not pending:
        return list(names)
    with run.lock("choosing tuned settings", wait=_LOCK_SECONDS):
        settle(run)
    run.refresh()
    found = second_stage_names(run)
    left = [name for name in pending if name not in found]
    if left:
        print(
            f"klab: {len(left)} cells wait for tuning runs that have not ended: launch again to continue",
            file=sys.stderr,
            flush=True,
        )
    return [found.get(name, name) for name in names if name not in left]


def second_stage_names(run: Run) -> dict[str, str]:
    """By the name that it had before, the id of each cell of the second stage whose arm has chosen."""
    tuned = run.tuned
    if tuned is None:
        return {}
    known = choices(run.path)
    wanted = {(choice.group, seed): (arm, seed) for arm, choice in known.items() for seed in tuned.study_seeds}
    found = {}
    for identity in run.cells:
        place = (str(run.resolved(identity)["group"]), int(run.resolved(identity)["seed"]))
        if place in wanted:
            found[tuned.pending_name(*wanted[place])] = identity
    return found


def pending(run: Run) -> dict[str, Mapping[str, Any]]:
    """By name, the settings of cells of the second stage whose arm has not chosen: those of one that it may keep."""
    tuned = run.tuned
    if tuned is None:
        return {}
    waiting = _waiting(run, tuned)
    places = _first_stage(run, tuned) if waiting else {}
    found: dict[str, Mapping[str, Any]] = {}
    for name, (arm, _) in waiting.items():
        ids = [identity for group in tuned.arms[arm] for identity in places.get(group, {}).values()]
        if ids:
            found[name] = run.resolved(ids[0])
    return found


def stop(run: Run, names: Iterable[str]) -> None:
    """Let the arms of these pending cells not choose until `resume`."""
    _append(run, names, "cancelled")


def resume(run: Run, names: Iterable[str]) -> None:
    """Let the arms of these pending cells choose again."""
    _append(run, names, "relaunched")


def stopped(run: Run) -> set[str]:
    """Names of the cells of the second stage that were cancelled before their arm chose."""
    tuned = run.tuned
    if tuned is None:
        return set()
    waiting = _waiting(run, tuned)
    places = _first_stage(run, tuned) if waiting else {}
    arms = dict.fromkeys(arm for arm, _ in waiting.values())
    held = {arm for arm in arms if _is_stopped(run, _first_cell(places, tuned, arm))}
    return {name for name, (arm, _) in waiting.items() if arm in held}


def _is_stopped(run: Run, first: str | None) -> bool:
    events = run.cell(first).attempts() if first else []
    decisive = [event["event"] for event in events if event["event"] in ("cancelled", "relaunched")]
    return decisive[-1:] == ["cancelled"]


def _waiting(run: Run, tuned: TunedRun) -> dict[str, tuple[str, int]]:
    """By name, arm and seed of the cells of the second stage that are not cells of the run yet."""
    there = second_stage_names(run)
    return {name: place for name, place in second_stage(tuned).items() if name not in there}


def _append(run: Run, names: Iterable[str], event: str) -> None:
    tuned = run.tuned
    if tuned is None:
        return
    waiting, places = _waiting(run, tuned), _first_stage(run, tuned)
    for arm in dict.fromkeys(waiting[name][0] for name in names if name in waiting):
        identity = _first_cell(places, tuned, arm)
        if identity is not None:
            run.cell(identity).append_attempt({"event": event, "at": time.time()})


def _first_cell(places: Mapping[str, Mapping[int, str]], tuned: TunedRun, arm: str) -> str | None:
    return next((identity for group in tuned.arms[arm] for identity in places.get(group, {}).values()), None)


def _first_stage(run: Run, tuned: TunedRun) -> dict[str, dict[int, str]]:
    """By group and tuning seed, the ids of the first stage."""
    found: dict[str, dict[int, str]] = {}
    for identity in run.cells:
        record = run.manifest["cells"][identity]
        if record["seed"] in tuned.seeds:
            found.setdefault(str(record["group"]), {})[int(record["seed"])] = identity
    return found


def _has_ended(snapshot: Snapshot) -> bool:
    return snapshot.result is not None or ((snapshot.failed or snapshot.problem is not None) and not snapshot.alive)


def _choose(
    run: Run,
    tuned: TunedRun,
    arm: str,
    places: Mapping[str, Mapping[int, str]],
    snapshots: Mapping[str, Snapshot],
) -> Choice | None:
    scores: dict[str, dict[int, float | None]] = {}
    states: dict[str, dict[int, str]] = {}
    ranked: list[tuple[int, float, int, str]] = []
    sign = -1.0 if parse_score(tuned.score).higher else 1.0
    for place, group in enumerate(tuned.arms[arm]):
        ids = places.get(group, {})
        states[group] = {seed: _state(snapshots[identity]) for seed, identity in ids.items()}
        scores[group] = {
            seed: cell_score(run.cell(identity), tuned.score) if states[group][seed] != "failed" else None
            for seed, identity in ids.items()
        }
        diverged = sum(state == "diverged" for state in states[group].values())
        scored = [seed for seed, state in states[group].items() if state in ("finished", "stopped")]
        counted = [v for seed in scored if (v := scores[group][seed]) is not None]
        if counted or diverged:
            mean = sum(counted) / len(counted) if counted else 0.0
            ranked.append((diverged, sign * mean if counted else float("inf"), place, group))
    return Choice(min(ranked)[3], scores, states) if ranked else None


def _state(snapshot: Snapshot) -> str:
    return "failed" if snapshot.result is None else str(snapshot.result["state"])


def _second_stage(run: Run, tuned: TunedRun, choice: Choice, places: Mapping[str, Mapping[int, str]]) -> list[Cell]:
    ids = places.get(choice.group, {})
    if not ids:
        return []
    return run.cell(next(iter(ids.values()))).cell().with_seeds(tuned.study_seeds)
