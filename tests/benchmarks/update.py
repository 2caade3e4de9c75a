"""One training update, phase by phase: `make bench`.

Cells of the demo's shape (and of a quarter of it) are trained alone and in packs, interleaved, in this process on one
thread. Printed are milliseconds per cell and update, and trajectories per second. Sampling and scoring by the plain
path (no shared prompts, no merged rows, no kept prefixes) stand beside them as a ratio.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from klab.grid import parse_grid
from klab.harness.policy.sampling.sample import sample
from klab.harness.policy.sampling.sampler import SamplingOptions
from klab.harness.policy.scores import token_scores
from klab.harness.policy.stacked.policy import StackedPolicy
from klab.harness.store import Run
from klab.harness.training import run_cells
from klab.harness.training.runtime.torch_settings import configure_torch
from klab.tasks import load_task

PHASES = ("rollout", "reward", "reference", "forward", "backward", "step")
UPDATES, ROUNDS, GROUP_SIZE = 12, 3, 8
GRID = """
name: bench-{prompts}-{cells}-{round}
task: {{name: addition, digits: 2}}
policy: {{name: tiny}}
training: {{updates: {updates}, prompts: {prompts}, group_size: {group_size}, updates_per_rollout: 2, lr: 1e-4,
  evaluate_every: 1000, evaluation_prompts: 8, evaluation_samples: 1}}
objective: {{algorithm: grpo}}
seeds: {cells}
"""


def train(folder: Path, prompts: int, cells: int, number: int) -> dict[str, float]:
    """Median milliseconds per cell and update of each phase, over one pack's updates after the first rollout."""
    text = GRID.format(prompts=prompts, cells=cells, round=number, updates=UPDATES, group_size=GROUP_SIZE)
    grid = parse_grid(text, "bench")
    run = Run.create(folder / grid.name, grid)
    if not run.policies.exists() and (folder / "policies").exists():
        shutil.copytree(folder / "policies", run.policies)
    run_cells(run.path, run.cells)
    if not (folder / "policies").exists():
        shutil.copytree(run.policies, folder / "policies")
    rows = [row for identity in run.cells for row in run.cell(identity).metrics() if row["rollout"] > 1]
    return {phase: 1e3 * statistics.mean(row[f"seconds_{phase}"] for row in rows) for phase in PHASES}


def shortcuts(folder: Path) -> dict[str, tuple[float, float]]:
    """Seconds of the plain path and of the ordinary one, for sampling and for scoring with its backward pass."""
    (start,) = [path.parent for path in (folder / "policies").glob("*/config.json")][:1]
    policy = StackedPolicy.from_pretrained(start)
    examples = load_task(
        parse_grid(GRID.format(prompts=16, cells=1, round=0, updates=1, group_size=8), "").cells[0].task
    )
    texts = [example.prompt for example in examples.split("train")[:16]]
    prompts = [[policy.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]]
    seconds: dict[str, list[list[float]]] = {"sample": [[], []], "score": [[], []]}
    for _ in range(ROUNDS):
        for plain in (True, False):
            began = time.perf_counter()
            rollouts = sample(
                policy,
                prompts,
                [torch.Generator().manual_seed(1)],
                SamplingOptions(group_size=GROUP_SIZE, max_new_tokens=4),
                plain=plain,
            )
            sampled = time.perf_counter()
            (scores,) = token_scores(policy, rollouts, plain=plain)
            scores.logp.sum().backward()
            scored = time.perf_counter()
            seconds["sample"][not plain].append(sampled - began)
            seconds["score"][not plain].append(scored - sampled)
    return {name: (statistics.median(plain), statistics.median(fast)) for name, (plain, fast) in seconds.items()}


def main() -> None:
    """Measure and print both tables, under the conditions of a process that trains."""
    with configure_torch(1):
        _measure()


def _measure() -> None:
    console = Console(width=120)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        train(folder, 16, 1, -1)
        shapes = [(16, 1), (16, 8), (4, 1), (4, 8)]
        found: dict[tuple[int, int], list[dict[str, float]]] = {shape: [] for shape in shapes}
        for number in range(ROUNDS):
            for shape in shapes:
                found[shape].append(train(folder, *shape, number))
        table = Table(
            "prompts × group", "cells in the pack", *PHASES, "ms per update", "trajectories/s", "alone ÷ this"
        )
        for (prompts, cells), rounds in found.items():
            median = {phase: statistics.median(one[phase] for one in rounds) for phase in PHASES}
            total = sum(median.values())
            alone = sum(statistics.median(one[phase] for one in found[prompts, 1]) for phase in PHASES)
            rate = prompts * GROUP_SIZE / total * 1e3
            table.add_row(
                f"{prompts} × {GROUP_SIZE}",
                str(cells),
                *(f"{median[phase]:.1f}" for phase in PHASES),
                f"{total:.1f}",
                f"{rate:.0f}",
                f"{alone / total:.2f}",
            )
        console.print(table)
        ratios = Table("path", "plain, ms", "with all shortcuts, ms", "plain ÷ shortcuts")
        for name, (plain, fast) in shortcuts(folder).items():
            ratios.add_row(name, f"{1e3 * plain:.1f}", f"{1e3 * fast:.1f}", f"{plain / fast:.1f}")
        console.print(ratios)


if __name__ == "__main__":
    main()
