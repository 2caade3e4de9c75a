"""How the command line grows: `python -m tests.benchmarks.scale [--only PART ...] [--small]`.

Writes grid files and run folders through klab's own parsers and store (numbers are synthetic, files are real), and runs
the real commands on them, each in a process of its own on one thread. Every part is measured at a tenth of its size and
at its full size; the growth exponent is the slope between the two, 1 for linear. Seconds are of the wall clock beside
those of the processor: on a machine with other work, read the latter.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from klab.grid import parse_grid
from klab.harness.store import Run
from tests.reports.synthetic import large_grid, write_large_run

_MEASURED = """
import resource, sys, time
start = time.perf_counter()
{work}
wall = time.perf_counter() - start
own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
used = own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime
print("\\n", wall, used, own.ru_maxrss / 1024)
"""
_COMMAND = "from klab.harness.cli.main import main\nmain(sys.argv[1:])"
_FRAMES = (
    "from klab.harness.store import Run\nfrom klab.reports.frame import read_frames\nread_frames(Run.open(sys.argv[1]))"
)
_BOOKKEEPING = """
from pathlib import Path
from klab.grid import load_grid
from klab.harness.dispatch.launch import launch
from klab.harness.store import Run
class Taker:
    name = "local"
    def submit(self, run, packs, resources):
        from klab.harness.dispatch.local.backend import LocalExecutor
        import klab.harness.dispatch.local.backend as local
        local.start_controller = lambda run, ready: None
        LocalExecutor(max_parallel=2).submit(run, packs, resources)
    def states(self, run):
        return {}
    def cancel(self, run, cells):
        pass
study = load_grid(sys.argv[1])
run = Run.create(sys.argv[2], study)
assert sum(len(pack.cells) for pack in launch(run, Taker(), workers=2).packs) == len(study.cells)
"""

_AXES = """
  estimator: [k1, k2, k3, abs, full]
  placement: [loss, reward, reward_to_go, advantage, loss_corrected]
  ratio: [token, sequence_mean, future_mean, prefix_product]
  weight: [ppo_clip, ratio, truncate, power, mask]
  advantage: [group_norm, raw, group_center, leave_one_out, batch_norm]
