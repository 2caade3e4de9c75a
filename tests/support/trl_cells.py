"""Cells on TRL in memory: a small model's trainer, updates made by hand, and the same gradient by another path."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from klab.grid import Cell, Objective, parse_grid
from klab.harness.engines.trl.cell import make_trainer
from klab.harness.engines.trl.trainer import KlabTrainer
from klab.harness.objective import objective_loss
from klab.harness.policy.hf.policy import TransformersPolicy
from klab.harness.policy.scores import token_scores
from klab.harness.training.forward import ForwardPass
from klab.harness.training.loss import token_batch
from klab.harness.training.packed_cell import PackedCell
from klab.tasks import load_task

TRAINING: dict[str, Any] = {
    "engine": "trl",
    "updates": 4,
    "prompts": 4,
    "group_size": 3,
    "max_new_tokens": 4,
    "lr": 0.05,
}


ROOT = Path(__file__).parents[2]


def rank_environment() -> dict[str, str]:
    """The environment of processes that train cells of `letters_task`."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support")])
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def trl_cell(policy: Path, objective: dict[str, Any] | None = None, **training: Any) -> Cell:
    """A cell of the task `letters_task:Letters`."""
    grid = {
        "name": "trl",
        "task": {"name": f"letters_task:{training.pop('task', 'Letters')}"},
        "policy": {"name": "hf", "model": str(policy), "dtype": training.pop("dtype", "float64")},
        "training": {**TRAINING, **training},
        "objective": objective or {},
    }
    return parse_grid(json.dumps(grid), "trl.yaml").cells[0]


def trainer_of(cell: Cell, policy: Path, folder: Path, **more: Any) -> KlabTrainer:
    """The trainer of a cell before its first update; its policy is not its reference any more."""
    trainer = make_trainer(PackedCell(cell, load_task(cell.task), policy), folder, **more)
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    drift(trainer, 1)
    return trainer


def drift(trainer: KlabTrainer, seed: int) -> None:
    """Change the policy, as updates do."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in trainer.model.parameters():
            if weight.requires_grad:
                weight += 0.1 * torch.randn(weight.shape, generator=generator, dtype=weight.dtype)


def draw_rollout(trainer: KlabTrainer) -> None:
    """Let TRL generate what the next updates are made on."""
    trainer.model.train()
    trainer._buffered_inputs = None
    trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))


def with_objective(trainer: KlabTrainer, objective: Objective) -> None:
    """Train for another objective from now on, on the rollout that there is."""
    trainer.member = replace(trainer.member, cell=replace(trainer.member.cell, objective=objective))


def trl_gradient(trainer: KlabTrainer) -> Tensor:
    """The gradient of one update, micro-batch by micro-batch, as one vector."""
    trainer.model.zero_grad()
    trainer._step = 0
    for _ in range(trainer.current_gradient_accumulation_steps):
        inputs = trainer._buffered_inputs[trainer._step % trainer.args.steps_per_generation]
        loss = trainer._compute_loss(trainer.model, inputs)
        loss.backward()
        trainer._step += 1
    trainer._update = None
    return _flat(trainer.model)


@cache
def _policy(folder: Path, role: str) -> TransformersPolicy:
    return TransformersPolicy.from_pretrained(folder, dtype=torch.float64)


def plain_gradient(trainer: KlabTrainer, policy: Path) -> Tensor:
    """The gradient of `objective_loss` on the same rollout: right-padded, whole, through klab's view of the model."""
    own, reference = _policy(policy, "trained"), _policy(policy, "reference")
    state = dict(trainer.model.named_parameters())
    with torch.no_grad():
        for name, value in own.parameters.items():
            value.copy_(state[name][None])
    experience, member = trainer.experience, trainer.member
    assert experience is not None
    full = member.needs_logits
    bonus = member.needs_entropy_gradient
    asked = {"temperature": trainer.temperature, "logits": full, "entropy": True, "entropy_gradient": bonus}
    scores = token_scores(own, [experience.rollout], **asked)[0]
    with torch.no_grad():
        other = token_scores(reference, [experience.rollout], temperature=trainer.temperature, logits=full)[0]
    assert scores.entropy is not None
    computed = ForwardPass(scores.logp, scores.entropy, scores.logits, other.logits)
    batch = token_batch(member, replace(experience, reference_logprobs=other.logp), computed)
    loss = objective_loss(member.cell.objective, batch).loss
    names = list(own.parameters)
    found = torch.autograd.grad(loss, [own.parameters[name] for name in names], materialize_grads=True)
    by_name = dict(zip(names, found, strict=True))
    return torch.cat([by_name[name].flatten() for name in state if name in by_name])


def _flat(model: Any) -> Tensor:
    return torch.cat(
        [
            (torch.zeros_like(weight) if weight.grad is None else weight.grad).flatten()
            for weight in model.parameters()
            if weight.requires_grad
        ]
    )
