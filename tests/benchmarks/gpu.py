"""Rollouts and updates of a model of real size on one device: `python -m tests.benchmarks.gpu`.

A checkpoint with random weights of the chosen shape is made, and cells are trained by the ordinary pack. Printed are
tokens per second, peak memory, which share of the device's bandwidth a decoding step and of its arithmetic an update
reaches, how far log-probabilities of bfloat16 weights are from those of the same weights in float32, and what packs of
adapters over one frozen base cost beside single cells.

Bytes and FLOP are counted by the plain formulas: a decoding step reads all weights and all keys and values once; an
update costs 6 FLOP per weight and token (4 where only adapters are trained), prompts counted with every completion.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from klab.grid import parse_grid
from klab.harness.policy.scores import token_scores
from klab.harness.policy.stacked.policy import StackedPolicy
from klab.harness.training import pack as packs
from klab.harness.training.packed_cell import PackedCell
from klab.harness.training.runtime.oom import free_memory
from klab.tasks import load_task
from tests.benchmarks.shapes import SHAPES, Shape, Strings, write_start

PEAKS = {"H200": (4.8e12, 989e12), "H100": (3.35e12, 989e12), "A100": (2.04e12, 312e12)}
"""Bytes per second of the memory and dense bfloat16 FLOP per second, from NVIDIA's data sheets (SXM, 80 GB or more)."""

GRID = """
name: gpu
task: {{name: "tests.benchmarks.shapes:Strings", length: {prompt_tokens}}}
policy: {{name: hf, model: "{start}", dtype: {dtype}, lora: {lora}}}
training: {{updates: {updates}, prompts: {prompts}, group_size: {group_size}, max_new_tokens: {new_tokens}, lr: 1.0e-6,
  micro_batch: {micro_batch}, evaluate_every: 1000}}
objective: {{algorithm: grpo}}
seeds: {cells}
"""


@dataclass(frozen=True)
class Measured:
    """The second and later updates of a pack of `cells` cells, per update of the whole pack.

    tokens: drawn; trained: prompts counted with every completion; bytes_read: by all decoding steps of a rollout.
    """

    cells: int
    tokens: float
    trained: float
    rollout_seconds: float
    update_seconds: float
    bytes_read: float
    flop: float
    peak_bytes: int

    @property
    def seconds(self) -> float:
        return self.rollout_seconds + self.update_seconds


def measure(shape: Shape, start: Path, cells: int, rank: int | None, rounds: int) -> Measured:
    """Train a pack, of adapters where a rank is given. The first update sets everything up and is not counted."""
    text = GRID.format(
        start=start,
        lora="null" if rank is None else f"{{rank: {rank}}}",
        updates=rounds + 1,
        cells=cells,
        micro_batch="null" if shape.micro_batch is None else shape.micro_batch,
        **{name: getattr(shape, name) for name in ("dtype", "prompts", "group_size", "prompt_tokens", "new_tokens")},
    )
    grid = parse_grid(text, "gpu")
    task = load_task(grid.cells[0].task)
    pack = packs.Pack([PackedCell(cell, task, start) for cell in grid.cells])
    pack.advance()
    device = pack.policy.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    rows = [row for _ in range(rounds) for row in pack.advance()]
    total = {name: sum(row[name] for row in rows) / rounds for name in rows[0] if name.startswith("seconds_")}
    tokens, N = sum(row["tokens"] for row in rows) / rounds, shape.prompts * shape.group_size
    policy = pack.policy
    assert isinstance(policy, StackedPolicy)
    once = sum(value.numel() for value in (policy.shared or policy.parameters).values())
    own = sum(value.numel() for value in policy.parameters.values()) if policy.shared else 0
    a, width = policy.architecture, policy.dtype.itemsize
    steps = max(row["length_mean"] for row in rows)
    held = 2 * a.num_layers * a.num_kv_heads * a.head_dim * (shape.prompt_tokens + steps / 2) * cells * N
    trained = tokens + cells * N * shape.prompt_tokens
    return Measured(
        cells,
        tokens,
        trained,
        total["seconds_rollout"],
        total["seconds_forward"] + total["seconds_backward"] + total["seconds_step"],
        steps * (width * (once + held) + 4 * own),
        (6 if rank is None else 4) * trained * once / (cells if rank is None else 1),
        torch.cuda.max_memory_allocated() if device.type == "cuda" else _resident(),
    )


