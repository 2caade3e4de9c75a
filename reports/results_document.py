"""One document about several studies: what fresh seeds established, what was run, and every study by itself.

It is made of the reports of runs and archives alone, so that nobody copies a number.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from klab.harness.store.confirmation import confirms
from klab.reports.claim_words import CONTRADICTED, DEPENDS, HOLDS
from klab.reports.confirmation import confirmed_rows
from klab.reports.inference import DIFFERS, UNDECIDED
from klab.reports.markdown import bullets, paragraph, plain, table
from klab.reports.results_study import Picture, study_section
from klab.reports.study_results import StudyResults
from klab.reports.words import difference_span, joined

TITLE = "What the studies found"
_MADE = "<!-- Made by `klab results`; changes here are lost. -->"


def document(
    studies: Sequence[StudyResults],
    title: str | None = None,
    pictures: Mapping[str, Sequence[Picture]] | None = None,
    preface: str = "",
) -> str:
    """The document as Markdown.

    Args:
        studies: as `collect` finds them.
        pictures: by name of a study, the figures that are shown with it.
        preface: Markdown of the authors' own, which stands before everything that is made.
    """
    shown = pictures or {}
    lines = [f"# {plain(title or TITLE)}", "", _MADE, ""]
    lines += paragraph(
        "Every number below comes from the runs' own files by way of their reports; the same command makes this "
        "document again. The training run is the unit: intervals are over seeds, hold together for everything that a "
        "table compares, and say nothing of other tasks and sizes than those that were run."
    )
    if preface.strip():
        lines += [preface.strip(), ""]
    lines += _established(studies)
    lines += ["## The studies", "", *_overview(studies)]
    for each in studies:
        lines += study_section(each, shown.get(each.name, ()))
    while lines and not lines[-1]:
        lines.pop()
    return "\n".join(lines) + "\n"


def _established(studies: Sequence[StudyResults]) -> list[str]:
    """The lead: what fresh seeds have shown; what the studies alone say where nothing was confirmed."""
    lines = ["## What fresh seeds established", ""]
    found = [sentence for each in studies for sentence in _confirmed_sentences(each)]
    if found:
        lines += bullets(found)
    elif any(each.confirmations for each in studies):
        lines += paragraph("Nothing was decided on fresh seeds.")
    else:
        lines += paragraph("No confirmation on fresh seeds is among these studies; what follows is exploration.")
    counts = [words for each in studies if (words := _counted(each))]
    if counts:
        lines += ["On the seeds of the studies themselves:", "", *bullets(counts)]
    return lines


def _confirmed_sentences(results: StudyResults) -> Iterator[str]:
    """What a confirmation decided, each sentence with the rows that it rests on."""
    for again in [results] if confirms(results.run) is not None else results.confirmations:
        yield from _decided(results.name, again)


def _decided(name: str, again: StudyResults) -> Iterator[str]:
    for claim in again.claims:
        if claim.verdict == UNDECIDED:
            continue
        rows = "; ".join(
            f"{row.task}: {difference_span(row.estimate, row.low, row.high)}, {row.n} seeds" for row in claim.rows
        )
        source = f" ({claim.source})" if claim.source else ""
        yield (
            f"**{plain(claim.words.capitalize())}**: {plain(f'{claim.claim}{source}.')} "
            f"{plain(f'Study {name}; {claim.score.title}; {rows}.')}"
        )
    for part in confirmed_rows(again.study, again.comparisons):
        for row in part["rows"]:
            if row.verdict in (DIFFERS, "equivalent"):
                words = "differs from the baseline" if row.verdict == DIFFERS else "is equivalent to the baseline"
                yield f"**{plain(row.label)}** {words}: {plain(row.difference)}. Study {plain(name)}."


def _counted(results: StudyResults) -> str:
    """How the claims of a study stand, in a clause."""
    if not results.claims:
        return ""
    names = {
        HOLDS: ("holds here", "hold here"),
        CONTRADICTED: ("is contradicted here", "are contradicted here"),
        DEPENDS: ("depends on the task", "depend on the task"),
        UNDECIDED: ("is undecided", "are undecided"),
    }
    counts = [
        f"{count} {words[count > 1]}"
        for verdict, words in names.items()
        if (count := sum(each.verdict == verdict for each in results.claims))
    ]
    return f"{plain(results.name)}: of {len(results.claims)} claims {joined(counts)}."


def _overview(studies: Sequence[StudyResults]) -> list[str]:
    """The table of all studies, confirmations under what they confirm."""
    every = [one for each in studies for one in (each, *each.confirmations)]
    heads = ("study", "runs", "seeds", "wall time", "hours", "machine", "commit", "date", "versions")
    return table(heads, [_row(each) for each in every])


def _row(results: StudyResults) -> tuple[str, ...]:
    manifest, cells = results.run.manifest, results.study.cells
    ended = int(cells["state"].isin(["finished", "diverged", "stopped"]).sum())
    hardware = manifest["hardware"]
    when = results.span
    return (
        results.name,
        str(ended) if ended == len(cells) else f"{ended} of {len(cells)}",
        _seeds([int(seed) for seed in manifest["seeds"]]),
        "–" if when is None else _duration(when[1] - when[0]),
        _hours(results),
        _machine(hardware),
        _commit(manifest.get("commit")),
        "–" if when is None else time.strftime("%Y-%m-%d", time.gmtime(when[0])),
        _versions(results),
    )


def _seeds(seeds: Sequence[int]) -> str:
    if len(seeds) > 2 and list(seeds) == list(range(seeds[0], seeds[-1] + 1)):
        return f"{seeds[0]}–{seeds[-1]}"
    return ", ".join(map(str, seeds[:12])) + (", …" if len(seeds) > 12 else "")


def _duration(seconds: float) -> str:
    minutes = max(round(seconds / 60), 1)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _hours(results: StudyResults) -> str:
    used = results.usage
    gpu = f"{used.gpu_hours:.2f} GPU-hours, " if used.gpu_hours else ""
    return f"{gpu}{used.cpu_hours:.2f} core-hours"


def _machine(hardware: Mapping[str, Any]) -> str:
    gpus = [str(name) for name in hardware.get("gpus") or []]
    named = f", {len(gpus)} × {gpus[0]}" if gpus else ""
    return f"{hardware.get('processor', 'unknown')}, {hardware.get('cores', '?')} cores{named}"


def _commit(commit: object) -> str:
    if not isinstance(commit, str) or not commit:
        return "not in a repository"
    digits, plus, changes = commit.partition("+")
    return f"{digits[:10]}{plus}{changes}"


def _versions(results: StudyResults) -> str:
    """klab and torch, as the cells recorded them; else as the run did."""
    own = {name: str(version) for name, version in results.run.manifest["versions"].items() if version}
    used = {name: " and ".join(sorted(found)) for name, found in results.study.software.items()}
    return ", ".join(f"{name} {({**own, **used})[name]}" for name in ("klab", "torch") if name in {**own, **used})
