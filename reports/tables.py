"""Tables as CSV, Markdown, LaTeX and JSON.

Markdown and LaTeX are written here and not by pandas: `DataFrame.to_markdown` escapes no pipes and needs `tabulate`,
and `Styler.to_latex` escapes neither a row that begins with a bracket nor the caption.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from klab.grid import UserError
from klab.reports.across import Across
from klab.reports.comparison import Comparison
from klab.reports.frame import records
from klab.reports.inference import DIFFERS, Analysis
from klab.reports.inference.fraction import Fit
from klab.reports.schema import SUMMARY
from klab.reports.study import Study
from klab.reports.words import difference_span, mean_span, number, p_number, verdict_words

_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")
_PAGE = 40
"""Rows that fit a page."""
FORMATS = ("md", "latex", "csv", "json")
_LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': "''",
    "−": "$-$",
    "·": r"$\cdot$",
    "×": r"$\times$",
    "β": r"$\beta$",
    "√": r"$\surd$",
    "…": r"\ldots{}",
}


def formatted(
    comparisons: Sequence[Comparison],
    form: str,
    across: Sequence[Across] = (),
    claims: Sequence[Mapping[str, Any]] = (),
) -> str:
    """The summary of all tasks in one of `FORMATS`; JSON also has what was found over all tasks, and the claims.

    Raises:
        UserError: for another format.
    """
    if form not in FORMATS:
        raise UserError("unknown format", key="format", value=form, allowed=FORMATS)
    if form == "csv":
        return csv(summary(comparisons))
    if form == "json":
        return to_json(comparisons, across, claims)
    return "\n\n".join(markdown(c) if form == "md" else latex(c) for c in comparisons) + "\n"


def csv(frame: pd.DataFrame) -> str:
    """A frame as CSV in which no text is a formula to a spreadsheet: an apostrophe stands before such text."""
    numeric = [pd.api.types.is_numeric_dtype(column) for _, column in frame.items()]
    columns = zip(frame.items(), numeric, strict=True)
    safe = {name: column if number else column.map(_as_text) for (name, column), number in columns}
    return pd.DataFrame(safe).to_csv(index=False)


def _as_text(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    marked = "'" + value if value.startswith(_FORMULA_STARTS) else value
    return marked.replace("\r\n", "\n").replace("\r", "\n")  # pandas puts line feeds in quotes, and nothing else


def write_csv(frame: pd.DataFrame, path: Path) -> None:
    """A frame as a CSV file; see `csv`."""
    path.write_text(csv(frame), encoding="utf-8", errors="replace")


def summary(comparisons: Sequence[Comparison]) -> pd.DataFrame:
    """The tables of all comparisons under each other; columns are documented in `schema.SUMMARY`."""
    if not comparisons:
        return pd.DataFrame(columns=["group", *SUMMARY])
    return pd.concat([comparison.table for comparison in comparisons], ignore_index=True)


def to_json(
    comparisons: Sequence[Comparison], across: Sequence[Across] = (), claims: Sequence[Mapping[str, Any]] = ()
) -> str:
    """What was run and the whole analysis, for every score and task, with null for what is not a number."""
    found = {
        "schema": 2,
        "comparisons": [comparison_data(comparison) for comparison in comparisons],
        "across": [across_data(one) for one in across],
        "claims": [_plain(dict(one)) for one in claims],
    }
    return json.dumps(found, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def across_data(across: Across) -> dict[str, Any]:
    """A comparison over all tasks as plain data."""
    found = {
        "score": across.score.name,
        "tasks": list(across.tasks),
        "delta": across.delta,
        "alpha": across.alpha,
        "table": records(across.table),
    }
    return {key: _plain(value) for key, value in found.items()}


def comparison_data(comparison: Comparison) -> dict[str, Any]:
    """A comparison as plain data: the fields of its `Analysis`, and beside them what was compared."""
    score, analysis = comparison.score, comparison.analysis
    found = {
        "task": comparison.task,
        "score": score.name,
        "title": score.title,
        "meaning": score.meaning,
        "higher_is_better": score.higher,
        "baseline": comparison.baseline,
        "seeds": list(comparison.seeds),
        "worst": comparison.worst,
        "seed_deviation": comparison.seed_deviation,
        "sampling_deviation": comparison.sampling_deviation,
        **analysis_data(analysis),
        "notes": list(comparison.notes),
        "table": records(comparison.table),
    }
    return {key: _plain(value) for key, value in found.items()}


def analysis_data(analysis: Analysis) -> dict[str, Any]:
    """The fields of an analysis, its frames as lists of rows."""
    found, best = _fields(analysis), analysis.best
    if found.pop("fit") is not None and analysis.fit is not None:
        found["fit"] = {**_fields(analysis.fit), "resolution": asdict(analysis.fit.resolution)}
    return found | {"best": None if best is None else best._asdict()}


def _fields(record: Analysis | Fit) -> dict[str, Any]:
    values = {each.name: getattr(record, each.name) for each in fields(record)}
    return {name: records(value) if isinstance(value, pd.DataFrame) else value for name, value in values.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value


def markdown(comparison: Comparison) -> str:
    """A table for a README or a pull request."""
    title = f"**{md_text(comparison.task)}**, {md_text(comparison.score.title)}, simultaneous 95% intervals over seeds"
    rows = [_texts(record) for record in records(comparison.table)]
    return "\n".join([title, "", *md_rows(_heads(comparison), rows)])


def md_rows(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table whose first column is text."""
    lines = ["| " + " | ".join(head) + " |", "|" + "|".join(["---", *["---:"] * (len(head) - 1)]) + "|"]
    return lines + ["| " + " | ".join([md_text(label), *numbers]) + " |" for label, *numbers in rows]


