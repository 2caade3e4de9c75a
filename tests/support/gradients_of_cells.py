"""The first gradient of every cell of a run, whose model is loaded once; in one process or several."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from klab.harness.policy.hf.sharded import ShardedPolicy
from klab.harness.store import Run
from klab.harness.training.data.rollouts import collect_rollouts
from klab.harness.training.distributed.commands import CommandChannel
from klab.harness.training.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from klab.harness.training.forward import Models
from klab.harness.training.loss import compute_gradients
from klab.harness.training.pack import Pack
from klab.harness.training.packed_cell import PackedCell
from klab.harness.training.runtime.timer import PhaseTimer
from klab.tasks import load_task


def gradients(run: Run, process_group: ProcessGroup = SINGLE_PROCESS) -> dict[str, dict[str, Tensor]]:
    """By cell and parameter, summed over the processes. The cells differ in their objectives only."""
    cells = [run.cell(identity).cell() for identity in run.cells]
    members = [PackedCell(cell, load_task(cell.task), Path(cell.policy.model)) for cell in cells]  # type: ignore[union-attr]
    pack = Pack(members[:1], CommandChannel(process_group))
    found = {}
    for member in members:
        timer, models = PhaseTimer(), Models(pack.policy, pack.reference)
        with torch.no_grad():
            _shake(pack)
            drawn = collect_rollouts(
                pack.settings, [member], pack.policy, pack.reference, 0, timer, process_group=process_group
            )
        pack.optimizer.clear()
        compute_gradients(
            models, pack.settings, [member], drawn, pack.coefficients, 1, False, timer, pack.budget, process_group
        )
        process_group.sum_gradients(pack.optimizer.replicated)
        found[member.id] = {name: _whole(value.grad) for name, value in pack.policy.parameters.items()}
    return found


def _shake(pack: Pack) -> None:
    """Move the policy away from its reference, once, so that no KL term is 0."""
    with torch.no_grad():
        for value in pack.policy.parameters.values():
            if pack.done == 0:
                whole = _whole(value)
                moved = whole + 0.05 * torch.linspace(-1, 1, whole.numel(), dtype=whole.dtype).sin().view(whole.shape)
                own = moved.unsqueeze(0) if not isinstance(pack.policy, ShardedPolicy) else _like(moved, value)
                value.copy_(own)
    pack.done = 1


def _like(whole: Tensor, value: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(value, DTensor)
    return distribute_tensor(whole, value.device_mesh, value.placements)


def _whole(value: Tensor | None) -> Tensor:
    assert value is not None
    return value.full_tensor().detach() if hasattr(value, "full_tensor") else value[0].detach()
