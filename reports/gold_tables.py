"""The table of over-optimisation as CSV, Markdown and LaTeX."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from klab.reports import over_optimisation
from klab.reports.comparison import Comparison
from klab.reports.frame import records
from klab.reports.study import Study
from klab.reports.tables import md_rows, md_text, tex_table, tex_text, write_csv


def write_over_optimisation(study: Study, comparisons: Sequence[Comparison], folder: Path) -> None:
    """Writes `over_optimisation.csv`, `.md` and `.tex`, with every task that has a gold reward; nothing without one."""
    tables = {each.task: (each, over_optimisation.table(study, each)) for each in reversed(comparisons)}
    found = [(each, frame) for each, frame in reversed(tables.values()) if len(frame)]
    if not found:
        return
    joined = [frame.assign(task=each.task)[["task", *frame.columns]] for each, frame in found]
    write_csv(pd.concat(joined, ignore_index=True), folder / "over_optimisation.csv")
    md, tex = [], []
    for comparison, frame in found:
        head = over_optimisation.heads(frame)
        rows = [over_optimisation.texts(row) for row in records(frame)]
        md.append("\n".join([f"**{md_text(comparison.task)}**, gold along training", "", *md_rows(head, rows)]))
        body = [" & ".join(map(tex_text, row)) + r" \\" for row in rows]
        caption = f"Gold reward along training on {tex_text(comparison.task)}. {tex_text(over_optimisation.CAPTION)}"
        tex.append(tex_table([tex_text(text) for text in head], body, caption))
    for suffix, parts in (("md", md), ("tex", tex)):
        text = "\n\n".join(parts) + "\n"
        (folder / f"over_optimisation.{suffix}").write_text(text, encoding="utf-8", errors="replace")
