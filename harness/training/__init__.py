"""Training of cells: rollouts, rewards, updates, evaluations, checkpoints.

`run_cells` is the only entry. It loads torch when it is called, so that importing this package costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from klab.harness.training.distributed.process_group import ProcessGroup
    from klab.harness.training.runner import Progress

__all__ = ["run_cells"]


def run_cells(
    run_path: str | Path,
    cell_ids: Sequence[str],
    *,
    progress: Callable[[Progress], None] | None = None,
    stop: Callable[[], bool] | None = None,
    threads: int = 1,
    process_group: ProcessGroup | None = None,
) -> dict[str, str]:
    """Train cells in packs; see `klab.harness.training.runner.run_cells`."""
    from klab.harness.training import runner

    return runner.run_cells(
        run_path, cell_ids, progress=progress, stop=stop, threads=threads, process_group=process_group
    )
