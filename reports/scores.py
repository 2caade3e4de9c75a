"""The score of every run, from its result and its evaluations, and what a reader should know about it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from klab.grid import Cell, UserError
from klab.grid.score import (
    LM_EVAL,
    PARTS,
    RESULTS,
    TRAINING_REWARD_SETTINGS,
    TRAINING_REWARDS,
    Score,
    chosen_metric,
)
from klab.reports.axes import VariedAxis

Array = NDArray[np.float64]

LEAP = 2.0
"""Factor by which the KL may go beyond a level before the reward at that level counts as read off from afar."""
LAST = 0.1
"""Evaluations count from where this share of the planned updates is left."""


class ScoredStudy(Protocol):
    """What scores need of a study; see `klab.reports.study.Study` for the attributes."""

    @property
    def cells(self) -> pd.DataFrame: ...
    @property
    def evaluations(self) -> pd.DataFrame: ...
    @property
    def axes(self) -> tuple[VariedAxis, ...]: ...
    @property
    def configurations(self) -> Mapping[str, Cell]: ...


def run_scores(study: ScoredStudy, score: Score) -> Array:
    """The score of every row of ``study.cells``; NaN where a run has none.

    Raises:
        UserError: for a part of the reward that no evaluation has.
    """
    if score.kind in RESULTS:
        return study.cells[score.kind].to_numpy(dtype=np.float64)
    if score.kind == "lm_eval":
        known = [str(name).removeprefix(LM_EVAL) for name in study.cells if str(name).startswith(LM_EVAL)]
        name = chosen_metric(score.part, known)
        if name is None:
            names = [f"{LM_EVAL}{each}" for each in known]
            raise UserError("no cell has this metric", key="score", value=score.name, allowed=names)
        return study.cells[f"{LM_EVAL}{name}"].to_numpy(dtype=np.float64)
    if score.kind == "reward_at_kl":
        assert score.argument is not None
        return _at_kl(study, score.argument)
    if score.kind == "objective":
        kl = _last_mean(study, "reverse_kl")
        beta = np.asarray([_coefficient(study, group) for group in study.cells["group"]], dtype=np.float64)
        return _last_mean(study, "reward") - (beta if score.argument is None else score.argument) * kl
    return _last_mean(study, _column(study, score), weighted=score.kind != "accuracy")


def sampling_deviations(study: ScoredStudy, score: Score) -> Array:
    """The standard deviation of every run's score from the sampling of completions alone; NaN where not recorded.

    The prompts are the same for all runs and count as fixed.
    """
    if score.kind != "reward" or "reward_se" not in study.evaluations:
        return np.full(len(study.cells), np.nan)
    rows = _last_rows(study)
    weights, cell = _completions(rows), rows["row"].to_numpy()
    size = len(study.cells)
    variance = np.bincount(cell, (weights * rows["reward_se"].to_numpy(dtype=np.float64)) ** 2, size)
    total = np.bincount(cell, weights, size)
    return np.sqrt(np.where(total > 0, variance, np.nan)) / np.where(total > 0, total, 1.0)


def score_notes(study: ScoredStudy, score: Score) -> tuple[str, ...]:
    """What a reader should know before comparing by this score."""
    notes = []
    if score.kind in TRAINING_REWARDS:
        for axis in study.axes:
            reason = next((why for key, why in TRAINING_REWARD_SETTINGS.items() if _within(axis.key, key)), None)
            if reason:
                notes.append(
                    f"{axis.key} varies and changes what the {score.title} measures ({reason}): differences in it are "
                    "no differences between policies. The held-out reward has one sampler for all cells."
                )
    if score.kind == "reward_best":
        notes.append("The best training reward is the maximum of a noisy curve: it flatters noisy cells.")
    if score.kind == "objective" and score.argument is None:
        betas = {_coefficient(study, group) for group in study.configurations}
        if len(betas) > 1:
            shown = ", ".join(f"{beta:g}" for beta in sorted(betas))
            notes.append(
                f"β differs between cells ({shown}): each is scored by its own objective; objective({max(betas):g}) "
                "scores all by one."
            )
        if any(cell.training.beta_control is not None for cell in study.configurations.values()):
            notes.append("β moves during training in some cells; the objective takes its first value.")
    prompts = {cell.training.evaluation_prompts for cell in study.configurations.values()}
    if score.kind not in (*RESULTS, "lm_eval") and len(prompts) > 1:
        shown = ", ".join(str(count) for count in sorted(prompts))
        notes.append(f"Cells were evaluated on different numbers of prompts ({shown}): these are not the same prompts.")
    missing = np.isnan(run_scores(study, score)) & (study.cells["state"] == "finished").to_numpy()
    if missing.any():
        runs = f"{int(missing.sum())} of {len(missing)} runs finished"
        if score.kind == "reward_at_kl":
            notes.append(f"{runs} without ever reaching KL {score.argument:g}: they are missing data.")
        else:
            notes.append(f"{runs} without a {score.title}: they are missing data.")
    if score.kind == "reward_at_kl" and (leaps := _leaps(study, score)):
        notes.append(
            f"{leaps} of {len(missing)} runs pass KL {score.argument:g} between two evaluations of which the second is "
            f"beyond {LEAP * (score.argument or 0.0):g}: their reward there is read off a long straight line. "
            "training.evaluate_every says how often a run is looked at."
        )
    if score.kind in ("reward_best", "accuracy_best", "reverse_kl_max") and (study.cells["state"] == "stopped").any():
        notes.append(f"Stopped runs had fewer updates in which to reach their {score.title}.")
    return tuple(notes)


def _within(axis: str, setting: str) -> bool:
    return axis == setting or axis.startswith(setting + ".")


def _column(study: ScoredStudy, score: Score) -> str:
    if score.kind != "parts":
        return score.kind
    if score.name not in study.evaluations:
        known = [str(name) for name in study.evaluations if str(name).startswith(PARTS)]
        raise UserError("no evaluation has this part of the reward", key="score", value=score.name, allowed=known)
    return score.name


def _last_rows(study: ScoredStudy) -> pd.DataFrame:
    """The evaluations of the last tenth of the planned updates, of stopped cells their very last one, with ``row``, the
    place of the cell in the study."""
    cells, frame = study.cells, study.evaluations
    place = {identity: row for row, identity in enumerate(cells["cell"])}
    lookup = np.asarray([place.get(identity, -1) for identity in frame["cell"].cat.categories], dtype=np.intp)
    codes = frame["cell"].cat.codes.to_numpy()
    row = lookup[codes] if lookup.size else np.zeros(0, dtype=np.intp)
    planned = cells["updates_planned"].to_numpy(dtype=np.float64)
    if not row.size:
        return frame.iloc[:0].assign(row=row)
    updates = frame["update"].to_numpy(dtype=np.float64)
    last = np.full(len(cells), -np.inf)
    np.maximum.at(last, row[row >= 0], updates[row >= 0])
    begin = np.where((cells["state"] == "stopped").to_numpy(), last, (1 - LAST) * planned - 1e-9)
    late = updates >= begin[row]
    kept = (row >= 0) & late
    return frame[kept].assign(row=row[kept])


def _completions(rows: pd.DataFrame) -> Array:
    if "completions" not in rows:
        return np.ones(len(rows))
    return rows["completions"].fillna(1.0).to_numpy(dtype=np.float64)


def _last_mean(study: ScoredStudy, column: str, weighted: bool = True) -> Array:
    """Mean of a column over the last evaluations of every cell; NaN where one of them has none."""
    rows = _last_rows(study)
    weights = _completions(rows) if weighted else np.ones(len(rows))
    size = len(study.cells)
    values = rows[column].to_numpy(dtype=np.float64) if column in rows else np.full(len(rows), np.nan)
    cell = rows["row"].to_numpy()
    total = np.bincount(cell, weights, size)
    return np.where(total > 0, np.bincount(cell, weights * values, size), np.nan) / np.where(total > 0, total, 1.0)


def _at_kl(study: ScoredStudy, level: float) -> Array:
    """The held-out reward where each cell's KL first reaches `level`, linear between evaluations."""
    paths = {
        str(cell): (part["reverse_kl"].to_numpy(dtype=np.float64), part["reward"].to_numpy(dtype=np.float64))
        for cell, part in study.evaluations.sort_values("update", kind="stable").groupby("cell", observed=True)
    }
    return np.asarray([_crossing(*paths.get(cell, (np.zeros(0),) * 2), level) for cell in study.cells["cell"]])


def _leaps(study: ScoredStudy, score: Score) -> int:
    """Runs whose KL is beyond a multiple of the level at the first evaluation that has reached it."""
    level = score.argument or 0.0
    frame = study.evaluations.sort_values("update", kind="stable")
    reached = frame[(frame["reverse_kl"] >= level) & (frame["update"] > 0)]
    first = reached.drop_duplicates("cell")["reverse_kl"]
    return int((first > LEAP * level).sum()) if level else 0


def _crossing(kl: Array, reward: Array, level: float) -> float:
    reached = np.flatnonzero(kl >= level)
    if not reached.size:
        return float("nan")
    after = int(reached[0])
    if after == 0 or kl[after] == level:
        return float(reward[after])
    share = (level - kl[after - 1]) / (kl[after] - kl[after - 1])
    return float(reward[after - 1] + share * (reward[after] - reward[after - 1]))


def _coefficient(study: ScoredStudy, group: str) -> float:
    """β of a configuration; 0 where it has no KL term."""
    cell = study.configurations[group]
    return float(cell.objective.canonical(cell.training.on_policy).get("placement.beta") or 0.0)
