"""One cell for a few updates on both engines from the same rollouts: how far gradients, losses and weights are apart.

klab's own engine draws the rollouts; TRL is given their tokens and does everything else itself: log-probabilities,
rewards, advantages, loss, gradient, step. What is compared are the clipped gradients and the weights as they stand in
saved checkpoints, under the names that transformers gives them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import TrainerCallback

from klab.grid import Cell
from klab.grid.engines import refuse_unsupported
from klab.grid.schema.training import TrainingSection
from klab.harness.engines.trl.cell import make_trainer, reset_accelerate, save_policy
from klab.harness.engines.trl.recorder import take_or_leave_step
from klab.harness.engines.trl.rollout_trainer import TEXT, TRUNCATED
from klab.harness.engines.trl.settings import check_fields
from klab.harness.engines.trl.trainer import KlabTrainer
from klab.harness.engines.trl.turns import complete_turns
from klab.harness.policy.hf import peft
from klab.harness.policy.preferences import starting_point
from klab.harness.policy.rollout import Rollout
from klab.harness.training.data.group_filtering import drop_zero_variance
from klab.harness.training.distributed.process_group import SINGLE_PROCESS
from klab.harness.training.forward import Models
from klab.harness.training.loss import compute_gradients
from klab.harness.training.optim.optimizer import norm
from klab.harness.training.pack import Pack
from klab.harness.training.packed_cell import PackedCell
from klab.harness.training.runtime.timer import PhaseTimer

Weights = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Difference:
    """Of one update.

    Attributes:
        loss_klab, loss_trl: the two losses.
        gradient: ‖g_klab − g_trl‖/‖g_klab‖ of the clipped gradients.
        weights: ‖w_klab − w_trl‖ after the update, relative to the distance that klab's weights have gone.
    """

    update: int
    loss_klab: float
    loss_trl: float
    gradient: float
    weights: float


@dataclass(frozen=True, slots=True)
class _Trace:
    """What one engine did, update by update."""

    losses: list[float]
    gradients: list[Weights]
    weights: list[Weights]


def crosscheck(cell: Cell, updates: int, dtype: str, processes: int = 1) -> list[Difference]:
    """Train a cell for some updates on both engines.

    Args:
        dtype: precision of both.
        processes: that train together on TRL, of which this is one; klab's engine does the same in each.

    Returns:
        the differences; none where this is not the first process.

    Raises:
        UserError: the cell has settings that TRL has no place for, or TRL is not installed.
    """
    shared: dict[str, Any] = {"updates": updates, "minibatches": 1, "sampler": None, "old_logprobs": "sampler"}
    sections = [cell.training.model_copy(update={**shared, "engine": engine}) for engine in ("klab", "trl")]
    policy = cell.policy.model_copy(update={"dtype": dtype})
    refuse_unsupported(sections[1], policy, cell.objective)
    check_fields(sections[1])
    with tempfile.TemporaryDirectory(prefix="klab-crosscheck-") as scratch:
        folder = Path(scratch)
        task, start = starting_point(cell.task, policy, cell.seed, folder / "policies")
        ours, theirs = (PackedCell(replace(cell, policy=policy, training=section), task, start) for section in sections)
        initial, rollouts, mine = _train_on_klab(ours, folder / "klab")
        other = _train_on_trl(theirs, initial, rollouts, folder / "trl", processes)
    return [
        Difference(
            number + 1,
            mine.losses[number],
            other.losses[number],
            _distance(mine.gradients[number], other.gradients[number]) / _size(mine.gradients[number]),
            _distance(mine.weights[number], other.weights[number]) / _distance(mine.weights[number], initial),
        )
        for number in range(updates)
        if other.weights[number]
    ]


def _train_on_klab(member: PackedCell, folder: Path) -> tuple[Weights, list[Rollout], _Trace]:
    """The weights at the start, every rollout, and what was done with them."""
    pack, trace, rollouts = Pack([member]), _Trace([], [], []), list[Rollout]()
    initial = _saved(pack, folder)
    clip = member.cell.training.clip_norm
    while not pack.finished:
        pack.collect_due_rollouts()
        experience = pack.pending[0][0]
        if len(rollouts) == experience.number:
            rollouts.append(experience.rollout)
        pack.optimizer.clear()
        compute_gradients(
            Models(pack.policy, pack.reference),
            pack.settings,
            pack.members,
            [drop_zero_variance(member, experience)],
            pack.coefficients,
            pack.done + 1,
            False,
            PhaseTimer(),
            pack.budget,
            SINGLE_PROCESS,
        )
        length = float(norm(pack.optimizer.gradients()[0]))
        scale = 1.0 if clip is None or length <= clip else clip / length
        gradients = {
            name: scale * weight.grad for name, weight in pack.policy.parameters.items() if weight.grad is not None
        }
        pack.optimizer.clear()
        trace.gradients.append(_saved(pack, folder, gradients))
        (row,) = pack.advance()
        trace.losses.append(_number(row["loss"]))
        trace.weights.append(_saved(pack, folder))
    return initial, rollouts, trace


def _train_on_trl(
    member: PackedCell, initial: Weights, rollouts: Sequence[Rollout], folder: Path, processes: int
) -> _Trace:
    trace = _Trace([], [], [])
    try:
        replay = _Replay(member.cell.training, rollouts)
        trainer = make_trainer(member, folder, processes, rollout_function=replay)
        if member.cell.policy.lora is not None:
            _load_adapters(trainer, initial)
        trainer.add_callback(_Tracer(trainer, trace, folder / "saved"))
        trainer.train()
    finally:
        reset_accelerate()
    return trace


class _Replay:
    """A rollout function that gives TRL what klab's own engine drew; greedy completions are TRL's own."""

    def __init__(self, training: TrainingSection, rollouts: Sequence[Rollout]) -> None:
        self._steps, self._rollouts = training.optimizer_steps_per_rollout, rollouts

    def __call__(self, prompts: list[str], trainer: KlabTrainer) -> dict[str, Any]:
        if trainer.is_greedy:
            return complete_turns(prompts, trainer)
        rollout = self._rollouts[trainer.state.global_step // self._steps]
        lengths = rollout.present.sum(1).tolist()
        first = trainer.group.rank * len(prompts)
        rows = range(first, first + len(prompts))
        return {
            "prompt_ids": [list(rollout.prompts[row // rollout.group_size]) for row in rows],
            "completion_ids": [rollout.tokens[row, : lengths[row]].tolist() for row in rows],
            "logprobs": None,
            "env_mask": [rollout.mask[row, : lengths[row]].int().tolist() for row in rows],
            TEXT: [rollout.texts[row] for row in rows],
            TRUNCATED: [bool(rollout.truncated[row]) for row in rows],
        }


class _Tracer(TrainerCallback):
    """Notes losses, gradients and weights of TRL's updates."""

    def __init__(self, trainer: KlabTrainer, trace: _Trace, folder: Path) -> None:
        self._trainer, self._trace, self._folder = trainer, trace, folder

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> Any:
        named = self._trainer.model.named_parameters()
        gradients = {name: weight.grad.clone() for name, weight in named if weight.grad is not None}
        take_or_leave_step(self._trainer, given["optimizer"])
        self._trace.gradients.append(self._saved(gradients))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        self._trace.losses.append(_number(self._trainer.close_update()["loss"]))
        self._trace.weights.append(self._saved())

    @torch.no_grad()
    def _saved(self, values: Mapping[str, Tensor] | None = None) -> Weights:
        """The trained weights, or other values in their place, as a checkpoint names them."""
        own = {name: weight for name, weight in self._trainer.model.named_parameters() if weight.requires_grad}
        before = {name: weight.detach().clone() for name, weight in own.items()}
        for name, weight in own.items() if values is not None else ():
            weight.copy_((values or {}).get(name, torch.zeros_like(weight)))
        save_policy(self._trainer, self._folder)
        for name, weight in own.items():
            weight.copy_(before[name])
        return _read(self._folder) if self._trainer.group.is_main else {}


