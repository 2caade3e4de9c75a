"""Real processes that train cells together with the one that runs a test, one run after the other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from klab.harness.store import Run
from klab.harness.training import run_cells
from klab.harness.training.distributed.process_group import ProcessGroup
from klab.harness.training.distributed.rendezvous import rendezvous
from klab.harness.training.distributed.worker import release_workers
from tests.support.gradients_of_cells import gradients

HERE = Path(__file__).parent


class WorkerPool:
    """The others of `size` processes; calls are `run_cells` in this process and some of them."""

    def __init__(self, folder: Path, size: int) -> None:
        self._folder, self._numbers = folder, count()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path.cwd())}
        self.processes = [
            subprocess.Popen([sys.executable, HERE / "worker_process.py", str(rank), str(folder)], env=environment)
            for rank in range(1, size)
        ]

    def __call__(self, run: Run, size: int, cells: Sequence[str] = (), **options: Any) -> dict[str, str]:
        with self._meet(run, size) as process_group:
            states = run_cells(run.path, cells or run.cells, process_group=process_group, **options)
            release_workers(process_group)
        return states

    def gradients(self, run: Run, size: int) -> dict[str, dict[str, Tensor]]:
        """The first gradient of every cell, see `gradients_of_cells.py`."""
        with self._meet(run, size, gradients=True) as process_group:
            return gradients(run, process_group)

    @contextmanager
    def _meet(self, run: Run, size: int, gradients: bool = False) -> Iterator[ProcessGroup]:
        what = {"run": str(run.path), "size": size, "path": [str(HERE)], "gradients": gradients}
        process_group = rendezvous(0, size, self._announce(what), device=torch.device("cpu"))
        try:
            yield process_group
        finally:
            process_group.close()

    def end(self) -> list[int]:
        """Let the processes end; their exit codes. Those that a failed test left waiting are killed."""
        self._announce({})
        for process in self.processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(60)
            process.kill()
        return [process.wait() for process in self.processes]

    def _announce(self, what: dict[str, Any]) -> Path:
        number = next(self._numbers)
        (self._folder / "partial").write_text(json.dumps(what))
        (self._folder / "partial").rename(self._folder / f"{number}.json")
        return self._folder / f"{number}.meeting"


@contextmanager
def worker_pool(folder: Path, size: int) -> Iterator[WorkerPool]:
    """`size` processes with this one, all of which end well with the block."""
    pool = WorkerPool(folder, size)
    yield pool
    assert pool.end() == [0] * (size - 1)
