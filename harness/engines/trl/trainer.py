"""`trl.GRPOTrainer` with klab's prompts, rewards, objective and learning-rate schedule.

What TRL keeps: generation, the buffer of rollouts, gradient accumulation, wrapping by accelerate, the optimizer,
checkpoints. What is klab's: token ids of the prompts (`scoring_trainer`), scores of the completions
(`rollout_trainer`), advantages and loss, which are here.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from trl.models.utils import disable_gradient_checkpointing

from klab.harness.engines.trl.rollout_trainer import RolloutTrainer
from klab.harness.engines.trl.update import ExtraPass, Update, needs_current_policy
from klab.harness.objective import LossCoefficients, detached_kl
from klab.harness.training.metrics import Row
from klab.harness.training.optim.kl_controller import initial_coefficients, next_coefficients
from klab.harness.training.optim.schedule import learning_rate
from klab.harness.training.packed_cell import PackedCell


class KlabTrainer(RolloutTrainer):
    """A cell's trainer.

    Args:
        member: the cell, its task, and the folder that its policy starts from.
        arguments: of `GRPOTrainer`, without the model and the rewards.

    Attributes:
        coefficients: of the next update.
        pending_row: of the update whose step is being taken.
    """

    lr_scheduler: Any

    def __init__(self, member: PackedCell, **arguments: Any) -> None:
        self.coefficients: LossCoefficients = initial_coefficients(member.cell)
        self.pending_row: Row | None = None
        self._update: Update | None = None
        self._gradient_norm = 0.0
        self._backward_since: float | None = None
        super().__init__(member, **arguments)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The cell's schedule: the rate of update n is `learning_rate(training, n)`, warm-up included."""
        if self.lr_scheduler is None:
            training = self.member.cell.training
            self.lr_scheduler = LambdaLR(
                optimizer or self.optimizer, lambda done: learning_rate(training, done + 1, peak=1.0)
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """None is written into checkpoints."""

    @property
    def update_number(self) -> int:
        """The update that is being made, from 1."""
        return int(self.state.global_step) + 1

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        if self._step % self.current_gradient_accumulation_steps == 0:
            self._update = self._begin_update()
        assert self._update is not None
        with self.timer("forward"):
            loss = self._update.loss(inputs["klab_rows"], self.forward_pass(model, inputs))
        self._backward_since = time.perf_counter()
        # the processes' gradients are averaged, and the parts of klab's loss add up
        return loss * self.group.size

    def _begin_update(self) -> Update:
        assert self.experience is not None
        rows = None
        if self.member.cell.training.minibatches > 1:
            count = self.current_gradient_accumulation_steps
            at = self._step % self.args.steps_per_generation // count * count
            own = torch.cat([piece["klab_rows"] for piece in self._buffered_inputs[at : at + count]])
            parts = self.group.all_gather_object("rows", lambda: own, self.accelerator.device)
            rows = torch.cat(parts).sort().values
        update = Update(self.member, self.experience, self.coefficients, self.update_number, rows)
        if needs_current_policy(self.member):
            update.extra = self._extra_pass(update)
        return update

    @torch.no_grad()
    def _extra_pass(self, update: Update) -> ExtraPass:
        """One more pass over the whole rollout, with the policy as it is before the update."""
        with self.timer("forward"), disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
            computed = [(piece["klab_rows"], self.forward_pass(self.model, piece)) for piece in self._buffered_inputs]
        values: list[tuple[Tensor, ...]] = []
        for rows, scores in computed:
            batch = update.batch(rows, scores)
            phi = detached_kl(self.member.cell.objective, batch) if self.member.needs_logits else None
            values.append((rows, batch.logp, *(() if phi is None else (phi,))))
        parts = self.group.all_gather_object("an extra pass", lambda: values, self.accelerator.device)
        columns = [torch.cat(column) for column in zip(*(each for part in parts for each in part), strict=True)]
        order = columns[0].argsort()
        return ExtraPass(*(column[order] for column in columns[1:]))

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        self.note_backward()
        found = super()._get_grad_norm(model, grad_norm=grad_norm)
        self._gradient_norm = float(found)
        return found

    def note_backward(self) -> None:
        """The backward pass that followed the last loss is over."""
        if self._backward_since is not None:
            self.timer.add("backward", time.perf_counter() - self._backward_since)
        self._backward_since = None

    def finish_update(self) -> bool:
        """Compute the update's row from what all processes measured; whether its step is to be taken."""
        assert self._update is not None
        self.pending_row, take = self._update.finish(self.group, self._gradient_norm, self.accelerator.device)
        self._update = None
        return take

    def close_update(self) -> Row:
        """The row of the update that was made, with the seconds spent; coefficients are those of the next one."""
        assert self.pending_row is not None
        row, self.pending_row = self.pending_row, None
        self.coefficients = next_coefficients(self.member.cell, self.coefficients, row)
        self._metrics["train"].clear()  # TRL's own, which nobody reads
        return {**row, **self.timer.take([1.0])[0]}

    def takes_steps_by_itself(self) -> bool:
        """Whether the optimizer steps inside of the backward pass (DeepSpeed), where no step can be left out."""
        return bool(self.accelerator.distributed_type == DistributedType.DEEPSPEED)
