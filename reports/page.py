"""The report: one self-contained page, a folder of figures and a folder of tables."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from klab.grid.catalogue import AXES, PARAMETERS
from klab.grid.score import parse_scores
from klab.reports import over_optimisation
from klab.reports.across import Across, across_all
from klab.reports.axis_legend import AxisLegend, formula, legend
from klab.reports.claim_tables import FAMILY_WORDS, claim_notes, claim_records, write_claims
from klab.reports.claims import Judged, judged
from klab.reports.comparison import Comparison, compare_all
from klab.reports.conduct import history_rows, items
from klab.reports.config_detail import Detail, details
from klab.reports.confirmation import confirmed_rows
from klab.reports.confirmed_claims import confirmed_claims
from klab.reports.figures import Drawing, draw, freeze, inline_svg, save, svg_text
from klab.reports.figures.effort import UPDATES, parse_units
from klab.reports.figures.profiles import across_tasks, task_profiles
from klab.reports.figures.sensitivity import sensitivity
from klab.reports.findings import Findings, find
from klab.reports.formulas import of_baselines
from klab.reports.frame import records
from klab.reports.gold_tables import write_over_optimisation
from klab.reports.gradients import GradientRow, gradient_rows, gradient_table, load_gradients
from klab.reports.methods import methods
from klab.reports.provenance import cost_unit, provenance
from klab.reports.schema import SUMMARY
from klab.reports.study import Study, load_runs
from klab.reports.tables import csv, write_tables
from klab.reports.theory import predictors, theory_words
from klab.reports.tuned import tuned_parts, tuning_table
from klab.reports.words import difference_span, mean_span, number, p_number, p_words, signed, verdict_words

Progress = Callable[[str], None]


@dataclass(frozen=True)
class TaskSection:
    """What the page says about one task.

    Attributes:
        comparison, others: by the first score, by the further ones.
        baseline: what the baseline is on the varied axes.
        unit: what hours are counted of, core or GPU.
        plots: by name, a drawing with its inline SVG; several where it is there once per unit of effort.
        gold: what the gold reward did, where one was recorded.
    """

    key: str
    task: str
    comparison: Comparison
    others: list[Comparison]
    findings: Findings
    baseline: str
    unit: str
    plots: dict[str, list[tuple[Drawing, Markup]]]
    axes: list[AxisLegend]
    rows: list[dict[str, Any]]
    details: list[Detail]
    gradients: list[GradientRow]
    theory: str
    gold: Gold | None


class Gold(NamedTuple):
    """What the page says of over-optimisation: a sentence, and the printed table with its caption."""

    sentence: str
    heads: list[str]
    rows: list[tuple[str, list[str]]]
    caption: str


def render(
    paths: Sequence[str | Path] | str | Path,
    out: str | Path | None = None,
    *,
    scores: Sequence[str] | None = None,
    delta: float | None = None,
    baseline: str | None = None,
    only: Collection[str] | None = None,
    figures: bool = True,
    over: Sequence[str] = (UPDATES,),
    gradients: pd.DataFrame | None = None,
    progress: Progress | None = None,
) -> Path:
    """Writes the report of one or several runs.

    Args:
        paths: run folders and archives.
        scores: what cells are compared by, the first is the main one; see `klab.grid.score`. None: as the study states.
        delta: differences smaller than this count as none; None: as the study states, or 0.05.
        baseline: id of the cell to compare with, instead of the grid file's.
        only: ids of the cells to report; None: all.
        out, figures, over, gradients, progress: as `write_report` takes them.

    Returns:
        The page, ``index.html`` in `out`; beside it ``figures/`` and ``tables/``.

    Raises:
        UserError: when a folder is not a run, or a score or the baseline does not exist.
        OSError: when the folder cannot be written.
    """
    tell = progress or (lambda text: None)
    listed = [paths] if isinstance(paths, str | Path) else list(paths)
    tell("reading")
    study = load_runs(listed, baseline=baseline, only=only)
    tell("comparing")
    parsed = parse_scores(scores) if scores else None
    comparisons, across = compare_all(study, parsed, delta), across_all(study, parsed, delta)
    claims = judged(study, delta)
    return write_report(
        study, comparisons, across, out, claims, figures=figures, over=over, gradients=gradients, progress=progress
    )


def write_report(
    study: Study,
    comparisons: Sequence[Comparison],
    across: Sequence[Across] = (),
    out: str | Path | None = None,
    claims: Sequence[Judged] = (),
    *,
    figures: bool = True,
    over: Sequence[str] = (UPDATES,),
    gradients: pd.DataFrame | None = None,
    progress: Progress | None = None,
) -> Path:
    """Writes the report of comparisons that `compare_all` made, and of those over all tasks by `compare_across`.

    Args:
        out: folder for the report; by default the first run's own ``report``.
        claims: the verdicts on the study's claims, by `judged`.
        figures: also write each figure as PDF, SVG and PNG.
        over: what stands on the horizontal axis of curves: ``updates``, ``tokens``, ``samples``; of several the page
            has a choice.
        gradients: bias and variance of each cell's gradient estimator, with columns group, bias, cosine, variance; by
            default read from ``gradients.json`` in the runs' report folders, where there is one.
        progress: is told what is being done.

    Returns:
        The page, ``index.html`` in `out`; beside it ``figures/`` and ``tables/``.

    Raises:
        UserError: for a unit of effort that does not exist.
        OSError: when the folder cannot be written.
    """
    tell, units = progress or (lambda text: None), parse_units(over)
    folder = Path(out) if out is not None else _default_folder(study)
    gradients = gradients if gradients is not None else load_gradients(study)
    main = [comparison for comparison in comparisons if comparison.score == comparisons[0].score]
    others = list(comparisons[len(main) :])
    _make_folders(folder)
    tell("tables")
    write_tables(study, comparisons, across, folder / "tables", claim_records(claims))
    write_over_optimisation(study, comparisons, folder / "tables")
    write_claims(claims, folder / "tables")
    if len(exact := gradient_table(main, gradients)):
        (folder / "tables" / "gradients.csv").write_text(csv(exact), encoding="utf-8", errors="replace")
    sections = []
    for position, comparison in enumerate(main):
        prefix = f"task{position + 1}-" if len(main) > 1 else ""
        beside = [other for other in others if other.task == comparison.task]
        files = folder / "figures" if figures else None
        sections.append(_section(study, comparison, beside, prefix, gradients, files, units, tell))
    tuned, tuned_figures = tuned_parts(study, main), []
    for position, part in enumerate(tuned):
        drawing = sensitivity(part, f"sensitivity{position + 1}" if len(tuned) > 1 else "sensitivity")
        tuned_figures.append(_framed(drawing, folder / "figures" if figures else None) if drawing else Markup(""))
    if tuned:
        (folder / "tables" / "tuning.csv").write_text(csv(tuning_table(tuned)), encoding="utf-8", errors="replace")
    tasks = task_profiles(main)
    tasks_svg = _figure(tasks, folder / "figures" if figures else None) if tasks is not None else Markup("")
    tell("page")
    text = (
        _environment()
        .get_template("page.html.j2")
        .render(
            study=study,
            sections=sections,
            across=across,
            over_tasks=tasks,
            over_svg=tasks_svg,
            units=units,
            over_table=records(across_tasks(main)[0]),
            metric=main[0].score.title if main else "",
            methods=methods(study, main),
            formulas=of_baselines(study, main),
            stated=_stated(study, main),
            claims=claims,
            claim_notes=claim_notes(study),
            family_words=FAMILY_WORDS,
            confirmed=confirmed_rows(study, main),
            claims_confirmed=confirmed_claims(study, claims),
            tuned=tuned,
            tuned_figures=tuned_figures,
            provenance=provenance(study),
            summary_columns=SUMMARY,
            parameters=PARAMETERS,
            catalogue=AXES,
            style=Markup(_asset("page.css")),
            script=Markup(_asset("page.js")),
        )
    )
    page = folder / "index.html"
    temporary = folder / f".index.{secrets.token_hex(4)}.tmp"
    temporary.write_text(text, encoding="utf-8", errors="replace")
    os.replace(temporary, page)
    return page


def _stated(study: Study, main: Sequence[Comparison]) -> list[dict[str, Any]]:
    """What the page says of the analysis that was stated beforehand; nothing where none was stated."""
    if not main or not study.conduct.was_stated:
        return []
    contrasts = sum(len(comparison.analysis.contrasts) for comparison in main)
    named = [study.labels[group] for group in study.labels if group in study.conduct.stated]
    return [
        {
            "name": name,
            "rows": items(history, main[0].score.name, main[0].analysis.delta, contrasts),
            "contrasts": named,
            "versions": history_rows(history),
        }
        for name, history in study.conduct.versions
    ]


def _section(
    study: Study,
    comparison: Comparison,
    others: list[Comparison],
    prefix: str,
    gradients: pd.DataFrame | None,
    figures: Path | None,
    units: Sequence[str],
    tell: Progress,
) -> TaskSection:
    tell("figures")
    plots: dict[str, list[tuple[Drawing, Markup]]] = {}
    for drawing in draw(study, comparison, gradients, units):
        name = drawing.name.removesuffix(f"-{drawing.view}")
        drawing.name = prefix + drawing.name
        plots.setdefault(name, []).append((drawing, _figure(drawing, figures)))
    return TaskSection(
        key=prefix.rstrip("-") or "task",
        task=comparison.task,
        comparison=comparison,
        others=others,
        findings=find(study, comparison),
        baseline=comparison.baseline_words,
        unit=cost_unit(study.runs),
        plots=plots,
        axes=legend(study, comparison),
        rows=_rows(study, comparison),
        details=details(study, comparison),
        gradients=gradient_rows(comparison, gradients),
        theory=theory_words(predictors(comparison, gradients)),
        gold=_gold(study, comparison),
    )


def _gold(study: Study, comparison: Comparison) -> Gold | None:
    frame = over_optimisation.table(study, comparison)
    if frame.empty:
        return None
    rows = [(row["group"], over_optimisation.texts(row)) for row in records(frame)]
    words = over_optimisation.sentence(frame, comparison.baseline)
    return Gold(words, over_optimisation.heads(frame), rows, over_optimisation.CAPTION)


def _figure(drawing: Drawing, folder: Path | None) -> Markup:
    text = svg_text(drawing)
    if folder is not None:
        save(drawing, text, folder)
    return Markup(inline_svg(drawing, text))  # ElementTree escapes every text in it


def _framed(drawing: Drawing, folder: Path | None) -> Markup:
    """A figure of the page with its caption."""
    freeze(drawing)
    macro: Any = _environment().get_template("parts.html.j2").module
    return Markup(macro.figure(drawing, _figure(drawing, folder)))


def _rows(study: Study, comparison: Comparison) -> list[dict[str, Any]]:
    """The table of cells, with what filters need and the place of the interval on a common scale."""
    table = comparison.table
    ends = (
        table.loc[table["stable"], ["low", "high", "mean"]] if table["stable"].any() else table[["low", "high", "mean"]]
    )
    values = ends.to_numpy(dtype=np.float64)
    values = values[np.isfinite(values)]
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 1.0)
    width = high - low or 1.0

    def at(value: float) -> float:
        return round(float(np.clip((value - low) / width, 0.0, 1.0)) * 100, 1)

    costs = study.cells.groupby("group", sort=False)[["seconds", "tokens"]].mean()
    rows = []
    for row in records(table):
        lost = row["diverged"] + row["stopped"] + row["failed"]
        state = "unfinished" if row["unfinished"] else "lost seeds" if lost else "finished"
        interval = np.isfinite(row["low"])
        row |= {
            "state": state,
            "axes": [study.values[row["group"]][axis.key] for axis in study.axes],
            "baseline": row["group"] == comparison.baseline,
            "hours": float(costs["seconds"][row["group"]]) / 3600,
            "tokens": float(costs["tokens"][row["group"]]),
            "mark": None
            if not np.isfinite(row["mean"])
            else {
                "at": at(row["mean"]),
                "low": at(row["low"]) if interval else None,
                "high": at(row["high"]) if interval else None,
            },
        }
        rows.append(row)
    return rows


def _default_folder(study: Study) -> Path:
    first = study.runs[0].output_folder("report")
    if len(study.runs) == 1:
        return first
    return study.runs[0].output_folder("report", ("with-" + "-".join(run.path.name for run in study.runs[1:]))[:120])


def _make_folders(folder: Path) -> None:
    """The report's folders, without links: what is written must not reach files elsewhere."""
    for each in (folder, folder / "tables", folder / "figures"):
        if each != folder and each.is_symlink():
            each.unlink()
        each.mkdir(parents=True, exist_ok=True)
        for entry in each.iterdir():
            if entry.is_symlink():
                entry.unlink()


def _asset(name: str) -> str:
    return files("klab.reports").joinpath("templates", name).read_text(encoding="utf-8")


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("klab.reports", "templates"),
        autoescape=select_autoescape(["j2", "html"], default=True, default_for_string=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": number,
        "p": p_words,
        "p_number": p_number,
        "verdict": verdict_words,
        "signed": signed,
        "formula": formula,
        "records": records,
    }
    environment.globals |= {"mean_span": mean_span, "difference_span": difference_span}
    environment.tests |= {"finite": lambda value: bool(np.isfinite(value))}
    return environment
