"""Cancelling cells: those that wait never start, those that run are stopped."""

from __future__ import annotations

import time
from collections.abc import Iterable

from klab.harness.dispatch.backends import Executor
from klab.harness.dispatch.status import executors_of
from klab.harness.dispatch.tuning import second_stage_names, stop
from klab.harness.store import Run


def cancel(run: Run, cell_ids: Iterable[str], executors: Iterable[Executor] | None = None) -> None:
    """Cancel these cells until a new launch resumes them. Their measurements and checkpoints stay.

    Jobs all of whose cells are cancelled are ended; a job with other cells drops the cancelled ones after its current
    update. The cancellation is recorded before anything else, and a worker reads the record once more when it has
    claimed a cell, so that no cell starts after this returned. Cells of a second stage may be named before their
    settings are chosen: their arms then do not choose.
    """
    names = list(cell_ids)
    later = [name for name in names if name not in run.manifest["cells"]]
    if later:
        stop(run, later)
        run.refresh()
    named = second_stage_names(run) if later else {}  # those that chose in between
    chosen = [named.get(name, name) for name in names if name not in later or name in named]
    for identity in chosen:
        run.cell(identity).append_attempt({"event": "cancelled", "at": time.time()})
    for executor in executors_of(run) if executors is None else executors:
        executor.cancel(run, [*chosen, *(name for name in later if name not in named)])
    for identity in chosen:
        run.cell(identity).revoke()
