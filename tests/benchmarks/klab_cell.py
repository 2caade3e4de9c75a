"""Cells trained by klab in one process, timed update by update: one pack, as a worker of `klab launch` trains it.

.venv/bin/python tests/benchmarks/klab_cell.py START --prompts 16 --budget 8 --updates 100 --cells 8 --out FILE
"""

from __future__ import annotations

import time

STARTED = time.time()

import argparse  # noqa: E402
import json  # noqa: E402
import tempfile  # noqa: E402
from collections.abc import Callable, Iterator  # noqa: E402
from contextlib import contextmanager  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import torch  # noqa: E402
from clock import CLOCKS, Clock, device_name, meet, usage, wall  # noqa: E402
from setting import ROLLOUTS_DROPPED, UPDATES_PER_ROLLOUT, add_arguments, told  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from klab.grid import parse_grid  # noqa: E402
from klab.harness.policy.stacked.native.engine import NativeLayers  # noqa: E402
from klab.harness.policy.stacked.native.token_trees import TokenTrees  # noqa: E402
from klab.harness.store import CellFolder, Run  # noqa: E402
from klab.harness.training import pack, run_cells  # noqa: E402
from klab.harness.training.packed_cell import PackedCell  # noqa: E402
from klab.harness.training.runner import Progress  # noqa: E402
from klab.harness.training.runtime.timer import PHASES, PhaseTimer  # noqa: E402
from klab.tasks import load_task  # noqa: E402


class ClockedWatch(PhaseTimer):
    """A stopwatch that reads another clock."""

    clock: Clock = time.process_time

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        clock = type(self).clock
        started = clock()
        try:
            yield
        finally:
            self._spent[phase] += clock() - started


