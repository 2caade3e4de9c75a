"""What tuning did: every setting's score, what each configuration chose, and what the verdicts would be without."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from klab.grid.score import parse_score
from klab.grid.variant import format_value
from klab.harness.store.tuning import Choice, TunedRun
from klab.reports.comparison import Comparison, compare
from klab.reports.frame import records
from klab.reports.stages import Arms
from klab.reports.study import Study, load_runs
from klab.reports.words import difference_span, number


@dataclass(frozen=True)
class TriedSetting:
    """One setting of an arm: its mean score over the tuning seeds that finished, and how many diverged or failed."""

    words: str
    values: Mapping[str, Any]
    mean: float
    scores: tuple[float, ...]
    diverged: int
    failed: int
    chosen: bool


@dataclass(frozen=True)
class TunedArm:
    """A configuration, by its name in the report, and the settings that it chose from."""

    label: str
    baseline: bool
    settings: tuple[TriedSetting, ...]

    @property
    def choice(self) -> str:
        """What it chose, in words."""
        return next((setting.words for setting in self.settings if setting.chosen), "nothing yet")


@dataclass(frozen=True)
class Change:
    """A configuration's comparison with the baseline, tuned and as written."""

    label: str
    tuned: str
    verdict: str
    untuned: str
    untuned_verdict: str

    @property
    def changed(self) -> bool:
        """Whether tuning changes the verdict."""
        return self.verdict != self.untuned_verdict


@dataclass(frozen=True)
class TunedPart:
    """What the report says of the tuning of one run.

    Attributes:
        name: of the run.
        keys: the tuned fields.
        score: what settings were judged by, in words.
        seeds: the tuning seeds.
        arms: in the order of the grid.
        waiting: configurations that have not chosen.
        untuned: whether the configurations as written ran, too.
        changes: by task, tuned and untuned comparisons side by side.
        headlines: by task, the answer with tuning, and without.
    """

    name: str
    keys: tuple[str, ...]
    score: str
    seeds: tuple[int, ...]
    arms: tuple[TunedArm, ...]
    waiting: int
    untuned: bool
    changes: Mapping[str, Sequence[Change]]
    headlines: Mapping[str, tuple[str, str]]

    @property
    def distinct(self) -> int:
        """How many different settings were chosen."""
        return len({arm.choice for arm in self.arms if len(arm.settings) > 1})


def tuned_parts(study: Study, comparisons: Sequence[Comparison]) -> list[TunedPart]:
    """What to say of every tuned run of the study; nothing where none is tuned.

    Args:
        comparisons: by the main score.
    """
    found = [
        (run, name, each, each.tuned)
        for run, name, each in zip(study.runs, study.names, study.arms, strict=True)
        if each.tuned is not None
    ]
    if not found:
        return []
    changes, headlines = _changes(study, comparisons)
    return [
        TunedPart(
            name=name,
            keys=tuned.keys,
            score=parse_score(tuned.score).title,
            seeds=tuned.seeds,
            arms=tuple(_arm(study, each, tuned, arm) for arm in each.groups),
            waiting=sum(arm not in each.groups for arm in tuned.arms),
            untuned=tuned.untuned,
            changes=changes,
            headlines=headlines,
        )
        for _, name, each, tuned in found
    ]


def tuning_table(parts: Sequence[TunedPart]) -> pd.DataFrame:
    """One row per configuration, setting and run."""
    rows = [
        {
            "run": part.name,
            "label": arm.label,
            "setting": setting.words,
            "mean": setting.mean,
            "finished": len(setting.scores),
            "diverged": setting.diverged,
            "failed": setting.failed,
            "chosen": setting.chosen,
        }
        for part in parts
        for arm in part.arms
        for setting in arm.settings
    ]
    return pd.DataFrame(rows)


def methods_words(study: Study) -> str:
    """A sentence or two for the methods paragraph."""
    tuned = [each.tuned for each in study.arms if each.tuned is not None]
    if not tuned:
        return (
            "No setting was tuned: every configuration used those of the grid file, which may suit some better than "
            "others."
        )
    first = tuned[0]
    tried = {
        key: list(dict.fromkeys(format_value(v[key]) for arm in first.arms.values() for v in arm.values()))
        for key in first.keys
    }
    fields = " and ".join(f"{key} from {', '.join(values)}" for key, values in tried.items())
    score = parse_score(first.score)
    return (
        f"Before the comparison every configuration chose {fields}: the setting with the "
        f"{'highest' if score.higher else 'lowest'} mean {score.title} over {len(first.seeds)} tuning seeds that are "
        "used for nothing else. A setting that diverged on a seed was chosen only where all others did as often; of "
        "equal ones the first was."
    )


def _arm(study: Study, arms: Arms, tuned: TunedRun, arm: str) -> TunedArm:
    group, choice = arms.groups[arm], arms.chosen.get(arm)
    settings = [_setting(values, each, choice, chosen=each == group) for each, values in tuned.arms[arm].items()]
    return TunedArm(study.labels.get(group, arm), group in study.baselines.values(), tuple(settings))


def _setting(values: Mapping[str, Any], group: str, choice: Choice | None, chosen: bool) -> TriedSetting:
    states = choice.states.get(group, {}) if choice is not None else {}
    scores = choice.scores.get(group, {}) if choice is not None else {}
    counted = [seed for seed, state in states.items() if state in ("finished", "stopped")]
    finished = [score for seed in counted if (score := scores.get(seed)) is not None]
    return TriedSetting(
        words=", ".join(f"{key}={format_value(value)}" for key, value in values.items()),
        values=values,
        mean=float(np.mean(finished)) if finished else float("nan"),
        scores=tuple(finished),
        diverged=sum(state == "diverged" for state in states.values()),
        failed=sum(state not in ("finished", "diverged", "stopped") for state in states.values()),
        chosen=chosen,
    )


def _changes(
    study: Study, comparisons: Sequence[Comparison]
) -> tuple[dict[str, list[Change]], dict[str, tuple[str, str]]]:
    """By task, every configuration's difference from the baseline with what it chose, and as written."""
    if not all(each.tuned is None or each.tuned.untuned for each in study.arms):
        return {}, {}
    plain = load_runs([run.path for run in study.runs], stage="untuned")
    written = {each.groups[arm]: arm for each in study.arms if each.tuned is not None for arm in each.groups}
    changes: dict[str, list[Change]] = {}
    headlines: dict[str, tuple[str, str]] = {}
    for comparison in comparisons:
        if comparison.task not in plain.tasks:
            continue
        other = compare(plain, comparison.task, comparison.score, comparison.analysis.delta)
        rows = {record["group"]: record for record in records(other.table)}
        headlines[comparison.task] = (comparison.analysis.headline, other.analysis.headline)
        changes[comparison.task] = [
            Change(record["label"], _words(record), record["verdict"], _words(row), row["verdict"])
            for record in records(comparison.table)
            if record["group"] != comparison.baseline
            and (row := rows.get(written.get(record["group"], record["group"]))) is not None
        ]
    return changes, headlines


def _words(record: Mapping[str, Any]) -> str:
    if not np.isfinite(record["difference"]):
        return number(record["mean"])
    return difference_span(record["difference"], record["difference_low"], record["difference_high"])
