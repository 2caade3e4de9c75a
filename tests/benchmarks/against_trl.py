"""klab beside TRL 1.16, the same checkpoint, task and objective: `make bench`.

    python -m tests.benchmarks.against_trl                    # everything, about eleven minutes on two quiet cores
    python -m tests.benchmarks.against_trl --cells 8 --updates 20 --rounds 1      # a glance, about two minutes
    python -m tests.benchmarks.against_trl --setting 0.5b     # one GPU, the shape of Qwen2.5-0.5B: see `one_device`
    python -m tests.benchmarks.against_trl --setting toy      # the same on the CPU in a minute, to see that it works

The `tiny` setting, the default, runs on the CPU. Measured are (1) one update, phase by phase: TRL, TRL with klab's
objective (`training.engine: trl`), klab with one cell and klab with a pack (of sixteen; of two where completions take
32 tokens), in processes of their own, interleaved on the same core; (2) a grid as users run it: `klab launch --on
local` from start to end, beside TRL in a process per cell, two at a time, on some of the cells and extrapolated; (3)
the reward curves of both; (4) how far each phase is from the time that its matrix products need at this core's
measured peak.

Neither evaluates: klab as little as it can (two evaluations of one prompt), TRL not at all. Start-up and warm-up of the
checkpoint are outside of (1); the warm-up is outside of (2), the start of every process is inside.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil

from klab.harness.store import Run
from klab.tasks.addition import Addition
from tests.benchmarks import one_device
from tests.benchmarks.clock import per_update
from tests.benchmarks.limit import peak_gflops, plain_flops, stream_gigabytes, weight_bytes
from tests.benchmarks.model import endless_checkpoint, starting_checkpoint
from tests.benchmarks.processes import NO_GPU, ROOT, Failure, console, run, say
from tests.benchmarks.setting import DIGITS, ROLLOUTS_DROPPED, UPDATES_PER_ROLLOUT, grid_text

SHAPES = ((16, 8), (4, 8), (16, 32), (4, 32))
"""Prompts of a rollout and budget of new tokens. Up to 8 tokens completions end by themselves, 32 are all used up."""

PACK, LONG_PACK = 16, 2
TRL_AT_ONCE = 2


class Bench:
    """The interpreters, checkpoints and scratch folder of one run."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given = given
        self.work = Path(given.work).expanduser()
        self.start = starting_checkpoint(
            self.work, lambda update, most, accuracy: say(f"warm-up: {update} updates, accuracy {accuracy:.2f}")
        )
        self.endless = endless_checkpoint(self.start)
        self.scratch = Path(tempfile.mkdtemp(prefix="klab-bench-"))

    def cell(self, side: str, prompts: int, budget: int, updates: int, *more: str, core: int | None = None) -> Any:
        """What `klab_cell`, `trl_cell` or `trl_engine_cell` writes down."""
        out = self.scratch / f"{side}-{time.monotonic_ns()}.json"
        python = self.given.trl if side == "trl" else sys.executable
        start = self.start if budget == 8 else self.endless
        shape = ("--prompts", str(prompts), "--budget", str(budget), "--updates", str(updates))
        command = [python, f"tests/benchmarks/{side}_cell.py", str(start), *shape, *more, "--out", str(out)]
        try:
            run([command], NO_GPU, core)
        except Failure as failure:
            sys.exit(str(failure))
        return json.loads(out.read_text())


