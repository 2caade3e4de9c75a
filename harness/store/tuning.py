"""The two stages of a tuned run: what its manifest says of them, and the record of what every configuration kept.

The manifest's `tuning` names the arms (the configurations as written) and the settings that each may keep, by the group
that the arm has with the setting. `tuning.json` holds, for every arm that has chosen, the score of every run that the
choice rests on. Cells of the second stage are added to the manifest when their arm has chosen; before that they are
called by their arm and seed (`pending_name`).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from klab.grid import UserError
from klab.harness.store import files

if TYPE_CHECKING:
    from klab.grid import Grid

_FILE = "tuning.json"


@dataclass(frozen=True)
class TunedRun:
    """What the manifest says of tuning.

    Attributes:
        score: what settings are judged by.
        seeds: of the first stage.
        study_seeds: of the second.
        untuned: whether the arms as written run on the study's seeds, too.
        keys: the tuned fields.
        arms: by arm, its settings: by group, the tuned values.
    """

    score: str
    seeds: tuple[int, ...]
    study_seeds: tuple[int, ...]
    untuned: bool
    keys: tuple[str, ...]
    arms: Mapping[str, Mapping[str, Mapping[str, Any]]]

    def pending_name(self, arm: str, seed: int) -> str:
        """What a cell of the second stage is called before its arm has chosen."""
        return f"{arm}.tuned-s{seed}"


@dataclass(frozen=True)
class Choice:
    """What an arm kept, and why.

    Attributes:
        group: of the arm with the setting that it kept.
        scores: by group of a setting and tuning seed, the score; None where a run has none.
        states: likewise, how the run ended.
        at: when, in seconds since 1970.
    """

    group: str
    scores: Mapping[str, Mapping[int, float | None]]
    states: Mapping[str, Mapping[int, str]]
    at: float = field(default_factory=time.time)


def record_of(grid: Grid) -> dict[str, Any] | None:
    """What the manifest says of the tuning of this grid; None where it tunes nothing."""
    from klab.grid.score import DEFAULT_SCORE

    if grid.tuning is None:
        return None
    scores = grid.analysis.scores if grid.analysis else ()
    return {
        "score": scores[0] if scores else DEFAULT_SCORE,
        "seeds": list(grid.tuning.seeds),
        "untuned": grid.tuning.untuned,
        "study_seeds": list(grid.seeds),
        "keys": list(grid.tuning.values),
        "arms": {
            arm: {setting.cell.group: dict(setting.values) for setting in grid.tuning.arms[arm]}
            for arm in arms_of(grid)
        },
    }


def arms_of(grid: Grid) -> list[str]:
    """The arms of a study that tunes."""
    assert grid.tuning is not None
    present = {cell.group for cell in grid.cells}
    return [arm for arm, settings in grid.tuning.arms.items() if present & {arm, *(s.cell.group for s in settings)}]


def tuned_run(manifest: Mapping[str, Any], file: Path) -> TunedRun | None:
    """What the manifest says of tuning; None where the run has one stage.

    Raises:
        UserError: the record is damaged.
    """
    record = manifest.get("tuning")
    if record is None:
        return None
    try:
        return TunedRun(
            str(record["score"]),
            tuple(map(int, record["seeds"])),
            tuple(map(int, record["study_seeds"])),
            bool(record["untuned"]),
            tuple(map(str, record["keys"])),
            {str(arm): {str(group): dict(v) for group, v in found.items()} for arm, found in record["arms"].items()},
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        raise files.damaged_file(file, "does not say what is tuned") from None


def choices(run: Path) -> dict[str, Choice]:
    """By arm, what it kept; arms that have not chosen are absent.

    Raises:
        UserError: the record is damaged.
    """
    record = files.read_record(run / _FILE)
    if record is None:
        return {}
    try:
        return {
            str(arm): Choice(
                str(each["group"]),
                {str(group): _by_seed(row) for group, row in each["scores"].items()},
                {str(group): {int(seed): str(v) for seed, v in row.items()} for group, row in each["states"].items()},
                float(each["at"]),
            )
            for arm, each in record["arms"].items()
        }
    except (KeyError, TypeError, ValueError, AttributeError):
        raise files.damaged_file(run / _FILE, "does not say what was chosen") from None


def write_choices(run: Path, found: Mapping[str, Choice]) -> None:
    """Replace the record, atomically."""
    arms = {
        arm: {
            "group": each.group,
            "scores": {group: {str(seed): v for seed, v in row.items()} for group, row in each.scores.items()},
            "states": {group: {str(seed): v for seed, v in row.items()} for group, row in each.states.items()},
            "at": each.at,
        }
        for arm, each in found.items()
    }
    files.replace(run / _FILE, files.encode_record({"arms": arms}))


def refuse_other_settings(record: Mapping[str, Any] | None, run: Path) -> None:
    """Raises UserError where an arm has chosen among other settings than those that the grid gives it now."""
    arms = record["arms"] if record else {}
    for arm, choice in choices(run).items():
        if arm in arms and set(arms[arm]) != set(choice.scores):
            raise UserError(
                "has other settings than those that the run has already chosen from",
                file=run,
                key="tune",
                hint="Put the settings from before back, or give the grid a new name.",
            )
    if record is None and choices(run):
        raise UserError("is gone from the grid, but the run is tuned", file=run, key="tune")


def _by_seed(row: Mapping[str, Any]) -> dict[int, float | None]:
    return {int(seed): None if value is None else float(value) for seed, value in row.items()}


def second_stage(tuned: TunedRun) -> dict[str, tuple[str, int]]:
    """By its name before the choice, arm and seed of every cell of the second stage that depends on a choice."""
    return {
        tuned.pending_name(arm, seed): (arm, seed)
        for arm, settings in tuned.arms.items()
        if len(settings) > 1
        for seed in tuned.study_seeds
    }
