"""One cell trained by TRL with klab's objective as its loss, timed phase by phase as `trl_cell` times TRL alone."""

from __future__ import annotations

import time

STARTED = time.time()

import argparse  # noqa: E402
import json  # noqa: E402
import tempfile  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import torch  # noqa: E402
from clock import meet  # noqa: E402
from setting import add_arguments, told  # noqa: E402
from transformers import TrainerCallback  # noqa: E402
from trl_cell import Watch, measured, watched  # noqa: E402

from klab.grid import parse_grid  # noqa: E402
from klab.harness.engines.trl.cell import make_trainer  # noqa: E402
from klab.harness.engines.trl.recorder import take_or_leave_step  # noqa: E402
from klab.harness.engines.trl.trainer import KlabTrainer  # noqa: E402
from klab.harness.training.packed_cell import PackedCell  # noqa: E402
from klab.tasks import load_task  # noqa: E402


class Rows(TrainerCallback):
    """What a cell's recorder does of an update, without its files."""

    def __init__(self, trainer: KlabTrainer) -> None:
        self.rewards: list[float] = []
        self._trainer = trainer

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        take_or_leave_step(self._trainer, given["optimizer"])

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.rewards.append(self._trainer.close_update()["reward_mean"])


def main() -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    setting = told(given)
    text = setting.grid_text(given.start, given.updates, 1).replace("training:", "training:\n  engine: trl", 1)
    cell = parse_grid(text.replace("seeds: 1", f"seeds: [{given.seed}]"), "bench.yaml").cells[0]
    with tempfile.TemporaryDirectory() as scratch:
        trainer = make_trainer(PackedCell(cell, load_task(cell.task), given.start), Path(scratch))
        rows, watch = Rows(trainer), Watch(setting.clock, lambda: meet(given.meet, given.processes))
        trainer.add_callback(rows)
        trainer.add_callback(watch)
        watched(trainer, watch)
        trainer.train()
    given.out.write_text(json.dumps(measured(setting, trainer, watch, rows.rewards, STARTED)))


if __name__ == "__main__":
    main()