def phases(bench: Bench) -> dict[str, dict[str, Any]]:
    """(1): by shape and side, medians over interleaved rounds."""
    found: dict[str, dict[str, Any]] = {}
    for prompts, budget in SHAPES:
        pack = PACK if budget == 8 else LONG_PACK
        sides = {"trl": ("trl", ()), "engine": ("trl_engine", ())}
        sides |= {"alone": ("klab", ()), "pack": ("klab", ("--cells", str(pack)))}
        updates = bench.given.timed if budget == 8 else max(6, bench.given.timed // 2)
        rounds: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
        first: dict[str, list[float]] = {side: [] for side in sides}
        peak: dict[str, list[float]] = {side: [] for side in sides}
        for number in range(bench.given.rounds):
            for side, (kind, more) in sides.items():
                result = bench.cell(kind, prompts, budget, updates, *more, core=bench.given.core)
                rounds[side].append(per_update(result["updates"], UPDATES_PER_ROLLOUT, ROLLOUTS_DROPPED))
                first[side].append(result["first_update"])
                peak[side].append(result["peak_mb"])
            say(
                f"one update, {prompts} prompts, {budget} tokens, round {number + 1} of {bench.given.rounds}: "
                + ", ".join(f"{side} {rows[-1]['cpu']:.0f} ms" for side, rows in rounds.items())
            )
        found[f"{prompts}x{budget}"] = {
            "prompts": prompts,
            "budget": budget,
            "packed": pack,
            **bench.cell("klab", prompts, budget, 10, "--count"),
            **{
                side: {
                    **{n: statistics.median(row.get(n, 0.0) for row in rows) for n in set().union(*rows)},
                    "first_update": statistics.median(first[side]),
                    "peak_mb": statistics.median(peak[side]),
                }
                for side, rows in rounds.items()
            },
        }
    return found


class MemoryWatch(threading.Thread):
    """The most memory that a process and its descendants had together; pages that they share count once."""

    def __init__(self, process: psutil.Process) -> None:
        super().__init__(daemon=True)
        self.process, self.peak_mb, self.over = process, 0.0, False

    def run(self) -> None:
        while not self.over:
            total = 0.0
            try:
                for each in [self.process, *self.process.children(recursive=True)]:
                    total += each.memory_full_info().pss / 2**20
            except psutil.Error:
                pass
            self.peak_mb = max(self.peak_mb, total)
            time.sleep(0.5)


def klab_grid(bench: Bench, prompts: int) -> dict[str, Any]:
    """`klab launch --on local`, from the command to its end."""
    given = bench.given
    text = grid_text(bench.start, prompts, 8, given.updates, given.cells, f"bench-{prompts}")
    file, runs = bench.scratch / f"{prompts}.yaml", bench.scratch / "runs"
    file.write_text(text)
    command = [str(Path(sys.executable).with_name("klab")), "launch", str(file), "--on", "local", "--runs", str(runs)]
    began = time.time()
    settings = {**os.environ, **NO_GPU}
    process = subprocess.Popen(
        command, cwd=ROOT, env=settings, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    watch = MemoryWatch(psutil.Process(process.pid))
    watch.start()
    _, errors = process.communicate()
    wall = time.time() - began
    watch.over = True
    run = Run.open(runs / f"bench-{prompts}")
    curves = [[row["reward_mean"] for row in run.cell(identity).metrics()] for identity in run.cells]
    if process.returncode or not all(len(curve) == given.updates for curve in curves):
        sys.exit(f"klab launch ended with {process.returncode}\n{errors[-4000:]}")
    return {"wall": wall, "peak_mb": watch.peak_mb, "cells": given.cells, "curves": curves}


def trl_grid(bench: Bench, prompts: int) -> dict[str, Any]:
    """A process per cell, two at a time; `wall` is for all of the grid's cells, from the time of those measured."""
    given = bench.given
    count = min(given.cells, given.trl_cells)

    def one(seed: int) -> Any:
        return bench.cell("trl", prompts, 8, given.updates, "--seed", str(seed))

    began = time.time()
    with ThreadPoolExecutor(TRL_AT_ONCE) as pool:
        results = list(pool.map(one, range(count)))
    wall = time.time() - began
    return {
        "wall": wall * given.cells / count,
        "measured_wall": wall,
        "measured_cells": count,
        "cells": given.cells,
        "peak_mb": TRL_AT_ONCE * statistics.mean(result["peak_mb"] for result in results),
        "curves": [[r for r in result["rewards"] for _ in range(UPDATES_PER_ROLLOUT)] for result in results],
    }


def floors(found: dict[str, dict[str, Any]], peak: float, stream: float) -> None:
    """Adds to each shape the milliseconds that products need at the measured peak, by the plain formula and for the
    rows that klab computes, and those that weights need at the measured rate of memory."""
    prompt = len(Addition(DIGITS).split("train")[0].prompt)
    for shape in found.values():
        tokens = 4.5 if shape["budget"] == 8 else shape["budget"]
        plain = plain_flops(shape["prompts"], prompt, tokens)
        shape["floor_plain"] = {phase: flops / peak / 1e6 for phase, flops in plain.items()}
        shape["floor_klab"] = {phase: flops / peak / 1e6 for phase, flops in shape["flops"].items()}
        moved = weight_bytes(shape["passes"], shape["packed"])
        shape["floor_memory"] = {phase: count / stream / 1e6 for phase, count in moved.items()}


def compare(given: argparse.Namespace) -> dict[str, Any]:
    """The tiny setting on the CPU: measure, print, and write `against_trl.{json,md,png}`."""
    from tests.benchmarks.against_trl_report import curves_figure, tables

    if not Path(given.trl).exists():
        sys.exit(f"{given.trl} does not exist; `make bench` creates it")
    bench = Bench(given)
    try:
        peak, stream = peak_gflops(), stream_gigabytes()
        say(f"peak of this core: {peak:.0f} GFLOP/s in float32, {stream:.1f} GB/s from memory")
        found: dict[str, Any] = {"peak_gflops": peak, "stream_gb": stream, "shapes": phases(bench), "grids": {}}
        floors(found["shapes"], peak, stream)
        for prompts in (16, 4):
            ours = klab_grid(bench, prompts)
            say(f"{given.cells} cells, {prompts} prompts: klab launch {ours['wall']:.0f} s")
            theirs = trl_grid(bench, prompts)
            say(f"the same by TRL: {theirs['measured_cells']} cells in {theirs['measured_wall']:.0f} s")
            found["grids"][str(prompts)] = {"klab": ours, "trl": theirs}
        given.out.mkdir(parents=True, exist_ok=True)
        curves_figure(found["grids"], given.out / "against_trl.png")
        text = tables(found)
        (given.out / "against_trl.md").write_text(text)
        (given.out / "against_trl.json").write_text(json.dumps(found, indent=1))
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    finally:
        shutil.rmtree(bench.scratch, ignore_errors=True)
    return found


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure and print; returns what was measured."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.against_trl",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--setting", choices=("tiny", *one_device.SHAPE_OF), default="tiny", help="what is trained")
    parser.add_argument("--timed", type=int, help="updates of a process in which one update is measured (tiny: 16)")
    parser.add_argument("--rounds", type=int, help="interleaved rounds of measuring one update (tiny: 2)")
    parser.add_argument("--trl", default=str(ROOT / ".venv-parity/bin/python"), help="the interpreter that has TRL")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="tables and numbers go here")
    tiny = parser.add_argument_group("tiny")
    tiny.add_argument("--cells", type=int, default=64, help="cells of the grid")
    tiny.add_argument("--trl-cells", type=int, default=6, help="cells of the grid that TRL really trains")
    tiny.add_argument("--updates", type=int, default=100, help="updates of a cell of the grid")
    tiny.add_argument("--core", type=int, default=0, help="where one update is measured")
    tiny.add_argument("--work", default="~/.cache/klab/bench", help="keeps the starting checkpoint")
    device = parser.add_argument_group("0.5b and toy")
    device.add_argument("--at-once", type=int, help="processes at once, and cells of the pack (0.5b: 4, toy: 2)")
    device.add_argument("--only", nargs="+", choices=one_device.WAYS, help="some rows of the table")
    given = parser.parse_args(arguments)
    fewest = UPDATES_PER_ROLLOUT * (ROLLOUTS_DROPPED + 1)
    if given.timed is not None and given.timed < fewest:
        parser.error(
            f"--timed: {fewest} updates at least, of which the first {fewest - UPDATES_PER_ROLLOUT} do not count"
        )
    if given.setting != "tiny":
        return one_device.compare(given)
    given.timed, given.rounds = given.timed or 16, given.rounds or 2
    return compare(given)


if __name__ == "__main__":
    main()
