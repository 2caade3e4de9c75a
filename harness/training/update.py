"""One optimizer update of every cell of a pack: forward, loss, backward, clip, step.

The loss is computed cell by cell on `[N, T]` log-probabilities, backward runs once for the whole pack, clipping and
AdamW run on each cell's slice. Cutting a minibatch into micro-batches does not change the gradient: whatever
belongs to the whole update (advantages, denominators, an adaptive exponent) is computed first, from
log-probabilities obtained without a graph.

Where every importance ratio is 1 by construction (one update per rollout, no lag), the behaviour policy's
log-probabilities are the current ones, detached: the ratio is then exactly 1, not 1 up to the rounding between a
cached decoding step and a full forward pass. Everywhere else they are those that the sampler kept, or, where it is a
sampler of its own (`sampling.py`), those that the trainer computed when the rollout was drawn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from klab.grid.schema.sections import Sampler
from klab.harness.objective import LossCoefficients, TokenBatch, UpdateContext, objective_loss, update_context
from klab.harness.training.data.group_filtering import silent
from klab.harness.training.data.overlong import left_out, training_rewards
from klab.harness.training.data.rollouts import Experience
from klab.harness.training.data.sampler_mismatch import correction
from klab.harness.training.distributed.process_group import ALONE, World
from klab.harness.training.forward import Forward, Models, forward, join
from klab.harness.training.metrics import Row, update_row
from klab.harness.training.microbatch import WHOLE, Limit, Turn, empty, turns
from klab.harness.training.optim.critic import Critics, Lesson
from klab.harness.training.optim.kl_controller import figures
from klab.harness.training.optim.optimizer import StackedAdamW, norm
from klab.harness.training.optim.schedule import learning_rate
from klab.harness.training.packed_cell import CellFailure, Member
from klab.harness.training.runtime.timer import Stopwatch

_ALL = slice(None)


@dataclass(slots=True)
class Result:
    """One cell's loss, as a number, the objective's metrics, the entropy [N, T] of the policy before the update, and
    what it said about the critic."""

    loss: float
    metrics: dict[str, float]
    entropy: Tensor
    lesson: Lesson | None = None


def update(
    models: Models,
    optimizer: StackedAdamW,
    members: Sequence[Member],
    minibatches: Sequence[Experience],
    coefficients: Sequence[LossCoefficients],
    number: int,
    watch: Stopwatch,
    limit: Limit = WHOLE,
    world: World = ALONE,
) -> list[Row]:
    """Update number `number` (1-based) of every cell on its minibatch, in place; one row of metrics per cell.

    A cell whose loss or gradient, or that of its critic, is not finite keeps all weights and moments, and its row says
    `nonfinite`. While a critic learns alone its policy is left as it is; the row says `lr` 0. So is a cell with nothing
    in its loss (see `selection.py`).

    Args:
        limit: what may go through a policy at once; it does not change the gradient.
        world: the processes that make this update together, on the same minibatches; each works on some of the
            micro-batches, and all take the same step.

    Raises:
        CellFailure: where a cell's objective raises. Nothing has been changed then.
    """
    critics = models.critics
    alone = critics is not None and critics.alone(number)
    optimizer.clear()
    if critics is not None:
        critics.optimizer.clear()
    every = turns([m.rollout for m in minibatches], limit, world)
    if world.size == 1 and len(every) == 1:
        results = _whole(models, members, minibatches, coefficients, alone, watch)
    else:
        results = _in_pieces(models, members, minibatches, coefficients, alone, every, watch, world)
    rows = []
    with watch("step"):
        taught_parameters = {} if critics is None else critics.optimizer.parameters
        world.sum_gradients([*optimizer.parameters.values(), *taught_parameters.values()])
        gradients = optimizer.gradients()
        norms = torch.stack([norm(slices) for slices in gradients]).tolist()
        taught = None if critics is None else critics.gradients()
        for c, (member, result) in enumerate(zip(members, results, strict=True)):
            lr = 0.0 if alone else learning_rate(member.cell.training, number)
            sound = math.isfinite(result.loss) and math.isfinite(norms[c])
            learns = not silent(member, minibatches[c])
            more = figures(member.cell, coefficients[c])
            if critics is not None and taught is not None and result.lesson is not None:
                sound = sound and result.lesson.sound(taught[c])
                more |= result.lesson.row(taught[c])
                if sound and learns:
                    critics.step(c, taught[c], number)
            if sound and learns and not alone:
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
    members: Sequence[Member],
    minibatches: Sequence[Experience],
    coefficients: Sequence[LossCoefficients],
    alone: bool,
    watch: Stopwatch,
) -> list[Result]:
    with watch("forward"):
        passes = forward(models, members, [m.rollout for m in minibatches], alone)
        losses, results = [], []
        for c, member in enumerate(members):
            batch = _batch(member, minibatches[c], passes[c])
            context = _context(c, member, minibatches[c], batch, coefficients[c])
            loss, metrics = _loss(c, member, batch, context)
            losses += [loss, *_value_losses(models.critics, passes[c], batch, context)]
            lesson = _lesson(models.critics, passes[c], batch, context)
            results.append(Result(float(loss.detach()), metrics, passes[c].entropy.detach(), lesson))
    with watch("backward"):
        _backward(losses)
    return results


def _in_pieces(
    models: Models,
    members: Sequence[Member],
    minibatches: Sequence[Experience],
    coefficients: Sequence[LossCoefficients],
    alone: bool,
    every: Sequence[Turn],
    watch: Stopwatch,
    world: World,
) -> list[Result]:
    mine = world.turns(len(every))
    kept = world.size > 1 and len(mine) == 1  # the graph of a single piece, which spares its second pass
    with watch("forward"), torch.set_grad_enabled(kept):
        found = {place: forward(models, members, [r for r, _ in every[place]], alone) for place in mine}
    with watch("forward"), torch.no_grad():
        passes: dict[int, list[Forward]] = {}
        for part in world.exchange("log-probabilities", lambda: found, models.policy.device):
            passes |= part
        contexts, results = [], []
        for c, member in enumerate(members):
            joined = join([passes[place][c] for place, turn in enumerate(every) if not empty(turn[c])])
            batch = _batch(member, minibatches[c], joined)
            contexts.append(_context(c, member, minibatches[c], batch, coefficients[c]))
            loss, metrics = _loss(c, member, batch, contexts[c])
            lesson = _lesson(models.critics, joined, batch, contexts[c])
            results.append(Result(float(loss), metrics, joined.entropy, lesson))
        passes.clear()
        if not kept:
            found.clear()
    for turn in map(every.__getitem__, mine):
        with watch("forward"):
            forwards = found.popitem()[1] if kept else forward(models, members, [r for r, _ in turn], alone)
            losses = []
            for c, member in enumerate(members):
                if empty(turn[c]):
                    continue
                rows = turn[c][1]
                batch = _batch(member, minibatches[c], forwards[c], rows)
                context = contexts[c].rows(rows)
                loss, _ = _loss(c, member, batch, context, measure=False)
                losses += [loss, *_value_losses(models.critics, forwards[c], batch, context)]
        with watch("backward"):
            _backward(losses)
    return results


def _batch(member: Member, experience: Experience, forward: Forward, rows: slice = _ALL) -> TokenBatch:
    rollout, training = experience.rollout, member.cell.training
    sampler, out, factors = training.sampler, left_out(member, rollout), None
    if sampler is not None and experience.recomputed is not None:
        factors = correction(sampler, experience.recomputed, rollout.logp)
    return TokenBatch(
        logp=forward.logp,
        logp_behaviour=forward.logp.detach() if training.on_policy else _behaviour(experience, sampler)[rows],
        logp_reference=experience.reference[rows],
        mask=rollout.mask[rows],
        rewards=training_rewards(member, rollout, experience.rewards)[rows],
        groups=rollout.groups[rows],
        max_new_tokens=member.max_new_tokens,
        logits=forward.logits,
        logits_reference=forward.logits_reference,
        greedy_rewards=None if experience.greedy is None else experience.greedy[rows],
        values=None if experience.values is None else experience.values[rows],
        correction=None if factors is None else factors[rows],
        excluded_from_loss=None if out is None else out[rows],
    )


def _behaviour(experience: Experience, sampler: Sampler | None) -> Tensor:
    """log π_old [N, T]: the trainer's own where another sampler drew the tokens, unless the ratio is to that one."""
    recomputed = experience.recomputed
    return (
        experience.rollout.logp
        if recomputed is None or sampler is None or sampler.correction == "ratio"
        else recomputed
    )


