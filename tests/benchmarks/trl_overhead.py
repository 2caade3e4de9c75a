"""What klab's objective, rows and checks cost on TRL: its trainer beside the plain one, interleaved in one process.

    python -m tests.benchmarks.trl_overhead                # some minutes
    python -m tests.benchmarks.trl_overhead --rounds 1 --updates 8

The same random model (the tiny setting of `against_trl`), prompts, rewards and GRPO loss with a KL term; processor
time per update, without the first rollout, as the median over the updates of all rounds. klab's side writes its rows;
it evaluates before the first update and after the last, which are not counted.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback
from trl import GRPOConfig, GRPOTrainer

from klab.grid.schema.sections import TinyPolicy
from klab.harness.engines.trl.cell import make_trainer, prepare_member, prompt_dataset, reset_accelerate
from klab.harness.engines.trl.recorder import Recorder
from klab.harness.engines.trl.rollout_trainer import EXAMPLE
from klab.harness.engines.trl.settings import grpo_arguments
from klab.harness.policy.init.initial_policy import tiny_config
from klab.harness.policy.pretrained import read_tokenizer
from klab.harness.policy.stacked.policy import StackedPolicy
from klab.harness.store import Run
from klab.tasks.addition import Addition
from tests.benchmarks.setting import BETA, DIGITS, EPSILON, HEADS, HIDDEN, INTERMEDIATE, LAYERS, grid_text
from tests.support.transformers_tokenizer import character_tokenizer

LIMIT = 0.03
"""Share of an update that klab may add."""

_DROPPED = 3


class Clock(TrainerCallback):
    """Milliseconds of processor time of every update."""

    def __init__(self) -> None:
        self.updates: list[float] = []
        self._last = 0.0

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._last = time.process_time()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        now = time.process_time()
        self.updates.append(1e3 * (now - self._last))
        self._last = now


def random_start(folder: Path) -> Path:
    """The tiny setting's model with random weights, for the characters of addition."""
    tokenizer = character_tokenizer(str(Addition(DIGITS).alphabet))
    section = TinyPolicy(hidden=HIDDEN, layers=LAYERS, heads=HEADS, intermediate=INTERMEDIATE)
    ends = int(tokenizer.eos_token_id), int(tokenizer.pad_token_id)
    StackedPolicy.random(tiny_config(section, len(tokenizer), *ends, 256), tokenizer, [3]).save(folder, 0)
    return folder


def ours(run: Run, scratch: Path) -> list[float]:
    """klab's trainer, as a cell is trained."""
    folder = run.cell(run.cells[0])
    folder.truncate_metrics(0)
    folder.truncate_evaluations(-1)
    trainer, clock = make_trainer(prepare_member(run, folder), scratch), Clock()
    trainer.add_callback(Recorder(folder, trainer, lambda _: None, lambda: False))
    trainer.add_callback(clock)
    trainer.train()
    reset_accelerate()
    return clock.updates[_DROPPED:-1]


def theirs(run: Run, scratch: Path) -> list[float]:
    """Plain `GRPOTrainer` with the same arguments and TRL's own loss."""
    member, clock = prepare_member(run, run.cell(run.cells[0])), Clock()
    examples = member.split("train")

    def reward(completions: list[str], **columns: Any) -> list[float]:
        scored = zip(columns[EXAMPLE], completions, strict=True)
        return [member.task.score(examples[index], text).reward for index, text in scored]

    settings = {"beta": BETA, "epsilon": EPSILON, "use_bias_correction_kl": False}
    trainer = GRPOTrainer(
        model=str(member.start),
        reward_funcs=[reward],
        args=GRPOConfig(**{**grpo_arguments(member, scratch, 1, [1], on_cpu=True), **settings}),
        train_dataset=prompt_dataset(member),
        processing_class=read_tokenizer(member.start),
        callbacks=[clock],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    reset_accelerate()
    return clock.updates[_DROPPED:-1]


def compare(updates: int, rounds: int) -> dict[str, Any]:
    """Medians of both sides, of the updates that draw a rollout and of those that do not."""
    found: dict[str, list[float]] = {"trl": [], "klab": []}
    with tempfile.TemporaryDirectory(prefix="klab-bench-") as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scratch = Path(name)
        start = random_start(scratch / "start")
        text = grid_text(start, 16, 8, updates, 1).replace("training:", "training:\n  engine: trl", 1)
        from klab.grid import parse_grid

        run = Run.create(scratch / "run", parse_grid(text, scratch / "grid.yaml"))
        for _ in range(rounds):
            for side, work in (("trl", theirs), ("klab", ours)):
                times = work(run, scratch / side)
                found[side] += [sum(pair) / 2 for pair in zip(times[::2], times[1::2], strict=False)]
    medians = {side: statistics.median(values) for side, values in found.items()}
    return {**medians, "overhead": medians["klab"] / medians["trl"] - 1, "pairs": len(found["trl"])}


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure and print; returns what was measured."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.trl_overhead", description=__doc__)
    parser.add_argument("--updates", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found = compare(given.updates, given.rounds)
    if given.json:
        print(json.dumps(found))
    else:
        print(f"plain TRL {found['trl']:.1f} ms per update, with klab's objective {found['klab']:.1f} ms: ", end="")
        print(f"{found['overhead']:+.1%} over {found['pairs']} pairs of updates (limit {LIMIT:.0%})")
    return found


if __name__ == "__main__":
    main()
