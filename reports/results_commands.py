"""What to type to repeat a study, to make its report, and to repeat one of its cells."""

from __future__ import annotations

import shlex

from klab.harness.store.archive import Archive
from klab.harness.store.confirmation import confirms
from klab.reports.study_results import StudyResults


def commands(results: StudyResults) -> list[str]:
    """The commands, one to a line."""
    place, run = shlex.quote(results.place), f"runs/{results.name}"
    cells = results.study.cells
    first = next(iter(cells.loc[cells["state"] == "finished", "cell"]), "CELL")
    again = confirms(results.run)
    if again is not None:
        lines = [f"{_confirm(str(again['run']), results)} --name {results.name}"]
    else:
        lines = [f"klab launch {place}/grid.yaml"]
    lines += [_confirm(results.name, each) for each in results.confirmations]
    lines.append(f"klab report {run}")
    if isinstance(results.run, Archive):
        lines.append(f"klab report {place}   # from what is kept here, without training")
        lines.append(f"klab rerun {place} {first}   # one cell again: the same numbers?")
    return lines


def _confirm(name: str, confirmation: StudyResults) -> str:
    record = confirms(confirmation.run) or {}
    which = f"--top {record.get('top')}"
    if "claims" in record:
        which = "--claims --undecided" if record.get("asked") == "all" else "--claims"
    return f"klab confirm {name} {which} --seeds {len(confirmation.run.manifest['seeds'])}"