def _loss(
    position: int, member: Member, batch: TokenBatch, context: UpdateContext, measure: bool = True
) -> tuple[Tensor, dict[str, float]]:
    try:
        out = objective_loss(member.cell.objective, batch, context)
        return out.loss, out.metrics if measure else {}
    except Exception as error:
        raise CellFailure(position, f"the objective raised {type(error).__name__}: {error}") from error


def _value_losses(critics: Critics | None, forward: Forward, batch: TokenBatch, context: UpdateContext) -> list[Tensor]:
    return [] if critics is None or forward.values is None else [critics.loss(forward.values, batch, context)]


def _lesson(critics: Critics | None, forward: Forward, batch: TokenBatch, context: UpdateContext) -> Lesson | None:
    return None if critics is None or forward.values is None else critics.lesson(forward.values, batch, context)


def _context(
    position: int, member: Member, experience: Experience, batch: TokenBatch, coefficients: LossCoefficients
) -> UpdateContext:
    try:
        return update_context(member.cell.objective, batch, coefficients, experience.rollout.grouping)
    except Exception as error:
        raise CellFailure(position, f"the objective raised {type(error).__name__}: {error}") from error


def _backward(losses: Sequence[Tensor]) -> None:
    """One backward pass for all cells. A loss without a graph (no own tokens) has a gradient of zero."""
    torch.autograd.backward([loss for loss in losses if loss.requires_grad])
