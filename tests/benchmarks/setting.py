"""What klab and TRL are both told in the comparison; nothing but numbers, so that either environment can read it."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

DIGITS, VOCABULARY, CONTEXT = 3, 32, 256
HIDDEN, LAYERS, HEADS, INTERMEDIATE = 128, 4, 4, 384
GROUP_SIZE, UPDATES_PER_ROLLOUT = 8, 2
BETA, EPSILON, LEARNING_RATE = 0.04, 0.2, 1e-4
LORA_ALPHA = 32.0
ROLLOUTS_DROPPED = 1
"""The first rollouts and their updates set everything up; no median counts them."""


@dataclass(frozen=True)
class Setting:
    """One training as both trainers are told it; the other numbers of this module belong to every setting.

    Attributes:
        task: klab's task section, which either side loads.
        prompts, group_size, new_tokens: of a rollout.
        rows: trajectories that go through the model at once in an update; None: all of them.
        dtype: of the weights. TRL trains bfloat16 ones in mixed precision, as `bf16=True` has it.
        lora_rank: of adapters on every linear layer over frozen weights; None: all weights are trained.
        clock: what times the phases, one of `clock.CLOCKS`.
    """

    task: dict[str, Any]
    prompts: int
    new_tokens: int
    group_size: int = GROUP_SIZE
    rows: int | None = None
    dtype: str = "float32"
    lora_rank: int | None = None
    clock: str = "processor"

    @property
    def trajectories(self) -> int:
        return self.prompts * self.group_size

    def write(self, file: Path) -> None:
        file.write_text(json.dumps(asdict(self)))

    def grid_text(self, start: Path, updates: int, cells: int, name: str = "bench") -> str:
        """klab's grid: cells that differ in their seed alone. Evaluated as seldom and as little as klab can."""
        lora = None if self.lora_rank is None else {"rank": self.lora_rank, "alpha": LORA_ALPHA}
        return f"""
name: {name}
task: {json.dumps(self.task)}
policy: {{name: hf, model: {start}, dtype: {self.dtype}, lora: {json.dumps(lora)}}}
training:
  updates: {updates}
  prompts: {self.prompts}
  group_size: {self.group_size}
  updates_per_rollout: {UPDATES_PER_ROLLOUT}
  max_new_tokens: {self.new_tokens}
  micro_batch: {json.dumps(self.rows)}
  lr: {LEARNING_RATE}
  clip_norm: 1.0
  evaluate_every: {updates}
  evaluation_prompts: 1
  evaluation_samples: 1
objective: {{algorithm: grpo, beta: {BETA}, eps_low: {EPSILON}, eps_high: {EPSILON}}}
seeds: {cells}
"""


def tiny(prompts: int, budget: int) -> Setting:
    """The comparison on a CPU: three-digit addition, float32, all weights, phases in processor time."""
    return Setting({"name": "addition", "digits": DIGITS}, prompts, budget)


def grid_text(start: Path, prompts: int, budget: int, updates: int, cells: int, name: str = "bench") -> str:
    """klab's grid of the tiny setting."""
    return tiny(prompts, budget).grid_text(start, updates, cells, name)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """How a cell's process is told what to train."""
    parser.add_argument("start", type=Path)
    parser.add_argument("--prompts", type=int, help="of the tiny setting")
    parser.add_argument("--budget", type=int, help="of the tiny setting: new tokens")
    parser.add_argument("--setting", type=Path, help="a setting that `Setting.write` wrote, in place of the tiny one")
    parser.add_argument("--updates", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--meet", type=Path, help="a folder in which processes that train at once wait for each other")
    parser.add_argument("--processes", type=int, default=1, help="how many meet there")


def told(given: argparse.Namespace) -> Setting:
    """The setting that a cell's process was told."""
    if given.setting is not None:
        return Setting(**json.loads(given.setting.read_text()))
    if given.prompts is None or given.budget is None:
        raise SystemExit("say --prompts and --budget, or --setting")
    return tiny(given.prompts, given.budget)
