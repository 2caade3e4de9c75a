"""The callback through which a cell on TRL lives as every other: rows, evaluations, heartbeats, checkpoints, its end.

After every update, in this order: metrics, evaluation if due, heartbeat, the question whether to stop, checkpoint if
due. Process 0 writes and decides; all processes do the same. Checkpoints are made, and a stop is heard, where a rollout
is used up: what TRL keeps of a rollout in use cannot be restored.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any, Literal

import torch
from transformers import TrainerCallback

from klab.harness.engines.trl import checkpoints
from klab.harness.engines.trl.trainer import KlabTrainer
from klab.harness.store import CellFolder, ClaimRevoked
from klab.harness.training.distributed.process_group import SINGLE_PROCESS
from klab.harness.training.evaluation import EvalSet, evaluate, prepare_eval_sets
from klab.harness.training.metrics import Row
from klab.harness.training.pack_settings import PackSettings
from klab.harness.training.runner import HEARTBEAT_SECONDS, Progress
from klab.harness.training.stop_rule import why_hopeless
from klab.harness.training.summary import DIVERGED_AFTER

State = Literal["finished", "diverged", "stopped", "interrupted"]


class Recorder(TrainerCallback):
    """One cell's life in one process.

    Args:
        folder: the cell's; only process 0 writes there.
        progress: called after every update.
        stop: asked where a rollout is used up; true saves the cell and ends the training.

    Attributes:
        state: how the training ended.
        hopeless: why `training.stop` ended it; None: it did not.
    """

    def __init__(
        self,
        folder: CellFolder,
        trainer: KlabTrainer,
        progress: Callable[[Progress], None],
        stop: Callable[[], bool],
        resumed: checkpoints.TrainerState | None = None,
    ) -> None:
        self.state: State = "interrupted"
        self.hopeless: str | None = None
        self._folder, self._trainer, self._progress, self._stop = folder, trainer, progress, stop
        self._training = trainer.member.cell.training
        # evaluations are drawn by the trainer, whoever draws the rollouts: the same for every engine
        self._settings = replace(PackSettings.of([trainer.member]), sampler=None)
        self._saved = 0 if resumed is None else resumed.update
        self._streak = 0 if resumed is None else resumed.streak
        self._evaluated = -1 if resumed is None else resumed.update
        self._saved_at = time.monotonic()
        self._last_heartbeat = -HEARTBEAT_SECONDS
        self._reward: float | None = None
        self._eval_sets: list[EvalSet] = []

    @property
    def _writes(self) -> bool:
        return self._trainer.group.is_main

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        self._evaluate_if_due(state.global_step)
        self._report(state.global_step)

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        self._trainer.note_backward()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> Any:
        take_or_leave_step(self._trainer, given["optimizer"])
        self._step_since = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        self._trainer.timer.add("step", time.perf_counter() - self._step_since)
        row, update = self._trainer.close_update(), int(state.global_step)
        self._streak = self._streak + 1 if row["nonfinite"] else 0
        self._reward = row["reward_mean"]
        if self._writes:
            self._folder.append_metrics([row])
        self._report(update)
        if self._streak >= DIVERGED_AFTER or (row["nonfinite"] and not self._weights_are_finite()):
            self.state = "diverged"
            control.should_training_stop = True
            return control
        self._evaluate_if_due(update)
        self._heartbeat(update)
        if update >= self._training.updates:
            self.state = "finished"
            control.should_training_stop = True
        elif self._is_hopeless(update):
            self.state = "stopped"
            control.should_training_stop = True
        elif update % self._training.optimizer_steps_per_rollout == 0:
            save, stop = self._agreed(update)
            control.should_save = save and update > self._saved
            control.should_training_stop = stop
        return control

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        """All processes have written their part of the checkpoint."""
        self._trainer.group.all_gather_object("a checkpoint", lambda: None)
        update = int(state.global_step)
        if self._writes:
            self._folder.assert_owner()
            self._folder.sync()
            if self._trainer.moves_reference:
                checkpoints.write_reference(self._folder, update, self._trainer.reference_weights())
            checkpoints.complete(self._folder, update, self._streak, self._trainer.coefficients)
        self._saved, self._saved_at = update, time.monotonic()

    def _agreed(self, update: int) -> tuple[bool, bool]:
        """Whether to save, and whether to stop: what process 0 says."""

        def opinion() -> tuple[bool, bool]:
            if not self._writes:
                return False, False
            stop, every = self._stop(), self._training.checkpoint_updates
            late = time.monotonic() - self._saved_at >= self._training.checkpoint_seconds
            return stop or late or update // every > self._saved // every, stop

        save, stop = self._trainer.group.all_gather_object("what next", opinion)[0]
        return bool(save), bool(stop)

    def _is_hopeless(self, update: int) -> bool:
        """Whether the cell's rule ends it after the evaluation that was just made: what process 0 reads."""
        rule = self._training.stop
        if rule is None or self._evaluated != update:
            return False

        def read() -> str | None:
            return why_hopeless(rule, self._folder.evaluations()) if self._writes else None

        self.hopeless = self._trainer.group.all_gather_object("whether to stop", read)[0]
        return self.hopeless is not None

    def _evaluate_if_due(self, update: int) -> None:
        """Before the first update, every `evaluate_every` updates, and after the last."""
        due = update % self._training.evaluate_every == 0 or update >= self._training.updates
        if self._evaluated >= update or not due:
            return
        started, trainer = time.perf_counter(), self._trainer
        policy, reference, moving = trainer.policies()
        # sharded weights are only there while all processes go through the model together, in the same steps
        group = SINGLE_PROCESS if trainer.is_sharded else trainer.group
        members, budget = [trainer.member], self._settings.budget
        with torch.no_grad():
            if not self._eval_sets:
                self._eval_sets = prepare_eval_sets(self._settings, members, reference, budget, group)
            rows = evaluate(
                policy, reference, self._settings, members, self._eval_sets, update, budget, group, moving=moving
            )
        trainer.model.train()
        self._evaluated = update
        row: Row = {**rows[0], "seconds": time.perf_counter() - started}
        if self._writes:
            self._folder.append_evaluations([row])

    def _weights_are_finite(self) -> bool:
        weights = (each for each in self._trainer.model.parameters() if each.requires_grad)
        own = all(bool(torch.isfinite(_local(each.detach())).all()) for each in weights)
        return all(self._trainer.group.all_gather_object("weights", lambda: own))

    def _heartbeat(self, update: int) -> None:
        if not self._writes or time.monotonic() - self._last_heartbeat < HEARTBEAT_SECONDS:
            return
        self._last_heartbeat = time.monotonic()
        progress = {"update": update, "updates": self._training.updates, "reward": self._reward}
        with suppress(OSError, ClaimRevoked):  # the next row of metrics will tell whether this matters
            self._folder.write_heartbeat(progress)

    def _report(self, update: int) -> None:
        if self._writes:
            self._progress(Progress(self._folder.id, update, self._training.updates, self._reward))


def take_or_leave_step(trainer: KlabTrainer, optimizer: Any) -> None:
    """Finish the update's row, and leave its step out where it must not be taken."""
    if not trainer.finish_update() and not trainer.takes_steps_by_itself():
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None  # an optimizer leaves such a parameter as it is


def _local(weight: torch.Tensor) -> torch.Tensor:
    """This process's part of a weight."""
    local: torch.Tensor = weight.to_local() if hasattr(weight, "to_local") else weight
    return local