def _resident() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@torch.no_grad()
def gap(start: Path, shape: Shape, device: torch.device) -> tuple[float, float]:
    """Mean and largest difference of log-probabilities of the same tokens under bfloat16 weights and float32 copies."""
    from klab.harness.policy.sampling.sample import sample
    from klab.harness.policy.sampling.sampler import SamplingOptions

    narrow = StackedPolicy.from_pretrained(start, dtype=torch.bfloat16, device=device)
    examples = Strings(shape.prompt_tokens).split("train")[: shape.prompts]
    prompts = [narrow.tokenizer(example.prompt)["input_ids"] for example in examples]
    generators = [torch.Generator(device).manual_seed(0)]
    (rollout,) = sample(
        narrow, [prompts], generators, SamplingOptions(group_size=shape.group_size, max_new_tokens=shape.new_tokens)
    )
    mine, theirs = (token_scores(each, [rollout])[0].logp for each in (narrow, narrow.frozen_copy(torch.float32)))
    difference = (mine - theirs)[rollout.mask].abs()
    return float(difference.mean()), float(difference.max())


def peaks(device: torch.device, bandwidth: float | None, tflops: float | None) -> tuple[float | None, float | None]:
    """Bytes and FLOP per second that the device is capable of, where that is known or given (GB/s and TFLOP/s)."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    known = next((PEAKS[key] for key in PEAKS if key in name), (None, None))
    return (
        known[0] if bandwidth is None else bandwidth * 1e9,
        known[1] if tflops is None else tflops * 1e12,
    )


def _row(name: str, found: Measured, best: tuple[float | None, float | None], alone: Measured) -> list[str]:
    bandwidth, arithmetic = best
    return [
        name,
        str(found.cells),
        f"{found.tokens / found.rollout_seconds:.0f}",
        f"{found.trained / found.update_seconds:.0f}",
        f"{1e3 * found.seconds / found.cells:.1f}",
        f"{found.cells * alone.seconds / found.seconds:.2f}",
        f"{found.peak_bytes / 2**30:.2f}",
        "—" if bandwidth is None else f"{found.bytes_read / found.rollout_seconds / bandwidth:.1%}",
        "—" if arithmetic is None else f"{found.flop / found.update_seconds / arithmetic:.1%}",
    ]


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure and print; returns what was measured."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.gpu", description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="qwen2.5-0.5b")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rank", type=int, default=16, help="of the adapters")
    parser.add_argument("--rounds", type=int, default=3, help="updates that are counted")
    parser.add_argument("--bandwidth", type=float, help="the device's, in GB/s")
    parser.add_argument("--tflops", type=float, help="the device's, in TFLOP/s")
    given = parser.parse_args(arguments)
    shape, device, console = SHAPES[given.shape], torch.device(given.device), Console(width=140)
    if device.type == "cpu" and torch.cuda.is_available():
        raise SystemExit("cells train on the GPU where there is one: hide it with CUDA_VISIBLE_DEVICES=''")
    best = peaks(device, given.bandwidth, given.tflops)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        start = write_start(Path(scratch), shape)
        found["all weights"] = measure(shape, start, 1, None, given.rounds)
        for cells in (1, *shape.packs):
            free_memory()
            found[f"adapters, {cells}"] = measure(shape, start, cells, given.rank, given.rounds)
        free_memory()
        found["gap"] = gap(start, shape, device)
    table = Table(
        "trained", "cells", "decoded tokens/s", "trained tokens/s", "ms per cell and update", "alone ÷ this",
        "peak GiB", "of the bandwidth", "of the arithmetic",
    )  # fmt: skip
    table.add_row(*_row("all weights", found["all weights"], best, found["all weights"]))
    for cells in (1, *shape.packs):
        table.add_row(*_row("adapters", found[f"adapters, {cells}"], best, found["adapters, 1"]))
    console.print(f"{given.shape} on {device}, {shape.dtype}, {shape.prompts} × {shape.group_size} trajectories")
    console.print(table)
    mean, largest = found["gap"]
    console.print(f"log-probabilities, bfloat16 − float32: mean {mean:.4f}, largest {largest:.4f}")
    return found


if __name__ == "__main__":
    main()
