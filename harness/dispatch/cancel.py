"""Take cells out of the queue and out of the hands of running jobs."""

from __future__ import annotations

import time
from collections.abc import Iterable

from klab.harness.dispatch.backends import Executor
from klab.harness.dispatch.status import executors_of
from klab.harness.store import Run


def cancel(run: Run, cell_ids: Iterable[str], executors: Iterable[Executor] | None = None) -> None:
    """Cancel these cells. What they measured so far, and their checkpoints, stay; a new launch takes them up again.

    Jobs all of whose cells are cancelled are ended; a job with other cells drops the cancelled ones after its current
    update.
    """
    chosen = list(cell_ids)
    for identity in chosen:
        run.cell(identity).append_attempt({"event": "cancelled", "at": time.time()})
    for executor in executors_of(run) if executors is None else executors:
        executor.cancel(run, chosen)
    for identity in chosen:
        run.cell(identity).revoke()
