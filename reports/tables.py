"""Tables as CSV, Markdown, LaTeX and JSON.

Markdown and LaTeX are written here and not by pandas: `DataFrame.to_markdown` escapes no pipes and needs `tabulate`,
and `Styler.to_latex` escapes neither a row that begins with a bracket nor the caption.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from klab.grid import UserError
from klab.reports.comparison import Comparison
from klab.reports.frame import records
from klab.reports.schema import SUMMARY, TITLES
from klab.reports.study import Study

_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")
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
    "…": r"\ldots{}",
}


def formatted(comparisons: Sequence[Comparison], form: str) -> str:
    """The summary of all tasks in one of `FORMATS`.

    Raises:
        UserError: for another format.
    """
    if form not in FORMATS:
        raise UserError("unknown format", key="format", value=form, allowed=FORMATS)
    if form == "csv":
        return csv(summary(comparisons))
    if form == "json":
        return to_json(comparisons)
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


def _write_csv(frame: pd.DataFrame, path: Path) -> None:
    path.write_text(csv(frame), encoding="utf-8", errors="replace")


def summary(comparisons: Sequence[Comparison]) -> pd.DataFrame:
    """The summary tables of all tasks under each other; columns are documented in `columns.SUMMARY`."""
    if not comparisons:
        return pd.DataFrame(columns=["group", *SUMMARY])
    return pd.concat([comparison.table for comparison in comparisons], ignore_index=True)


def to_json(comparisons: Sequence[Comparison]) -> str:
    """Everything that was computed, with null for what is not a number."""
    tasks = [
        {
            "task": comparison.task,
            "metric": comparison.metric,
            "baseline": comparison.baseline,
            "seeds": list(comparison.seeds),
            "worst": comparison.worst,
            "critical_difference": comparison.critical,
            "cells": records(comparison.table),
            "effects": [
                effect._asdict() | {"levels": [level._asdict() for level in effect.levels]}
                for effect in comparison.effects
            ],
            "interactions": [pair._asdict() for pair in comparison.interactions],
        }
        for comparison in comparisons
    ]
    return json.dumps({"schema": 1, "tasks": _plain(tasks)}, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


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
    head = _heads(comparison)
    lines = [f"**{_md(comparison.task)}**, {TITLES[comparison.metric]}, 95% intervals over seeds", ""]
    lines += ["| " + " | ".join(head) + " |", "|" + "|".join(["---", *["---:"] * (len(head) - 1)]) + "|"]
    for record in records(comparison.table):
        label, *numbers = _texts(record)
        lines.append("| " + " | ".join([_md(label), *numbers]) + " |")
    return "\n".join(lines)


def latex(comparison: Comparison) -> str:
    """A `table` for a paper; needs the package booktabs."""
    head = [_tex(text) for text in _heads(comparison)]
    body = []
    for record in records(comparison.table):
        texts = [_tex(text) for text in _texts(record)]
        if record["best_group"] and np.isfinite(comparison.critical):
            texts[1] = rf"\textbf{{{texts[1]}}}"
        body.append(" & ".join(texts) + r" \\")
    caption = (
        f"{TITLES[comparison.metric].capitalize()} on {_tex(comparison.task)}: mean and 95\\% $t$-interval over "
        "seeds, paired difference to the "
        "baseline, Holm-adjusted sign-flip $p$. Diverged and failed seeds count at the worst score. Bold: not "
        "distinguishable from the best stable "
        "cell (Tukey, 5\\%)."
    )
    return "\n".join(
        [
            "% \\usepackage{booktabs}",
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{caption}}}",
            rf"\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}",
            r"\toprule",
            " & ".join(head) + r" \\",
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
        ]
    )


def _heads(comparison: Comparison) -> list[str]:
    return ["cell", TITLES[comparison.metric], "difference", "p (Holm)", "KL", "accuracy", "finished"]


def _texts(record: dict[str, Any]) -> list[str]:
    def span(center: str, low: str, high: str, sign: str) -> str:
        if not np.isfinite(record[center]):
            return "–"
        text = f"{record[center]:{sign}.3f}"
        return text + (f" [{record[low]:{sign}.3f}, {record[high]:{sign}.3f}]" if np.isfinite(record[low]) else "")

    return [
        str(record["label"]),
        span("mean", "low", "high", ""),
        span("difference", "difference_low", "difference_high", "+"),
        f"{record['p_holm']:.3f}" if np.isfinite(record["p_holm"]) else "–",
        f"{record['reverse_kl_final']:.3f}" if np.isfinite(record["reverse_kl_final"]) else "–",
        f"{record['accuracy_final']:.3f}" if np.isfinite(record["accuracy_final"]) else "–",
        f"{record['finished']}/{record['seeds']}",
    ]


def _md(text: str) -> str:
    for letter in "\\|<>`*_[]":
        text = text.replace(letter, "\\" + letter)
    return text.replace("\n", " ")


def _tex(text: str) -> str:
    text = "".join(_LATEX.get(letter, letter) for letter in text.replace("\n", " ")).replace("–", "--")
    return "{[}" + text[1:] if text.startswith("[") else text  # a row that begins with [ would be an argument of \\


def write_tables(study: Study, comparisons: Sequence[Comparison], folder: Path) -> None:
    """Summary in every format, one row per cell and seed, effects and interactions."""
    folder.mkdir(parents=True, exist_ok=True)
    for form in FORMATS:
        suffix = {"latex": "tex"}.get(form, form)
        (folder / f"summary.{suffix}").write_text(formatted(comparisons, form), encoding="utf-8", errors="replace")
    _write_csv(study.cells, folder / "cells.csv")
    effects = [
        {
            "task": c.task,
            "axis": e.axis,
            "reference": e.reference,
            **level._asdict(),
            "p": e.p,
            "p_holm": e.p_holm,
            "share": e.share,
            "confounded": ", ".join(e.confounded),
        }
        for c in comparisons
        for e in c.effects
        for level in e.levels
    ]
    _write_csv(pd.DataFrame(effects), folder / "effects.csv")
    pairs = [{"task": c.task, **pair._asdict()} for c in comparisons for pair in c.interactions]
    _write_csv(pd.DataFrame(pairs), folder / "interactions.csv")
