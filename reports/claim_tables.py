"""Judged claims as tables and as plain data, and what to know of those that are not judged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from klab.harness.store.confirmation import confirms
from klab.harness.store.stated_claims import recorded_claims
from klab.reports.claims import ClaimingStudy, Judged, left_out
from klab.reports.tables import md_text, tex_text, write_csv
from klab.reports.words import difference_span

CLAIM_HEADS = ("claim", "expected", "task", "difference", "verdict")
"""Columns of a table for people."""
FAMILY_WORDS = (
    "Differences are means over seeds of the first side minus the second, seed by seed, averaged over cells that are "
    "alike in all else; the intervals hold together for all claims and tasks with 95%."
)


def claim_notes(study: ClaimingStudy) -> tuple[str, ...]:
    """What to know of claims that are not judged, in sentences."""
    notes = [f"Not judged, because its cells are not in this report: {claim}" for claim in left_out(study)]
    for run in study.runs:
        for each in recorded_claims(run.manifest, run.path / "manifest.json"):
            if each.withdrawn is not None:
                claim = each.stated.claim.claim
                notes.append(f"Withdrawn from the grid file after {each.withdrawn} runs had results: {claim}")
        dropped = (confirms(run) or {}).get("dropped", ())
        notes += [f"Not judged, because some of its cells were not run again: {claim}" for claim in dropped]
    return tuple(notes)


def claim_texts(found: Sequence[Judged]) -> list[tuple[str, str, str, str, str]]:
    """One row per claim and task under `CLAIM_HEADS`; the claim stands in its first row, with its verdict over all."""
    rows = []
    for each in found:
        for place, row in enumerate(each.rows):
            claim = f"{each.claim} ({each.source})" if each.source else each.claim
            first = (f"{claim}: {each.words}", f"{each.score.title} {each.expect}") if place == 0 else ("", "")
            span = difference_span(row.estimate, row.low, row.high)
            rows.append((*first, row.task, span, f"{row.verdict}: {row.finding}"))
    return rows


def claim_records(found: Sequence[Judged]) -> list[dict[str, Any]]:
    """The claims as plain data."""
    return [
        {
            **{name: value for name, value in asdict(each).items() if name not in ("score", "rows")},
            "score": each.score.name,
            "title": each.score.title,
            "rows": [asdict(row) for row in each.rows],
        }
        for each in found
    ]


def claims_table(found: Sequence[Judged]) -> pd.DataFrame:
    """One row per claim and task."""
    rows = [
        {
            "claim": each.claim,
            "source": each.source,
            "score": each.score.name,
            "expect": each.expect,
            "delta": np.nan if each.delta is None else each.delta,
            "overall": each.verdict,
            **asdict(row),
            "late": each.late,
        }
        for each in found
        for row in each.rows
    ]
    return pd.DataFrame(rows)


def write_claims(found: Sequence[Judged], folder: Path) -> None:
    """``claims.csv``, ``claims.md`` and ``claims.tex``; nothing where nothing is claimed."""
    if not found:
        return
    write_csv(claims_table(found), folder / "claims.csv")
    for name, text in (("md", _markdown(found)), ("tex", _latex(found))):
        (folder / f"claims.{name}").write_text(text, encoding="utf-8", errors="replace")


def _markdown(found: Sequence[Judged]) -> str:
    lines = ["| " + " | ".join(CLAIM_HEADS) + " |", "|" + "---|" * len(CLAIM_HEADS)]
    lines += ["| " + " | ".join(map(md_text, row)) + " |" for row in claim_texts(found)]
    return "\n".join(lines) + "\n"


def _latex(found: Sequence[Judged]) -> str:
    head = " & ".join(map(tex_text, CLAIM_HEADS)) + r" \\"
    body = [" & ".join(map(tex_text, row)) + r" \\" for row in claim_texts(found)]
    caption = f"Claims stated beforehand. {FAMILY_WORDS}"
    lines = ["% \\usepackage{booktabs}", r"\begin{table}", r"\centering", rf"\caption{{{tex_text(caption)}}}"]
    lines += [r"\begin{tabular}{p{0.35\linewidth}lllp{0.2\linewidth}}", r"\toprule", head, r"\midrule", *body]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}"]) + "\n"
