"""The book of claims: selects claims, examines them, and writes the findings as plain data or Markdown."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from klab.grid import UserError
from klab.harness.claims.claim import CLAIMS, EXPECTED, Claim, Finding, Number

SUBJECTS = {
    "estimator_values": "KL estimators as values",
    "kl_gradients": "KL estimators in the loss",
    "kl_rewards": "KL estimators in the reward",
    "kl_off_policy": "KL terms off-policy",
    "fixed_points": "Where training comes to rest",
    "moving_references": "Moving references and falling β",
    "importance": "Importance ratios",
    "weights": "Weights",
    "truncation": "Caps and masks",
    "credit": "Credit assignment",
    "advantages": "Advantages and aggregation",
    "documents": "References and log-ratios",
    "trust_regions": "Trust regions",
    "divergences": "Divergences beside reverse KL",
    "methods": "Methods of 2025 and 2026",
    "entropy": "Entropy",
    "seeds": "Training seeds",
    "empirical": "Claims about training",
}
"""The modules that hold claims, with their subjects."""


def book() -> dict[str, Claim]:
    """Every claim by its id, in the order of the ids."""
    for module in SUBJECTS:
        importlib.import_module(f"klab.harness.claims.{module}")
    return dict(sorted(CLAIMS.items()))


def subject(claim: Claim) -> str:
    """What the module that holds the claim is about."""
    return SUBJECTS[claim.examine.__module__.rsplit(".", 1)[1]]


def selected(identifiers: Iterable[str] = ()) -> list[Claim]:
    """The claims of these ids, in the order of the book; `C13` also selects its parts `C13b`, ...; all by default.

    Raises:
        UserError: for an id that is not in the book.
    """
    every = book()
    wanted = [identifier.strip() for identifier in identifiers]
    if not wanted:
        return list(every.values())
    chosen: set[str] = set()
    for identifier in wanted:
        exact = [name for name in every if name == identifier] or [
            name for name in every if name.lower() == identifier.lower()
        ]
        family = [name for name in every if name[:3].lower() == identifier.lower()]
        if not exact and not family:
            raise UserError("there is no such claim", key="CLAIM", value=identifier, allowed=every)
        chosen.update(exact, family)
    return [claim for name, claim in every.items() if name in chosen]


def examine(identifiers: Iterable[str] = (), progress: Callable[[Claim], None] | None = None) -> list[Finding]:
    """Examine claims one after the other; `progress` is called before each."""
    findings = []
    for claim in selected(identifiers):
        if progress is not None:
            progress(claim)
        findings.append(claim.examined())
    return findings


def records(findings: Sequence[Finding]) -> dict[str, Any]:
    """The findings as plain data."""
    return {"schema": 1, "claims": [{"subject": subject(finding.claim), **finding.record()} for finding in findings]}


def digits(value: float) -> str:
    """A measured number as text: four significant digits."""
    return f"{value:.4g}"


def measured(number: Number | None) -> str:
    """One number as `name: value (printed value)`, the latter only when it differs."""
    if number is None:
        return ""
    printed = f" (printed: {number.book})" if number.agrees is False else ""
    return f"{number.name}: {digits(number.value)}{printed}"


def tally(findings: Sequence[Finding]) -> str:
    """How many claims have which verdict, and how many verdicts and numbers differ from the record."""
    counts = {verdict: sum(finding.verdict == verdict for finding in findings) for verdict in EXPECTED.values()}
    verdicts = ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)
    printed = [number for finding in findings for number in finding.numbers if number.book is not None]
    loose = sum(number.within is not None for number in printed)
    differing = sum(number.agrees is False for number in printed)
    other = sum(not finding.as_expected for finding in findings)
    return (
        f"{len(findings)} claims: {verdicts}. {len(printed)} numbers compared with printed ones "
        f"({len(printed) - loose} to the last digit, {loose} of other random draws within a tolerance), "
        f"{differing} differ; {other} verdicts differ from the record."
    )


def markdown(findings: Sequence[Finding]) -> str:
    """A table of all findings, then every claim in full."""
    lines = [
        "# The book of claims",
        "",
        tally(findings),
        "",
        "| claim | source | statement | measured | verdict |",
        "|---|---|---|---|---|",
    ]
    for finding in findings:
        claim = finding.claim
        cells = (claim.id, claim.source, claim.statement, measured(finding.headline), f"**{finding.verdict}**")
        lines.append("| " + " | ".join(_cell(cell) for cell in cells) + " |")
    for finding in findings:
        lines += ["", *_section(finding)]
    return "\n".join(lines) + "\n"


def _section(finding: Finding) -> list[str]:
    claim = finding.claim
    lines = [f"## {claim.id}: {finding.verdict}", "", claim.statement, "", f"*{claim.source}. {subject(claim)}.*"]
    if finding.numbers:
        lines += ["", "| number | measured | printed |", "|---|---:|---:|"]
        for number in finding.numbers:
            note = "" if number.comparison in ("", "agrees") else f" ({number.comparison})"
            printed = (number.book or "") + note
            lines.append(f"| {_cell(number.name)} | {digits(number.value)} | {printed} |")
    if finding.checks:
        lines.append("")
        for check in finding.checks:
            scope = " *(under the condition)*" if check.restricted else ""
            lines.append(f"- {'yes' if check.holds else 'no'}: {check.proposition}{scope}")
    if finding.remarks:
        lines += ["", " ".join(finding.remarks)]
    return lines


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