"""
"""2,500 combinations."""


@dataclass(frozen=True, slots=True)
class Spent:
    """Seconds of the wall clock and of all processors, and the peak of memory in MB."""

    wall: float
    processor: float
    peak: float


@dataclass(frozen=True, slots=True)
class Part:
    """One promise: at most so many seconds (and MB) for so many cells. `measure` takes a folder and how many cells."""

    name: str
    cells: int
    seconds: float
    measure: Callable[[Path, int], Spent]
    memory: float | None = None
    whole: int = 1
    """Cells come in multiples of this."""


def spent(work: str, *arguments: object, cache: Path) -> Spent:
    """What a process of its own spends on the work."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "KLAB_CACHE": str(cache)}
    command = [sys.executable, "-c", _MEASURED.format(work=work), *map(str, arguments)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return Spent(*map(float, done.stdout.rstrip().splitlines()[-1].split()))


def product(folder: Path, cells: int, seeds: int) -> Path:
    """A grid file with so many cells: all combinations of five axes, some learning rates, some seeds."""
    rates = [round(1e-4 * 1.02**number, 9) for number in range(cells // (2_500 * seeds))]
    file = folder / f"product-{cells}.yaml"
    head = f"name: product-{cells}\ntask: {{name: addition, digits: 2}}\ntraining: {{updates_per_rollout: 4}}\n"
    file.write_text(f"{head}axes:{_AXES}  training.lr: {rates}\nseeds: {seeds}\n")
    return file


def plan(folder: Path, cells: int) -> Spent:
    return spent(_COMMAND, "plan", product(folder, cells, 5 if cells > 10_000 else 1), cache=folder / "cache")


def different(folder: Path, cells: int) -> Path:
    """A grid file of so many different objectives, none of which was measured before."""
    values = [round(0.01 + 0.4 * number / cells, 6) for number in range(cells // 100)]
    file = folder / f"different-{cells}.yaml"
    head = f"name: different-{cells}\ntask: {{name: addition, digits: 2}}\ntraining: {{updates_per_rollout: 4}}\n"
    axes = "  estimator: [k1, k2, k3, abs, full]\n  advantage: [group_norm, raw, group_center, batch_norm]\n"
    axes += "  weight: [ratio, truncate, power, mask, one]\n"
    file.write_text(f"{head}axes:\n{axes}  beta: {values}\n")
    return file


def merging(folder: Path, cells: int) -> Spent:
    return spent(_COMMAND, "plan", different(folder, cells), "--measure", cache=folder / f"cache-{cells}")


def merging_again(folder: Path, cells: int) -> Spent:
    file = different(folder, cells)
    if not (folder / f"cache-{cells}").exists():
        merging(folder, cells)
    return spent(_COMMAND, "plan", file, "--measure", cache=folder / f"cache-{cells}")


def launching(folder: Path, cells: int) -> Spent:
    file = product(folder, max(cells, 2_500), 1) if cells > 1_000 else small_product(folder)
    return spent(_BOOKKEEPING, file, folder / f"launched-{cells}", cache=folder / "cache")


def small_product(folder: Path) -> Path:
    """A grid file of 1,000 cells."""
    file = folder / "product-1000.yaml"
    axes = "\n".join(line for line in _AXES.splitlines() if "advantage:" not in line)
    file.write_text(
        f"name: product-1000\ntask: addition\ntraining: {{updates_per_rollout: 4}}\naxes:{axes}\nseeds: 2\n"
    )
    return file


def finished(folder: Path, cells: int) -> Path:
    """A run of so many thousand cells of 100 updates, most of them finished; written once, beyond 1,000 as copies."""
    path = folder / f"finished-{cells}"
    if path.exists():
        return path
    if cells <= 1_000:
        write_large_run(path, cells // 8, 8)
        return path
    first = finished(folder, 1_000)
    sources = [source for source in sorted((first / "cells").iterdir())]
    run = Run.create(path, parse_grid(large_grid(cells // 8, 8, 100), path / "grid.yaml"))
    for number, identity in enumerate(run.cells):
        target = run.cell(identity).path
        target.mkdir(parents=True)
        for file in sources[number % len(sources)].iterdir():
            shutil.copyfile(file, target / file.name)
    return path


def status_cold(folder: Path, cells: int) -> Spent:
    path = finished(folder, cells)
    (path / "index.json").unlink(missing_ok=True)
    return spent(_COMMAND, "status", path, cache=folder / "cache")


def status_warm(folder: Path, cells: int) -> Spent:
    path = finished(folder, cells)
    spent(_COMMAND, "status", path, cache=folder / "cache")
    return spent(_COMMAND, "status", path, cache=folder / "cache")


def frames(folder: Path, cells: int) -> Spent:
    return spent(_FRAMES, finished(folder, cells), cache=folder / "cache")


def report(folder: Path, cells: int) -> Spent:
    path = folder / f"reported-{cells}"
    if not path.exists():
        write_large_run(path, cells // 5, 5)
    return spent(_COMMAND, "report", path, "--no-gradients", "--no-figures", cache=folder / "cache")


PARTS = (
    Part("plan", 100_000, 10.0, plan, memory=1_000.0),
    Part("merging, nothing measured before", 10_000, 60.0, merging),
    Part("merging, everything measured", 10_000, 60.0, merging_again),
    Part("launch, bookkeeping", 10_000, 30.0, launching),
    Part("status, cold", 10_000, 5.0, status_cold, whole=1_000),
    Part("status, warm", 10_000, 1.0, status_warm, whole=1_000),
    Part("report frames, 100 updates", 10_000, 60.0, frames, whole=1_000),
    Part("report, page and tables", 5_000, 60.0, report, memory=2_000.0, whole=625),
)


def main(chosen: list[str], scale: float) -> None:
    """Print one line per part, as soon as it is measured."""
    began = time.perf_counter()
    columns = ("part", "cells", "target s", "wall s", "÷ target", "processor s", "peak MB", "exponent")
    line = "{:<34} {:>8} {:>9} {:>8} {:>9} {:>12} {:>13} {:>9}"
    print(line.format(*columns))
    with tempfile.TemporaryDirectory(prefix="klab-bench-") as scratch:
        folder = Path(scratch)
        for part in PARTS:
            if chosen and not any(word in part.name for word in chosen):
                continue
            cells = max(round(part.cells * scale / part.whole), 2) * part.whole
            few = max(cells // 10, part.whole)
            little, large = (part.measure(folder, number) for number in (few, cells))
            exponent = math.log(large.processor / little.processor) / math.log(cells / few)
            ratio = large.wall / part.seconds
            peak = f"{large.peak:.0f}" + (f" of {part.memory:.0f}" if part.memory else "")
            numbers = (f"{large.wall:.1f}", f"{ratio:.2f}", f"{large.processor:.1f}", peak, f"{exponent:.2f}")
            print(line.format(part.name, cells, f"{part.seconds:g}", *numbers), flush=True)
    print(f"measured in {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.scale")
    parser.add_argument("--only", nargs="*", default=[], help="parts, by a word of their names")
    parser.add_argument("--scale", type=float, default=1.0, help="a share of the cells")
    options = parser.parse_args()
    main(options.only, options.scale)
