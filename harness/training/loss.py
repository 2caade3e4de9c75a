"""Losses and gradients of one update of a pack, whole or in micro-batches.

The loss is computed cell by cell on `[N, T]` log-probabilities; backward runs once per micro-batch for the whole pack.
Cutting a minibatch into micro-batches does not change the gradient: whatever belongs to the whole update (advantages,
denominators, an adaptive exponent) is computed first, from log-probabilities obtained without a graph. A minibatch
that fits is one micro-batch whose graph is kept, so that nothing is computed twice.

Where every importance ratio is 1 by construction (one update per rollout, no lag), the behaviour policy's
log-probabilities are the current ones, detached: the ratio is then exactly 1, not 1 up to the rounding between a
cached decoding step and a full forward pass. Everywhere else they are those that the sampler recorded, or, with a
sampler of its own (`data/sampler_mismatch.py`) or with `old_logprobs: trainer`, those that the trainer computed when
the rollout was drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from klab.harness.objective import LossCoefficients, TokenBatch, UpdateContext, objective_loss, update_context
from klab.harness.policy.hf.sharded import ShardedPolicy
from klab.harness.policy.rollout import Rollout
from klab.harness.training.data.experience import Experience, old_policy
from klab.harness.training.data.overlong import excluded_rows, training_rewards
from klab.harness.training.data.sampler_mismatch import correction_weights
from klab.harness.training.distributed.gathering import gathered
from klab.harness.training.distributed.process_group import ProcessGroup
from klab.harness.training.forward import ForwardPass, Models, concat_passes, forward_pass
from klab.harness.training.microbatch import (
    MemoryBudget,
    PackMicroBatch,
    idle_micro_batch,
    is_padding,
    pack_micro_batches,
)
from klab.harness.training.optim.critic import Critics, ValueStats
from klab.harness.training.pack_settings import PackSettings
from klab.harness.training.packed_cell import CellFailure, PackedCell
from klab.harness.training.runtime.timer import PhaseTimer

_ALL = slice(None)

IDLE = -1
"""The index of a micro-batch that is none."""


@dataclass(frozen=True, slots=True)
class CellLoss:
    """One cell's loss over the whole update, detached.

    Attributes:
        loss: what backward went through, without the critic's part.
        metrics: the objective's, by name.
        entropy: [N, T], of the policy before the update.
        value_stats: of the critic; None without one.
    """

    loss: float
    metrics: dict[str, float]
    entropy: Tensor
    value_stats: ValueStats | None = None


def compute_gradients(
    models: Models,
    settings: PackSettings,
    members: Sequence[PackedCell],
    minibatches: Sequence[Experience],
    coefficients: Sequence[LossCoefficients],
    number: int,
    critic_only: bool,
    timer: PhaseTimer,
    budget: MemoryBudget,
    process_group: ProcessGroup,
) -> list[CellLoss]:
    """Add this process's part of every cell's gradient to the parameters' `.grad`; the losses of the whole update.

    Args:
        number: of the update, from 1.
        critic_only: during critic warm-up, in which no gradient of the critic's goes into the policy.
        budget: what may go through a policy at once; it does not change the gradient.

    Raises:
        CellFailure: where a cell's objective raises.
    """
    micro_batches = pack_micro_batches([m.rollout for m in minibatches], budget, process_group)
    sharded = isinstance(models.policy, ShardedPolicy)
    turns = _turns(micro_batches, process_group, padded=sharded)
    keeps_graph = len(turns) == 1
    at_once = keeps_graph and process_group.size == 1  # the only micro-batch is the whole update
    together = process_group.lockstep if sharded else nullcontext
    with gathered(process_group, *([models.reference] if settings.needs_logits else [])):
        first_look = gathered(process_group, *([] if keeps_graph else [models.policy]))
        with timer("forward"), torch.set_grad_enabled(keeps_graph), first_look, together():
            own = {
                turn.index: forward_pass(models, settings, turn.rollouts, critic_only)
                for turn in turns
                if keeps_graph or turn.index != IDLE
            }
        with timer("forward"), torch.set_grad_enabled(at_once):
            passes: dict[int, list[ForwardPass]] = {}
            found = {index: forwards for index, forwards in own.items() if index != IDLE}
            for part in process_group.all_gather_object("log-probabilities", lambda: found, models.policy.device):
                passes |= part
            losses: list[Tensor] = []
            contexts, results = [], []
            for c, member in enumerate(members):
                whole = concat_passes(
                    [passes[index][c] for index, pieces in enumerate(micro_batches) if not is_padding(pieces[c])]
                )
                batch = token_batch(member, minibatches[c], whole)
                context = _update_context(c, member, minibatches[c], batch, coefficients[c], number - 1)
                loss, metrics = _objective_loss(c, member, batch, context)
                if at_once:
                    losses += [loss, *_value_losses(models.critics, whole, batch, context)]
                stats = _value_stats(models.critics, whole, batch, context)
                results.append(CellLoss(metrics["loss"], metrics, whole.entropy.detach(), stats))
                contexts.append(context)
            passes.clear()
            found.clear()
            if not keeps_graph:
                own.clear()
        for turn in turns:
            if not at_once:
                with timer("forward"), together():
                    forwards = own.pop(turn.index, None) or forward_pass(models, settings, turn.rollouts, critic_only)
                with timer("forward"):
                    compute = partial(_turn_losses, models, members, minibatches, contexts, turn, forwards, sharded)
                    losses = _agreed(process_group, compute) if sharded else compute()
            with timer("backward"), together():
                # a loss without a graph (no own tokens) has a gradient of zero
                torch.autograd.backward([loss for loss in losses if loss.requires_grad])
    return results


@dataclass(frozen=True, slots=True)
class _Turn:
    """One forward and backward pass of this process: a micro-batch, or an idle pass over a row that counts for nothing,
    made because the others make one."""

    index: int
    pieces: PackMicroBatch

    @property
    def rollouts(self) -> list[Rollout]:
        return [rollout for rollout, _ in self.pieces]


def _turns(micro_batches: Sequence[PackMicroBatch], process_group: ProcessGroup, padded: bool) -> list[_Turn]:
    """The passes of this process; `padded`: as many as those of every other one."""
    turns = [_Turn(index, micro_batches[index]) for index in process_group.assigned(len(micro_batches))]
    if padded and len(turns) * process_group.size < len(micro_batches):
        turns.append(_Turn(IDLE, idle_micro_batch(micro_batches[0])))
    return turns


def _turn_losses(
    models: Models,
    members: Sequence[PackedCell],
    minibatches: Sequence[Experience],
    contexts: Sequence[UpdateContext],
    turn: _Turn,
    forwards: Sequence[ForwardPass],
    sharded: bool,
) -> list[Tensor]:
    """What backward of a turn goes through, of all cells."""
    losses = [forward.logp[:0].sum() for forward in forwards] if sharded else []  # 0: backward is collective
    for c, member in enumerate(members):
        if is_padding(turn.pieces[c]):
            continue
        rows = turn.pieces[c][1]
        batch = token_batch(member, minibatches[c], forwards[c], rows)
        context = contexts[c].rows(rows)
        loss, _ = _objective_loss(c, member, batch, context, measure=False)
        losses += [loss, *_value_losses(models.critics, forwards[c], batch, context)]
    return losses


def _agreed(process_group: ProcessGroup, part: Callable[[], list[Tensor]]) -> list[Tensor]:
    """What `part` returns here, once it has in every process: where an objective raises, none is in backward."""
    found: list[Tensor] = []
    process_group.all_gather_object("a loss", lambda: found.extend(part()))
    return found


def token_batch(
    member: PackedCell, experience: Experience, computed: ForwardPass, rows: slice | Tensor = _ALL
) -> TokenBatch:
    """Some rows of a cell's minibatch as the objective reads them.

    Args:
        computed: the forward pass over these rows.
    """
    rollout, training = experience.rollout, member.cell.training
    sampler, excluded, correction = training.sampler, excluded_rows(member, rollout), None
    if sampler is not None and experience.old_logprobs is not None:
        correction = correction_weights(sampler, experience.old_logprobs, rollout.logp, rollout.mask)
    old, reference = old_policy(rollout, experience.old_logprobs, sampler)[rows], experience.reference_logprobs[rows]
    logits_reference = computed.logits_reference
    if training.on_policy:
        old = computed.logp.detach()
        if training.reference is not None and training.reference.follows == "rollout":
            reference, logits_reference = old, None if computed.logits is None else computed.logits.detach()
    return TokenBatch(
        logp=computed.logp,
        logp_behaviour=old,
        logp_reference=reference,
        mask=rollout.mask[rows],
        rewards=training_rewards(member, rollout, experience.rewards)[rows],
        groups=rollout.groups[rows],
        max_new_tokens=member.max_new_tokens,
        logits=computed.logits,
        logits_reference=logits_reference,
        greedy_rewards=None if experience.greedy_rewards is None else experience.greedy_rewards[rows],
        values=None if experience.values is None else experience.values[rows],
        correction=None if correction is None else correction[rows],
        excluded_from_loss=None if excluded is None else excluded[rows],
        entropy=computed.entropy if member.needs_entropy_gradient else computed.entropy.detach(),
        reward_terms=None if experience.reward_terms is None else experience.reward_terms[rows],
        term_weights=None if experience.reward_terms is None else tuple((member.reward_weights or {}).values()),
    )


def _objective_loss(
    position: int, member: PackedCell, batch: TokenBatch, context: UpdateContext, measure: bool = True
) -> tuple[Tensor, dict[str, float]]:
    try:
        out = objective_loss(member.cell.objective, batch, context)
        return out.loss, out.metrics if measure else {}
    except Exception as error:
        raise CellFailure(position, f"the objective raised {type(error).__name__}: {error}") from error


def _update_context(
    position: int,
    member: PackedCell,
    experience: Experience,
    batch: TokenBatch,
    coefficients: LossCoefficients,
    update: int,
) -> UpdateContext:
    try:
        return update_context(member.cell.objective, batch, coefficients, experience.rollout.grouping, update=update)
    except Exception as error:
        raise CellFailure(position, f"the objective raised {type(error).__name__}: {error}") from error


def _value_losses(
    critics: Critics | None, computed: ForwardPass, batch: TokenBatch, context: UpdateContext
) -> list[Tensor]:
    return [] if critics is None or computed.values is None else [critics.loss(computed.values, batch, context)]


def _value_stats(
    critics: Critics | None, computed: ForwardPass, batch: TokenBatch, context: UpdateContext
) -> ValueStats | None:
    return None if critics is None or computed.values is None else critics.value_stats(computed.values, batch, context)
