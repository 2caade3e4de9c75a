"""One or several runs side by side: their frames joined, the axes that vary over all of them, and what to beware of."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from klab.grid import Cell, UserError
from klab.grid.score import LM_EVAL
from klab.grid.short_ids import matching_ids
from klab.harness.store import Run
from klab.harness.store.archive import open_run
from klab.reports.archive import frames_of, left_out_words
from klab.reports.axes import VariedAxis, axis_table, group_labels, task_labels
from klab.reports.comparison import compare
from klab.reports.conduct import Conduct, conduct
from klab.reports.frame import Frames
from klab.reports.schema import CELLS, SUMMARY
from klab.reports.software import Software, are_alike, differences, software
from klab.reports.stages import Arms, Stage, arms


@dataclass(frozen=True)
class Study:
    """What the report is about.

    Attributes:
        runs: the runs, in the order given.
        names: a distinct name for each.
        cells: one row per cell and seed; columns are documented in `schema.CELLS`, and `lm_eval.TASK.METRIC` of each
            metric that some cell has.
        metrics: one row per (cell, update); `schema.METRICS`.
        evaluations: one row per (cell, evaluation); `schema.EVALUATIONS`.
        samples: stored completions of some evaluations of each cell, from the first to the last.
        axes: the fields that differ between configurations.
        values: by group, its value on each axis (None: inactive there).
        configurations: by group, one of its cells.
        baselines: by task, the group that others are compared with; tasks without one are absent.
        notes: what a reader should know before comparing.
        arms: of each run, the configurations as written, and what they chose where they are tuned.
        software: the versions of the libraries that the cells which ended were trained with.
    """

    runs: tuple[Run, ...]
    names: tuple[str, ...]
    cells: pd.DataFrame
    metrics: pd.DataFrame
    evaluations: pd.DataFrame
    samples: pd.DataFrame
    axes: tuple[VariedAxis, ...]
    values: Mapping[str, Mapping[str, str | None]]
    configurations: Mapping[str, Cell]
    baselines: Mapping[str, str]
    notes: tuple[str, ...]
    arms: tuple[Arms, ...] = ()
    software: Software = field(default_factory=dict)

    @property
    def name(self) -> str:
        return " + ".join(self.names)

    @cached_property
    def tasks(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.cells["task"]))

    @cached_property
    def labels(self) -> dict[str, str]:
        """A short name per configuration, unique within its task."""
        return dict(zip(self.cells["group"], self.cells["label"], strict=True))

    @property
    def factorial(self) -> bool:
        """Whether axes were crossed: a value is then best shown as the average over the cells that have it."""
        return all(run.manifest.get("design") == "product" for run in self.runs) and len(self.runs) == 1

    @property
    def _fraction(self) -> Mapping[str, Any] | None:
        return self.runs[0].manifest.get("fraction") if len(self.runs) == 1 else None

    @property
    def candidates(self) -> int:
        """How many configurations a fractional design was chosen from; 0 of other designs, and of several runs."""
        return int((self._fraction or {}).get("candidates", 0))

    @cached_property
    def held_out(self) -> frozenset[str] | None:
        """The groups of a fractional design that are predicted, not fitted; None of other designs and several runs."""
        fraction = self._fraction
        if fraction is None:
            return None
        found = (self.arms[0].group(str(group)) if self.arms else str(group) for group in fraction["held_out"])
        return frozenset(group for group in found if group is not None)

    @cached_property
    def conduct(self) -> Conduct:
        """What was stated beforehand, and how often the study was looked at."""
        return conduct(self.runs, self.names, self.arms)

    def summary(self, score: str | None = None, delta: float | None = None) -> pd.DataFrame:
        """One row per configuration, best first; columns are documented in `schema.SUMMARY`.

        Args:
            score: a name in `klab.grid.score`, for example ``accuracy`` or ``reward_at_kl(0.5)``.
            delta: differences smaller than this count as none.
        """
        tables = [compare(self, task, score, delta).table for task in self.tasks]
        table = pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=list(SUMMARY))
        return table.drop(columns="group", errors="ignore")


def load_run(path: str | Path, *, baseline: str | None = None, cache: bool = True) -> Study:
    """The study of one run folder, or of an archive: ``load_run("runs/a").summary()``."""
    return load_runs([path], baseline=baseline, cache=cache)


def load_runs(
    paths: Sequence[str | Path],
    *,
    baseline: str | None = None,
    only: Collection[str] | None = None,
    cache: bool = True,
    stage: Stage = "chosen",
) -> Study:
    """The study of several run folders or archives together; a cell that stands in two of them is taken from the first
    that finished it.

    Args:
        baseline: id (or a part of it) of a cell or configuration to compare with, instead of the grid file's.
        only: ids of the cells to look at; None: all.
        stage: of tuned runs, the configurations with the settings that they chose, or those as written.

    Raises:
        UserError: when a folder is neither a run nor an archive, is of another schema, or the baseline or every cell of
            ``only`` is not in it.
    """
    if not paths:
        raise UserError("nothing to report: name at least one run folder")
    runs = tuple(open_run(path) for path in dict.fromkeys(Path(path).resolve() for path in paths))
    names = _distinct([run.name for run in runs])
    parts = [frames_of(run, cache) for run in runs]
    staged = tuple(arms(run, stage) for run in runs)
    tuned = {key for each in staged if each.tuned is not None for key in each.tuned.keys}
    configurations: dict[str, Cell] = {}
    tables, notes = [], []
    for run, name, frames, each in zip(runs, names, parts, staged, strict=True):
        chosen = frames.cells if only is None else frames.cells[frames.cells["cell"].isin(list(only))]
        chosen = each.only(chosen, run)
        tables.append(_described(run, name, chosen, configurations))
    cells = pd.concat(tables, ignore_index=True)
    if only is not None and cells.empty and not tuned:
        raise UserError("none of these cells is in the run", value=next(iter(only), ""))
    tasks = task_labels(configurations)
    cells["task"] = [tasks[group] for group in cells["group"]]
    cells, dropped = _unique(cells)
    if dropped:
        notes.append(f"{dropped} cells stand in more than one run; each is counted once.")
    joined = _joined(parts, names, cells)
    written = {str(key) for run in runs for key in run.manifest["axes"]}
    bases = [each.group(run.baseline) for run, each in zip(runs, staged, strict=True)]
    baselines = _baselines(bases, configurations, cells, baseline, tuned, notes)
    axes, values = axis_table(configurations, written, tuned)
    labels: dict[str, str] = {}
    for task in dict.fromkeys(cells["task"]):
        groups = dict.fromkeys(cells.loc[cells["task"] == task, "group"])
        labels.update(group_labels(axes, {group: values[group] for group in groups}, baselines.get(task)))
    cells["label"] = [labels[group] for group in cells["group"]]
    used = software(cells["software"])
    notes += [*_warnings(cells, runs), *differences(used), *conduct(runs, names, staged).notes]
    notes += left_out_words(runs, names)
    metrics = [str(name) for name in cells if str(name).startswith(LM_EVAL)]
    return Study(
        runs,
        names,
        cells[[*CELLS, *metrics]].copy(),  # in one block: how columns lie in memory changes last digits of sums
        *joined,
        axes,
        values,
        configurations,
        baselines,
        tuple(notes),
        staged,
        used,
    )


def _distinct(names: Sequence[str]) -> tuple[str, ...]:
    return tuple(
        name if names.count(name) == 1 else f"{name} ({names[: i + 1].count(name)})" for i, name in enumerate(names)
    )


def _described(run: Run, name: str, cells: pd.DataFrame, configurations: dict[str, Cell]) -> pd.DataFrame:
    """The cells of a run with what the manifest says of them."""
    rows: list[dict[str, Any]] = []
    for identity in cells["cell"]:
        resolved = run.resolved(identity)
        group = str(resolved["group"])
        if group not in configurations:
            configurations[group] = run.cell(identity).cell()
        rows.append(
            {
                "run": name,
                "group": group,
                "task": "",
                "algorithm": resolved.get("algorithm"),
                "seed": int(resolved["seed"]),
                "updates_planned": float(configurations[group].training.updates),
            }
        )
    head = pd.DataFrame(rows, columns=["run", "group", "task", "algorithm", "seed", "updates_planned"])
    return pd.concat([head, cells.reset_index(drop=True)], axis=1)


def _unique(cells: pd.DataFrame) -> tuple[pd.DataFrame, int]:
    if not cells["cell"].duplicated().any():
        return cells, 0
    ended = cells["state"].isin(["finished", "diverged", "stopped"])
    order = (~ended).sort_values(kind="stable").index
    kept = cells.loc[order].drop_duplicates("cell").sort_index()
    return kept.reset_index(drop=True), len(cells) - len(kept)


def _joined(
    parts: Sequence[Frames], names: Sequence[str], cells: pd.DataFrame
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    result = []
    for kind in ("metrics", "evaluations", "samples"):
        frames = []
        for name, part in zip(names, parts, strict=True):
            frame: pd.DataFrame = getattr(part, kind)
            if len(parts) > 1 or len(cells) < len(part.cells):
                frame = frame[frame["cell"].isin(cells.loc[cells["run"] == name, "cell"])].astype({"cell": "str"})
            frames.append(frame)
        joined = pd.concat(frames, ignore_index=True) if len(frames) > 1 else frames[0]
        result.append(joined.astype({"cell": "category"}))
    return result[0], result[1], result[2]


def _baselines(
    bases: Sequence[str | None],
    configurations: Mapping[str, Cell],
    cells: pd.DataFrame,
    wanted: str | None,
    tuned: Collection[str],
    notes: list[str],
) -> dict[str, str]:
    candidates: dict[str, list[str]] = {}
    if wanted is not None:
        pairs = list(zip(cells["cell"], cells["group"], strict=True))
        fitting = set(matching_ids(wanted, [name for pair in pairs for name in pair]))
        found = {group for identity, group in pairs if fitting & {identity, group}}
        if len(found) != 1:
            problem = "no such cell" if not found else f"{len(found)} configurations fit"
            raise UserError(problem, key="baseline", value=wanted, allowed=list(configurations))
        given = [found.pop()]
    else:
        given = [base for base in bases if base is not None and base in configurations]
    tasks = task_labels(configurations)
    for group in given:
        candidates.setdefault(tasks[group], []).append(group)
    elsewhere = {_besides_task(configurations[group], tuned) for groups in candidates.values() for group in groups}
    for group, cell in configurations.items():
        if tasks[group] not in candidates and _besides_task(cell, tuned) in elsewhere:
            candidates.setdefault(tasks[group], []).append(group)
    baselines: dict[str, str] = {}
    for task in dict.fromkeys(cells["task"]):
        groups = list(dict.fromkeys(candidates.get(task, ())))
        if len(groups) == 1:
            baselines[task] = groups[0]
        elif groups:
            notes.append(
                f"The runs have different baselines on {task}: nothing is compared with a baseline there (--baseline "
                "chooses one)."
            )
        else:
            notes.append(
                f"No run has a baseline cell on {task}: nothing is compared with a baseline there (--baseline "
                "chooses one)."
            )
    return baselines


def _besides_task(cell: Cell, tuned: Collection[str]) -> str:
    """What a configuration is but for its task and what it chose: the baseline on one task has its like on others."""
    form = {key: value for key, value in cell.canonical().items() if key not in ("task", "seed")}
    for key in tuned:
        section, _, field = key.rpartition(".")
        if section == "training":
            form["training"].pop(field, None)
        else:
            form["objective"] = {name: v for name, v in form["objective"].items() if name.rpartition(".")[2] != field}
    return json.dumps(form)


def _inputs(run: Run) -> Iterator[str]:
    """Notes about code, data and models that are not the same for all cells, or not what they were."""
    earlier = run.earlier_inputs()
    if earlier:
        names = ", ".join(dict.fromkeys(name for changed in earlier.values() for name in changed))
        yield f"{len(earlier)} cells of {run.name} were trained with other versions of {names} than the rest."
    if begun := run.begun_earlier():
        names = ", ".join(dict.fromkeys(name for changed in begun.values() for name in changed))
        yield f"{len(begun)} cells of {run.name} were begun with other versions of {names} than they ended with."
    if changed := run.changed_inputs(missing=False, bounded=True):
        yield f"Changed since {run.name} was launched: {', '.join(changed)}."


def _warnings(cells: pd.DataFrame, runs: Sequence[Run]) -> list[str]:
    notes = [note for run in runs for note in _inputs(run)]
    for task, part in cells.groupby("task", sort=False):
        budgets = sorted(part["updates_planned"].unique())
        if len(budgets) > 1:
            shown = ", ".join(f"{budget:g}" for budget in budgets)
            notes.append(
                f"Cells on {task} were given different budgets ({shown} updates): their scores are not at equal effort."
            )
    if cells["task"].nunique() > 1:
        notes.append("The cells belong to different tasks; cells are compared within a task only.")
    if (open_ := int(cells["state"].isin(["running", "interrupted", "missing"]).sum())) > 0:
        notes.append(f"{open_} of {len(cells)} cells have not ended: this is an interim report.")
    if not are_alike([run.manifest for run in runs]) or len({str(run.manifest.get("commit")) for run in runs}) > 1:
        notes.append("The runs were made with different versions of klab or its libraries; see provenance.")
    return notes
