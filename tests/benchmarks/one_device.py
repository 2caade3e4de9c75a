"""klab beside TRL on one device: a process, K processes at once, and a pack of K cells over one frozen base.

Both train adapters of rank 16 over the same random bfloat16 weights. klab decodes with keys and values in fixed memory,
on a GPU by recorded CUDA graphs. Phases are timed on the wall clock with the device synchronised; processes that train
at once wait for each other after their first rollouts, which are not counted.
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
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from klab.harness.policy.stacked.block_decoding import VARIABLE
from tests.benchmarks.clock import per_update
from tests.benchmarks.limit import Sizes, peak_gflops, plain_flops
from tests.benchmarks.processes import NO_GPU, Failure, console, run, say
from tests.benchmarks.setting import ROLLOUTS_DROPPED, UPDATES_PER_ROLLOUT, Setting
from tests.benchmarks.shapes import SHAPES, Shape, write_start

SHAPE_OF = {"0.5b": "qwen2.5-0.5b", "10m": "qwen2-10m", "10m_lora": "qwen2-10m, adapters", "toy": "toy"}
DEFAULTS: dict[str, dict[str, Any]] = {
    "0.5b": {"timed": 8, "rounds": 2},
    "10m": {"timed": 6, "rounds": 1, "only": ("trl", "klab", "klab_pack")},
    "10m_lora": {"timed": 6, "rounds": 1, "only": ("trl", "klab", "klab_pack")},
    "toy": {"timed": 4, "rounds": 1},
}
"""A figure in processor time is that of one process at a time."""


@dataclass(frozen=True)
class Way:
    """A way of training cells: `processes` of them at once, each with a pack of `cells`."""

    name: str
    side: str
    processes: int = 1
    cells: int = 1


def ways(K: int, only: Sequence[str] | None = None, adapters: bool = True) -> dict[str, Way]:
    """All of them, or some, in their order; cells with `adapters` share the weights under these."""
    every = {
        "trl": Way("TRL, one process", "trl"),
        "trl_at_once": Way(f"TRL, {K} processes at once", "trl", processes=K),
        "trl_klab": Way("TRL with klab's objective, one process", "trl_engine"),
        "klab": Way("klab, one cell", "klab"),
        "klab_at_once": Way(f"klab, {K} processes of one cell at once", "klab", processes=K),
        "klab_pack": Way(f"klab, a pack of {K} cells{' over one base' if adapters else ''}", "klab", cells=K),
    }
    return {key: way for key, way in every.items() if only is None or key in only}


WAYS = tuple(ways(1))


def told(shape: Shape) -> Setting:
    """What both trainers are told of a shape."""
    return Setting(
        task={"name": "shapes:Strings", "length": shape.prompt_tokens},
        prompts=shape.prompts,
        new_tokens=shape.new_tokens,
        group_size=shape.group_size,
        rows=shape.micro_batch,
        dtype=shape.dtype,
        lora_rank=shape.lora_rank,
        clock=shape.clock,
    )


def environment(name: str) -> dict[str, str]:
    """One GPU, the first that this process may see; for `toy` none, decoded in the same way; for `10m` none."""
    if name == "toy":
        return {**NO_GPU, VARIABLE: "static"}
    if not needs_gpu(name):
        return dict(NO_GPU)
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    return {"CUDA_VISIBLE_DEVICES": first, VARIABLE: os.environ.get(VARIABLE, "static")}


def needs_gpu(name: str) -> bool:
    """Whether a setting is one for a GPU."""
    return name == "0.5b"


def obstacle(name: str, trl: str | None) -> str | None:
    """Why this setting cannot be measured here, in one sentence; None where it can.

    Args:
        trl: TRL's interpreter; None where only klab is measured.
    """
    gpu = needs_gpu(name)
    if gpu and not torch.cuda.is_available():
        return f"the {name} setting needs a CUDA device, and torch sees none; `--setting toy` runs on the CPU"
    if trl is None:
        return None
    if not Path(trl).exists():
        return f"{trl} does not exist: `make bench` creates it, `--only klab klab_at_once klab_pack` does without"
    asked = "import torch, trl, peft; print(trl.__version__, torch.cuda.is_available())"
    done = subprocess.run([trl, "-c", asked], capture_output=True, text=True, env={**os.environ, **environment(name)})
    if done.returncode:
        return f"{trl} lacks something of what TRL needs for adapters: {done.stderr.strip().splitlines()[-1]}"
    if gpu and not done.stdout.strip().endswith("True"):
        return f"the torch of {trl} sees no CUDA device, klab's does: install a build of torch for CUDA there"
    return None


class Device:
    """The checkpoint, the setting and the scratch folder of one comparison."""

    def __init__(self, given: argparse.Namespace, scratch: Path) -> None:
        shape = SHAPES[SHAPE_OF[given.setting]]
        self.given, self.scratch = given, scratch
        self.setting, self.shape, self.K = told(shape), shape, given.at_once or shape.packs[-1]
        self.start = write_start(scratch / "start", shape)
        self.file = scratch / "setting.json"
        self.setting.write(self.file)

    def measure(self, way: Way, updates: int) -> dict[str, Any]:
        """One run of a way.

        Raises:
            Failure: of a process.
        """
        here = Path(tempfile.mkdtemp(prefix=f"{way.side}-", dir=self.scratch))
        (here / "meet").mkdir()
        python = self.given.trl if way.side == "trl" else sys.executable
        files = [here / f"{number}.json" for number in range(way.processes)]
        shared = [str(self.start), "--setting", str(self.file), "--updates", str(updates)]
        shared += ["--meet", str(here / "meet"), "--processes", str(way.processes)]
        commands = []
        for number, file in enumerate(files):
            own = ("--cells", str(way.cells)) if way.side == "klab" else ("--seed", str(number))
            commands.append([python, f"tests/benchmarks/{way.side}_cell.py", *shared, *own, "--out", str(file)])
        run(commands, environment(self.given.setting))
        return summary([json.loads(file.read_text()) for file in files], way, self.setting.clock)


def summary(results: Sequence[dict[str, Any]], way: Way, clock: str) -> dict[str, Any]:
    """What the processes of one run say together, per cell and update: of K at once, a cell's time is divided by K.

    `update` is the whole update on the clock by which the phases are timed.
    """
    medians = [per_update(result["updates"], UPDATES_PER_ROLLOUT, ROLLOUTS_DROPPED) for result in results]
    for row in medians:
        row["update"] = row["cpu"] if clock == "processor" else row["wall"]
    names = sorted(set().union(*medians) - {"cpu", "wall"})
    ms = {n: statistics.mean(row.get(n, 0.0) for row in medians) / way.processes for n in names}
    tokens = statistics.mean(result["tokens"] for result in results)
    return {
        "ms": ms,
        "tokens_per_second": 1e3 * tokens / (UPDATES_PER_ROLLOUT * ms["rollout"]),
        "peak_mb": sum(result.get("device_mb", result["peak_mb"]) for result in results),
        "kept_mb": sum(result.get("device_kept_mb", result["peak_mb"]) for result in results),
        "first_update": max(result["first_update"] for result in results),
        "device": results[0]["device"],
        "trajectories": [result["trajectories"] for result in results],
        "adapter_numbers": [result["adapter_numbers"] for result in results],
    }


def medians(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of the figures of several runs of a way; what is no time and no amount is the first run's."""
    found = dict(rounds[0])
    for name in ("tokens_per_second", "peak_mb", "kept_mb", "first_update"):
        found[name] = statistics.median(each[name] for each in rounds)
    found["ms"] = {n: statistics.median(each["ms"][n] for each in rounds) for n in rounds[0]["ms"]}
    return found