@torch.no_grad()
def _saved(pack: Pack, folder: Path, values: Mapping[str, Tensor] | None = None) -> Weights:
    """The weights of a pack's only cell, or other values in their place, as a checkpoint names them."""
    own = pack.policy.parameters
    before = {name: weight.detach().clone() for name, weight in own.items()}
    for name, weight in own.items() if values is not None else ():
        weight.copy_((values or {}).get(name, torch.zeros_like(weight)))
    pack.policy.save(folder, 0)
    for name, weight in own.items():
        weight.copy_(before[name])
    return _read(folder)


def _read(folder: Path) -> Weights:
    return {name: value.double() for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


@torch.no_grad()
def _load_adapters(trainer: KlabTrainer, initial: Weights) -> None:
    adapters = {name: weight for name, weight in trainer.model.named_parameters() if peft.is_adapter(name)}
    for name, weight in adapters.items():
        weight.copy_(initial[name.replace(".default.", ".")])


def _distance(left: Weights, right: Weights) -> float:
    """The Euclidean distance over the tensors that both have: a checkpoint may hold a tied one twice."""
    names = left.keys() & right.keys()
    return float(torch.stack([(left[name] - right[name]).square().sum() for name in names]).sum().sqrt())


def _size(weights: Weights) -> float:
    return max(1e-300, _distance(weights, {name: torch.zeros_like(value) for name, value in weights.items()}))


def _number(value: float | None) -> float:
    return float("nan") if value is None else value
