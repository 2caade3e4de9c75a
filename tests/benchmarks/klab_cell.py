"""Cells trained by klab in one process, timed update by update: one pack, as a worker of `klab launch` trains it.

.venv/bin/python tests/benchmarks/klab_cell.py START --prompts 16 --budget 8 --updates 100 --cells 8 --out FILE
"""

from __future__ import annotations

import time

STARTED = time.time()

import argparse  # noqa: E402
import json  # noqa: E402
import resource  # noqa: E402
import tempfile  # noqa: E402
from collections.abc import Iterator  # noqa: E402
from contextlib import contextmanager  # noqa: E402
from itertools import pairwise  # noqa: E402
from pathlib import Path  # noqa: E402

import torch  # noqa: E402
from setting import grid_text  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from grid import parse_grid  # noqa: E402
from harness.store import Run  # noqa: E402
from harness.training import pack, run_cells  # noqa: E402
from harness.training.life import Progress  # noqa: E402
from harness.training.member import Member  # noqa: E402
from harness.training.stopwatch import PHASES, Stopwatch  # noqa: E402
from tasks import load_task  # noqa: E402


class ProcessorWatch(Stopwatch):
    """Counts processor seconds, which a busy neighbour does not lengthen."""

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        started = time.process_time()
        try:
            yield
        finally:
            self._spent[phase] += time.process_time() - started


def trained(text: str, cells: int) -> dict[str, object]:
    """Every update's seconds per cell, and processor seconds, also by phase."""
    pack.Stopwatch = ProcessorWatch  # type: ignore[misc]
    marks: list[tuple[int, float, float]] = []

    def seen(progress: Progress) -> None:
        if not marks or marks[-1][0] != progress.update:
            marks.append((progress.update, time.time(), time.process_time()))

    with tempfile.TemporaryDirectory() as scratch:
        grid = parse_grid(text, "bench")
        run = Run.create(Path(scratch) / "run", grid)
        run_cells(run.path, run.cells, progress=seen)
        rows = [run.cell(identity).metrics() for identity in run.cells]
    updates = [
        {
            **{phase: rows[0][number][f"seconds_{phase}"] for phase in PHASES},
            "wall": (after[1] - before[1]) / cells,
            "cpu": (after[2] - before[2]) / cells,
        }
        for number, (before, after) in enumerate(pairwise(marks))
    ]
    return {"updates": updates, "first_update": marks[1][1] - STARTED}


class CountingWatch(Stopwatch):
    """Counts floating-point operations of matrix products in place of seconds."""

    def __call__(self, phase: str):  # type: ignore[no-untyped-def]
        return _Counted(self._spent, phase)


class _Counted:
    def __init__(self, spent: dict[str, float], phase: str) -> None:
        self.spent, self.phase, self.mode = spent, phase, FlopCounterMode(display=False)

    def __enter__(self) -> None:
        self.mode.__enter__()

    def __exit__(self, *problem: object) -> None:
        self.mode.__exit__(*problem)
        self.spent[self.phase] += self.mode.get_total_flops()


def counted(text: str, updates: int) -> dict[str, float]:
    """FLOPs per update and phase that the matrix products of one cell really take, shared prompts and rows merged."""
    cell = parse_grid(text, "bench").cells[0]
    alone = pack.Pack([Member(cell, load_task(cell.task), Path(cell.policy.model))])
    alone._watch = CountingWatch()
    rows = [alone.advance()[0] for _ in range(updates)]
    return {phase: sum(row[f"seconds_{phase}"] for row in rows) / updates for phase in PHASES}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("start", type=Path)
    parser.add_argument("--prompts", type=int, required=True)
    parser.add_argument("--budget", type=int, required=True)
    parser.add_argument("--updates", type=int, required=True)
    parser.add_argument("--cells", type=int, default=1)
    parser.add_argument("--count", action="store_true", help="count operations, take no times")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    text = grid_text(given.start, given.prompts, given.budget, given.updates, given.cells)
    if given.count:
        given.out.write_text(json.dumps(counted(text, given.updates)))
        return
    found = trained(text, given.cells)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    found["peak_mb"] = usage.ru_maxrss / 1024
    found["process_cpu"] = usage.ru_utime + usage.ru_stime
    given.out.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