def measured(device: Device, updates: int, rounds: int) -> dict[str, dict[str, Any]]:
    """All ways, in interleaved rounds; of one that does not fit into memory, just that."""
    chosen = ways(device.K, device.given.only, device.shape.lora_rank is not None)
    runs: dict[str, list[dict[str, Any]]] = {key: [] for key in chosen}
    failed: dict[str, str] = {}
    for number in range(rounds):
        for key, way in chosen.items():
            if key in failed:
                continue
            began = time.perf_counter()
            try:
                runs[key].append(device.measure(way, updates))
            except Failure as failure:
                if not failure.out_of_memory:
                    raise
                failed[key] = "out of memory"
            said = failed.get(key) or f"{runs[key][-1]['ms']['update']:.1f} ms per cell and update"
            say(f"round {number + 1} of {rounds}, {way.name}: {said} ({time.perf_counter() - began:.0f} s)")
    return {
        key: {**asdict(way), **({"failed": failed[key]} if key in failed else medians(runs[key]))}
        for key, way in chosen.items()
    }


def floor(shape: Shape) -> dict[str, float]:
    """FLOPs of one update by phase, every trajectory in full; of frozen weights no gradients."""
    sizes = Sizes.of(shape.config)
    flops = plain_flops(shape.prompts, shape.prompt_tokens, shape.new_tokens, sizes, shape.group_size)
    return flops if shape.lora_rank is None else {**flops, "backward": flops["backward"] / 2}


def add_ratios(rows: dict[str, dict[str, Any]]) -> None:
    """How many times as long TRL takes for a cell's update, in one process and in several at once."""
    for key in ("trl", "trl_at_once"):
        theirs = rows.get(key, {}).get("ms")
        for row in rows.values():
            if theirs and "ms" in row:
                row[f"{key}_over_this"] = theirs["update"] / row["ms"]["update"]


def compare(given: argparse.Namespace) -> dict[str, Any]:
    """Measure, print, and write `against_trl_SETTING.{json,md}`."""
    from tests.benchmarks.against_trl_report import device_table

    defaults = DEFAULTS[given.setting]
    given.only = given.only or defaults.get("only")
    needs_trl = any(way.side == "trl" for way in ways(1, given.only).values())
    problem = obstacle(given.setting, given.trl if needs_trl else None)
    if problem:
        print(problem, file=sys.stderr)
        sys.exit(2)
    updates, rounds = given.timed or defaults["timed"], given.rounds or defaults["rounds"]
    peak = None if told(SHAPES[SHAPE_OF[given.setting]]).clock == "wall" else peak_gflops()
    scratch = Path(tempfile.mkdtemp(prefix="klab-bench-"))
    try:
        device = Device(given, scratch)
        rows = measured(device, updates, rounds)
    except Failure as failure:
        sys.exit(str(failure))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    add_ratios(rows)
    found = {
        "setting": given.setting,
        "shape": SHAPE_OF[given.setting],
        "device": next((row["device"] for row in rows.values() if "device" in row), "a device with too little memory"),
        "told": asdict(device.setting),
        "decoding": environment(given.setting).get(VARIABLE, "that of processors"),
        "peak_gflops": peak,
        "floor_ms": None if peak is None else sum(floor(device.shape).values()) / peak / 1e6,
        "at_once": device.K,
        "updates": updates,
        "rounds": rounds,
        "rows": rows,
    }
    given.out.mkdir(parents=True, exist_ok=True)
    text = device_table(found)
    (given.out / f"against_trl_{given.setting}.md").write_text(text)
    (given.out / f"against_trl_{given.setting}.json").write_text(json.dumps(found, indent=1))
    console.print(text, markup=False, highlight=False, soft_wrap=True)
    return found