def trained(
    text: str, cells: int, clock: str = "processor", gather: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Every update's seconds per cell, processor seconds, and seconds by phase on the chosen clock.

    Args:
        gather: called once the updates are over that no median counts; its time is nobody's.

    Raises:
        RuntimeError: a cell has not finished, or the cells did not train together to the end.
    """
    ClockedWatch.clock = CLOCKS[clock]
    pack.PhaseTimer = ClockedWatch  # type: ignore[misc]
    pack.Pack.halve = lambda _: False  # type: ignore[method-assign]  # equal micro-batches on both sides, or none
    spans: list[tuple[float, float]] = []
    seen_updates: list[int] = []
    began = (0.0, 0.0)
    first = 0.0

    def seen(progress: Progress) -> None:
        nonlocal began, first
        number = progress.update
        if seen_updates and seen_updates[-1] == number:
            return
        seen_updates.append(number)
        now = (wall(), time.process_time())
        if number > 0:
            spans.append((now[0] - began[0], now[1] - began[1]))
        if number == 1:
            first = time.time() - STARTED
        if number == UPDATES_PER_ROLLOUT * ROLLOUTS_DROPPED:
            gather()
            now = (wall(), time.process_time())
        began = now

    with tempfile.TemporaryDirectory() as scratch:
        grid = parse_grid(text, "bench")
        run = Run.create(Path(scratch) / "run", grid)
        states = run_cells(run.path, run.cells, progress=seen)
        folders = [run.cell(identity) for identity in run.cells]
        if set(states.values()) != {"finished"}:
            raise RuntimeError(f"cells have not finished: {states}")
        if seen_updates != list(range(len(spans) + 1)):
            raise RuntimeError("out of memory: the pack was taken apart")
        rows = [folder.metrics() for folder in folders]
        adapters = _adapter_numbers(folders[0])
    updates = [
        {
            **{phase: rows[0][number][f"seconds_{phase}"] for phase in PHASES},
            "wall": seconds / cells,
            "cpu": processor / cells,
        }
        for number, (seconds, processor) in enumerate(spans)
    ]
    counted = [row for each in rows for row in each[UPDATES_PER_ROLLOUT * ROLLOUTS_DROPPED :]]
    return {
        "updates": updates,
        "first_update": first,
        "trajectories": [round(row["tokens"] / row["length_mean"]) for row in rows[0]],
        "tokens": sum(row["tokens"] for row in counted) / max(1, len(counted)),
        "adapter_numbers": adapters,
    }


def _adapter_numbers(folder: CellFolder) -> int:
    """How many numbers a cell's adapters have; 0 where it has none."""
    from safetensors.torch import load_file

    file = folder.policy / "adapter_model.safetensors"
    return sum(value.numel() for value in load_file(file).values()) if file.exists() else 0


class NativeFlops:
    """Counts the products of the compiled layers, which torch's counter does not see."""

    total = 0.0

    @classmethod
    def watch(cls) -> None:
        """Count in this process from now on."""
        forward, backward = NativeLayers._forward, NativeLayers.backward

        def counted_forward(layers: NativeLayers, addresses: Any, trees: TokenTrees, memory: Any) -> None:
            cls.total += cls.of(layers, trees)
            forward(layers, addresses, trees, memory)

        def counted_backward(layers: NativeLayers, addresses: Any, trees: TokenTrees, *more: Any) -> None:
            cls.total += 2 * cls.of(layers, trees)
            backward(layers, addresses, trees, *more)

        NativeLayers._forward, NativeLayers.backward = counted_forward, counted_backward  # type: ignore[method-assign]

    @staticmethod
    def of(layers: NativeLayers, trees: TokenTrees) -> float:
        """Of a pass: weights of every token (after the last layer's attention, of the outputs), and its attention."""
        a, tokens, outputs = layers.architecture, len(trees.tokens), len(trees.outputs)
        wide = a.num_heads * a.head_dim
        keys, rest = a.hidden_size * layers.width, wide * a.hidden_size + 3 * a.hidden_size * a.intermediate_size
        weights = 2 * (a.num_layers * tokens * keys + ((a.num_layers - 1) * tokens + outputs) * rest)
        attention = 4 * wide * ((a.num_layers - 1) * trees.attended + trees.attended_by_outputs)
        return float(weights + attention)


class CountingWatch(PhaseTimer):
    """Counts floating-point operations of matrix products in place of seconds."""

    def __call__(self, phase: str):  # type: ignore[no-untyped-def]
        return _Counted(self._spent, phase)


class _Counted:
    def __init__(self, spent: dict[str, float], phase: str) -> None:
        self.spent, self.phase, self.mode = spent, phase, FlopCounterMode(display=False)

    def __enter__(self) -> None:
        self.before = NativeFlops.total
        self.mode.__enter__()

    def __exit__(self, *problem: object) -> None:
        self.mode.__exit__(*problem)
        self.spent[self.phase] += self.mode.get_total_flops() + NativeFlops.total - self.before


def counted(text: str, updates: int) -> dict[str, Any]:
    """FLOPs per update and phase that the matrix products of one cell really take, shared prompts and rows merged; and
    the policy's passes for one rollout."""
    NativeFlops.watch()
    cell = parse_grid(text, "bench").cells[0]
    alone = pack.Pack([PackedCell(cell, load_task(cell.task), Path(cell.policy.model))])
    alone._timer = CountingWatch()
    rows, passes = [], []
    for _ in range(updates):
        alone.collect_due_rollouts()
        passes.append(alone.pending[0][0].rollout.tokens.shape[1])
        rows += alone.advance()
    flops = {phase: sum(row[f"seconds_{phase}"] for row in rows) / updates for phase in PHASES}
    return {"flops": flops, "passes": sum(passes) / updates}


def main() -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    parser.add_argument("--cells", type=int, default=1)
    parser.add_argument("--count", action="store_true", help="count operations, take no times")
    given = parser.parse_args()
    torch.set_num_threads(1)
    setting = told(given)
    text = setting.grid_text(given.start, given.updates, given.cells)
    if given.count:
        given.out.write_text(json.dumps(counted(text, given.updates)))
        return
    found = trained(text, given.cells, setting.clock, lambda: meet(given.meet, given.processes))
    given.out.write_text(json.dumps({**found, **usage(), "device": device_name()}))


if __name__ == "__main__":
    main()
