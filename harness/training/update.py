"""One optimizer update of every cell of a pack: forward, loss, backward, clip, step.

The loss is computed cell by cell on `[N, T]` log-probabilities, backward runs once for the whole pack, clipping and
AdamW run on each cell's slice. Cutting a minibatch into micro-batches does not change the gradient: whatever
belongs to the whole update (advantages, denominators, an adaptive exponent) is computed first, from
log-probabilities obtained without a graph.

Where every importance ratio is 1 by construction (one update per rollout, no lag), the behaviour policy's
log-probabilities are the current ones, detached: the ratio is then exactly 1, not 1 up to the rounding between a
cached decoding step and a full forward pass. Everywhere else they are those that the sampler kept, or, where it is a
sampler of its own (`data/sampler_mismatch.py`), those that the trainer computed when the rollout was drawn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from klab.grid.schema.sections import Sampler
from klab.harness.objective import LossCoefficients, TokenBatch, UpdateContext, objective_loss, update_context
from klab.harness.training.data.group_filtering import has_no_loss_tokens
from klab.harness.training.data.overlong import excluded_rows, training_rewards
from klab.harness.training.data.rollouts import Experience
from klab.harness.training.data.sampler_mismatch import correction_weights
from klab.harness.training.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from klab.harness.training.forward import ForwardPass, Models, concat_passes, forward_pass
from klab.harness.training.metrics import Row, update_row
from klab.harness.training.microbatch import UNLIMITED, MemoryBudget, PackMicroBatch, is_padding, pack_micro_batches
from klab.harness.training.optim.critic import Critics, ValueStats
from klab.harness.training.optim.kl_controller import coefficient_metrics
from klab.harness.training.optim.optimizer import StackedAdamW, norm
from klab.harness.training.optim.schedule import learning_rate
from klab.harness.training.packed_cell import CellFailure, PackedCell
from klab.harness.training.runtime.timer import PhaseTimer

_ALL = slice(None)


@dataclass(slots=True)
class CellLoss:
    """One cell's loss, as a number, the objective's metrics, the entropy [N, T] of the policy before the update, and
    what it said about the critic."""

    loss: float
    metrics: dict[str, float]
    entropy: Tensor
    value_stats: ValueStats | None = None


def update(
    models: Models,
    optimizer: StackedAdamW,
    members: Sequence[PackedCell],
    minibatches: Sequence[Experience],
    coefficients: Sequence[LossCoefficients],
    number: int,
    timer: PhaseTimer,
    budget: MemoryBudget = UNLIMITED,
    process_group: ProcessGroup = SINGLE_PROCESS,
) -> list[Row]:
    """Update number `number` (1-based) of every cell on its minibatch, in place; one row of metrics per cell.

    A cell whose loss or gradient, or that of its critic, is not finite keeps all weights and moments, and its row says
    `nonfinite`. While a critic learns alone its policy is left as it is; the row says `lr` 0. So is a cell with nothing
    in its loss (see `data/group_filtering.py`).

    Args:
        budget: what may go through a policy at once; it does not change the gradient.
        process_group: the processes that make this update together, on the same minibatches; each works on some of the
            micro-batches, and all take the same step.

    Raises:
        CellFailure: where a cell's objective raises. Nothing has been changed then.
    """
    critics = models.critics
    critic_only = critics is not None and critics.in_warmup(number)
    optimizer.clear()
    if critics is not None:
        critics.optimizer.clear()
    every = pack_micro_batches([m.rollout for m in minibatches], budget, process_group)
    if process_group.size == 1 and len(every) == 1:
        results = _whole(models, members, minibatches, coefficients, critic_only, timer)
    else:
        results = _in_pieces(models, members, minibatches, coefficients, critic_only, every, timer, process_group)
    rows = []
    with timer("step"):
        critic_parameters = {} if critics is None else critics.optimizer.parameters
        process_group.sum_gradients([*optimizer.parameters.values(), *critic_parameters.values()])
        gradients = optimizer.gradients()
        norms = torch.stack([norm(slices) for slices in gradients]).tolist()
        critic_gradients = None if critics is None else critics.gradients()
        for c, (member, result) in enumerate(zip(members, results, strict=True)):
            lr = 0.0 if critic_only else learning_rate(member.cell.training, number)
            sound = math.isfinite(result.loss) and math.isfinite(norms[c])
            learns = not has_no_loss_tokens(member, minibatches[c])
            more = coefficient_metrics(member.cell, coefficients[c])
            if critics is not None and critic_gradients is not None and result.value_stats is not None:
                sound = sound and result.value_stats.is_finite(critic_gradients[c])
                more |= result.value_stats.row(critic_gradients[c])
                if sound and learns:
                    critics.step(c, critic_gradients[c], number)
            if sound and learns and not critic_only:
                optimizer.step(c, gradients[c], lr, norms[c])
            rows.append(
                update_row(
                    update=number,
                    experience=minibatches[c],
                    entropy=result.entropy,
                    loss=result.loss,
                    metrics=result.metrics,
                    gradient_norm=norms[c],
                    lr=lr,
                    nonfinite=not sound,
                )
                | more
            )
        optimizer.clear()
        if critics is not None:
            critics.optimizer.clear()
    return rows


def _whole(
    models: Models,
    members: Sequence[PackedCell],
    minibatches: Sequence[Experience],
    coefficients: Sequence[LossCoefficients],
    critic_only: bool,
    timer: PhaseTimer,
) -> list[CellLoss]:
    with timer("forward"):
        passes = forward_pass(models, members, [m.rollout for m in minibatches], critic_only)
        losses, results = [], []
        for c, member in enumerate(members):
            batch = _batch(member, minibatches[c], passes[c])
            context = _context(c, member, minibatches[c], batch, coefficients[c])
            loss, metrics = _loss(c, member, batch, context)
            losses += [loss, *_value_losses(models.critics, passes[c], batch, context)]
            value_stats = _value_stats(models.critics, passes[c], batch, context)
            results.append(CellLoss(float(loss.detach()), metrics, passes[c].entropy.detach(), value_stats))
    with timer("backward"):
        _backward(losses)
    return results


def _in_pieces(
    models: Models,
    members: Sequence[PackedCell],
    minibatches: Sequence[Experience],
    coefficients: Sequence[LossCoefficients],
    critic_only: bool,
    every: Sequence[PackMicroBatch],
    timer: PhaseTimer,
    process_group: ProcessGroup,
) -> list[CellLoss]:
    mine = process_group.assigned(len(every))
    kept = process_group.size > 1 and len(mine) == 1  # the graph of a single piece, which spares its second pass
    with timer("forward"), torch.set_grad_enabled(kept):
        found = {place: forward_pass(models, members, [r for r, _ in every[place]], critic_only) for place in mine}
    with timer("forward"), torch.no_grad():
        passes: dict[int, list[ForwardPass]] = {}
        for part in process_group.all_gather_object("log-probabilities", lambda: found, models.policy.device):
            passes |= part
        contexts, results = [], []
        for c, member in enumerate(members):
            joined = concat_passes([passes[place][c] for place, turn in enumerate(every) if not is_padding(turn[c])])
            batch = _batch(member, minibatches[c], joined)
            contexts.append(_context(c, member, minibatches[c], batch, coefficients[c]))
            loss, metrics = _loss(c, member, batch, contexts[c])
            value_stats = _value_stats(models.critics, joined, batch, contexts[c])
            results.append(CellLoss(float(loss), metrics, joined.entropy, value_stats))
        passes.clear()
        if not kept:
            found.clear()
    for turn in map(every.__getitem__, mine):
        with timer("forward"):
            forwards = found.popitem()[1] if kept else forward_pass(models, members, [r for r, _ in turn], critic_only)
            losses = []
            for c, member in enumerate(members):
                if is_padding(turn[c]):
                    continue
                rows = turn[c][1]
                batch = _batch(member, minibatches[c], forwards[c], rows)
                context = contexts[c].rows(rows)
                loss, _ = _loss(c, member, batch, context, measure=False)
                losses += [loss, *_value_losses(models.critics, forwards[c], batch, context)]
        with timer("backward"):
            _backward(losses)
    return results


def _batch(member: PackedCell, experience: Experience, passed: ForwardPass, rows: slice = _ALL) -> TokenBatch:
    rollout, training = experience.rollout, member.cell.training
    sampler, out, factors = training.sampler, excluded_rows(member, rollout), None
    if sampler is not None and experience.old_logprobs is not None:
        factors = correction_weights(sampler, experience.old_logprobs, rollout.logp)
    return TokenBatch(
        logp=passed.logp,
        logp_behaviour=passed.logp.detach() if training.on_policy else _behaviour(experience, sampler)[rows],
        logp_reference=experience.reference_logprobs[rows],
        mask=rollout.mask[rows],
        rewards=training_rewards(member, rollout, experience.rewards)[rows],
        groups=rollout.groups[rows],
        max_new_tokens=member.max_new_tokens,
        logits=passed.logits,
        logits_reference=passed.logits_reference,
        greedy_rewards=None if experience.greedy_rewards is None else experience.greedy_rewards[rows],
        values=None if experience.values is None else experience.values[rows],
        correction=None if factors is None else factors[rows],
        excluded_from_loss=None if out is None else out[rows],
    )


def _behaviour(experience: Experience, sampler: Sampler | None) -> Tensor:
    """log π_old [N, T]: the trainer's own where another sampler drew the tokens, unless the ratio is to that one."""
    recomputed = experience.old_logprobs
    return (
        experience.rollout.logp
        if recomputed is None or sampler is None or sampler.correction == "ratio"
        else recomputed
    )