def latex(comparison: Comparison) -> str:
    """A `table` for a paper, a `longtable` over several pages where it is long; needs booktabs, and longtable then."""
    head = [tex_text(text) for text in _heads(comparison)]
    body = []
    for record in records(comparison.table):
        texts = [tex_text(text) for text in _texts(record)]
        if record["verdict"] == DIFFERS:
            texts[2] = rf"\textbf{{{texts[2]}}}"
        body.append(" & ".join(texts) + r" \\")
    caption = (
        f"{tex_text(_capital(comparison.score.title))} on {tex_text(comparison.task)}: mean over seeds and difference "
        "to the baseline seed by seed, with simultaneous 95\\% intervals; $p$ adjusted for all cells. Diverged runs "
        "count as the worst one with a score, failed runs are missing. Bold: differs from the baseline"
        f"{tex_text(f' ({words})') if (words := comparison.baseline_words) else ''}. Equivalent: within "
        f"$\\pm{comparison.analysis.delta:g}$."
    )
    return tex_table(head, body, caption)


def tex_table(head: Sequence[str], body: Sequence[str], caption: str) -> str:
    """A `table`, or a `longtable` where it is long, of rows that are LaTeX and end in a double backslash."""
    columns, heads = f"l{'r' * (len(head) - 1)}", [r"\toprule", " & ".join(head) + r" \\", r"\midrule"]
    if len(body) <= _PAGE:
        begin = [r"\begin{table}", r"\centering", rf"\caption{{{caption}}}", rf"\begin{{tabular}}{{{columns}}}", *heads]
        lines = ["% \\usepackage{booktabs}", *begin, *body, r"\bottomrule", r"\end{tabular}", r"\end{table}"]
    else:
        begin = [rf"\begin{{longtable}}{{{columns}}}", rf"\caption{{{caption}}} \\", *heads, r"\endfirsthead"]
        repeated = [*heads, r"\endhead", r"\bottomrule", r"\endfoot"]
        lines = ["% \\usepackage{booktabs,longtable}", *begin, *repeated, *body, r"\end{longtable}"]
    return "\n".join(lines)


def _heads(comparison: Comparison) -> list[str]:
    return ["cell", comparison.score.title, "difference", "p", "verdict", "KL", "accuracy", "finished"]


def _texts(record: dict[str, Any]) -> list[str]:
    return [
        str(record["label"]),
        mean_span(record["mean"], record["low"], record["high"]),
        difference_span(record["difference"], record["difference_low"], record["difference_high"]),
        p_number(record["p"]),
        verdict_words(record) or "–",
        number(record["reverse_kl_final"]),
        number(record["accuracy_final"]),
        f"{record['finished']}/{record['seeds']}",
    ]


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def md_text(text: str) -> str:
    """Text in a cell of a Markdown table."""
    for letter in "\\|<>`*_[]":
        text = text.replace(letter, "\\" + letter)
    return text.replace("\n", " ")


def tex_text(text: str) -> str:
    """Text in a cell of a LaTeX table."""
    text = "".join(_LATEX.get(letter, letter) for letter in text.replace("\n", " ")).replace("–", "--")
    return "{[}" + text[1:] if text.startswith("[") else text  # a row that begins with [ would be an argument of \\


def write_tables(
    study: Study,
    comparisons: Sequence[Comparison],
    across: Sequence[Across],
    folder: Path,
    claims: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Summary in every format, one row per cell and seed, and the frames of the analyses."""
    folder.mkdir(parents=True, exist_ok=True)
    for form in FORMATS:
        suffix = {"latex": "tex"}.get(form, form)
        (folder / f"summary.{suffix}").write_text(
            formatted(comparisons, form, across, claims), encoding="utf-8", errors="replace"
        )
    write_csv(study.cells, folder / "cells.csv")
    if across:
        frames = [one.table.assign(score=one.score.name)[["score", *one.table.columns]] for one in across]
        write_csv(pd.concat(frames, ignore_index=True), folder / "across.csv")
    for name in ("levels", "effects", "interactions"):
        write_csv(_joined(comparisons, [getattr(each.analysis, name) for each in comparisons]), folder / f"{name}.csv")
    fits = [each.analysis.fit for each in comparisons if each.analysis.fit is not None]
    if len(fits) == len(comparisons):
        for name in ("terms", "predictions"):
            write_csv(_joined(comparisons, [getattr(fit, name) for fit in fits]), folder / f"{name}.csv")


def _joined(comparisons: Sequence[Comparison], frames: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """A frame of each comparison in one, with the task and the score of every row."""
    named = [
        frame.assign(task=comparison.task, score=comparison.score.name)[["task", "score", *frame.columns]]
        for comparison, frame in zip(comparisons, frames, strict=True)
    ]
    return pd.concat(named, ignore_index=True) if named else pd.DataFrame()
