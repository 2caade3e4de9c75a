"""The packs of a run's cells, from the step times measured so far on this hardware."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from klab.harness.dispatch.backends import Pack
from klab.harness.dispatch.packing.packs import make_packs
from klab.harness.dispatch.packing.step_times import HardwareKey, read_step_times
from klab.harness.store import Run


def plan_packs(
    run: Run,
    cells: Iterable[str],
    workers: int,
    size: int | None = None,
    hardware: HardwareKey | None = None,
    running: Collection[int] = (),
) -> Sequence[Pack]:
    """The packs for these cells; see `make_packs`.

    Args:
        workers: jobs that run at the same time.
        size: cells per pack at most; None chooses.
        hardware: where the jobs will run; None where nothing is measured.
        running: sizes of the packs that run now.
    """
    resolved = {identity: run.resolved(identity) for identity in cells}
    return make_packs(resolved, size, workers, read_step_times(run.path.parent, hardware), running).packs