def _loss(
    position: int, member: PackedCell, batch: TokenBatch, context: UpdateContext, measure: bool = True
) -> tuple[Tensor, dict[str, float]]:
    try:
        out = objective_loss(member.cell.objective, batch, context)
        return out.loss, out.metrics if measure else {}
    except Exception as error:
        raise CellFailure(position, f"the objective raised {type(error).__name__}: {error}") from error


def _value_losses(
    critics: Critics | None, passed: ForwardPass, batch: TokenBatch, context: UpdateContext
) -> list[Tensor]:
    return [] if critics is None or passed.values is None else [critics.loss(passed.values, batch, context)]


def _value_stats(
    critics: Critics | None, passed: ForwardPass, batch: TokenBatch, context: UpdateContext
) -> ValueStats | None:
    return None if critics is None or passed.values is None else critics.value_stats(passed.values, batch, context)


def _context(
    position: int, member: PackedCell, experience: Experience, batch: TokenBatch, coefficients: LossCoefficients
) -> UpdateContext:
    try:
        return update_context(member.cell.objective, batch, coefficients, experience.rollout.grouping)
    except Exception as error:
        raise CellFailure(position, f"the objective raised {type(error).__name__}: {error}") from error


def _backward(losses: Sequence[Tensor]) -> None:
    """One backward pass for all cells. A loss without a graph (no own tokens) has a gradient of zero."""
    torch.autograd.backward([loss for loss in losses if loss.requires_grad])
