"""One optimizer update of every cell of a pack: gradients, then steps.

An update happens once or not at all. Everything that can fail or that allocates memory (forward, backward, sums over
processes, norms, the rows of metrics, the buffer for 16-bit gradients) comes first; then every cell's policy and
critic take their prepared steps in place. So an update that ran out of memory can simply be made again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from klab.harness.objective import LossCoefficients
from klab.harness.training.data.experience import Experience
from klab.harness.training.data.group_filtering import has_no_loss_tokens
from klab.harness.training.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from klab.harness.training.forward import Models
from klab.harness.training.loss import compute_gradients
from klab.harness.training.metrics import Row, update_row
from klab.harness.training.microbatch import UNLIMITED, MemoryBudget
from klab.harness.training.optim.kl_controller import coefficient_metrics
from klab.harness.training.optim.optimizer import PreparedStep, StackedAdamW
from klab.harness.training.optim.schedule import learning_rate
from klab.harness.training.pack_settings import PackSettings
from klab.harness.training.packed_cell import PackedCell
from klab.harness.training.runtime.timer import PhaseTimer


def update(
    models: Models,
    optimizer: StackedAdamW,
    settings: PackSettings,
    members: Sequence[PackedCell],
    minibatches: Sequence[Experience],
    coefficients: Sequence[LossCoefficients],
    number: int,
    timer: PhaseTimer,
    budget: MemoryBudget = UNLIMITED,
    process_group: ProcessGroup = SINGLE_PROCESS,
) -> list[Row]:
    """Make update `number` (1-based) of every cell on its minibatch, in place; one row of metrics per cell.

    A cell whose loss or gradient, or that of its critic, is not finite keeps all weights and moments, and its row says
    `nonfinite`. During critic warm-up the policy is left as it is, and the row says `lr` 0. A cell without tokens in
    its loss takes no step either (see `data/group_filtering.py`).

    Args:
        budget: what may go through a policy at once; it does not change the gradient.
        process_group: the processes that make this update together, on the same minibatches; each works on some of the
            micro-batches, and all take the same step.

    Raises:
        CellFailure: where a cell's objective raises. Whatever is raised, no weight, moment or count has changed.
    """
    critics = models.critics
    critic_only = critics is not None and critics.in_warmup(number)
    optimizers = [optimizer] if critics is None else [optimizer, critics.optimizer]
    for each in optimizers:
        each.clear()
    results = compute_gradients(
        models, settings, members, minibatches, coefficients, number, critic_only, timer, budget, process_group
    )
    with timer("step"):
        process_group.sum_gradients([parameter for each in optimizers for parameter in each.replicated])
        gradients = optimizer.gradients()
        norms = optimizer.gradient_norms(gradients)
        critic_gradients = None if critics is None else critics.gradients()
        rows: list[Row] = []
        steps: list[tuple[StackedAdamW, PreparedStep]] = []
        for c, (member, result) in enumerate(zip(members, results, strict=True)):
            lr = 0.0 if critic_only else learning_rate(member.cell.training, number)
            finite = math.isfinite(result.loss) and math.isfinite(norms[c])
            learns = not has_no_loss_tokens(member, minibatches[c])
            more = coefficient_metrics(member.cell, coefficients[c])
            if critics is not None and critic_gradients is not None and result.value_stats is not None:
                finite = finite and result.value_stats.is_finite(critic_gradients[c])
                more |= result.value_stats.row(critic_gradients[c])
                if finite and learns:
                    steps.append((critics.optimizer, critics.prepare_step(c, critic_gradients[c], number)))
            if finite and learns and not critic_only:
                steps.append((optimizer, optimizer.prepare_step(c, gradients[c], lr, norms[c])))
            rows.append(
                update_row(
                    update=number,
                    experience=minibatches[c],
                    entropy=result.entropy,
                    loss=result.loss,
                    metrics=result.metrics,
                    gradient_norm=norms[c],
                    lr=lr,
                    nonfinite=not finite,
                )
                | more
            )
        for each, step in steps:
            each.apply_step(step)
        for each in optimizers:
            each.clear()
    return rows
