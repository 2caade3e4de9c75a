"""One optimizer update of a cell on TRL: the loss of its micro-batches, and the row that it leaves in the metrics.

Whatever belongs to the whole update (advantages, denominators, the exponent of `adaptive`) is computed from the
trajectories of all processes before the first micro-batch. The losses of the micro-batches of all processes add up to
klab's loss of the update, and so do their gradients.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import pad

from klab.grid import Objective, UserError
from klab.harness.engines.trl.experience import select_rows
from klab.harness.objective import (
    LossCoefficients,
    TokenBatch,
    Totals,
    UpdateContext,
    axis_functions,
    objective_loss,
    update_context,
)
from klab.harness.objective.metrics import TokenStats, update_metrics
from klab.harness.training.data.dynamic_sampling import group_rows, nonzero_variance_groups
from klab.harness.training.data.experience import Experience
from klab.harness.training.data.group_filtering import (
    drop_zero_variance,
    filtering_metrics,
    has_no_loss_tokens,
    loss_mask,
)
from klab.harness.training.distributed.messages import message_type
from klab.harness.training.distributed.process_group import ProcessGroup
from klab.harness.training.forward import ForwardPass
from klab.harness.training.loss import token_batch
from klab.harness.training.metrics import Row, update_row
from klab.harness.training.optim.kl_controller import coefficient_metrics
from klab.harness.training.optim.schedule import learning_rate
from klab.harness.training.packed_cell import PackedCell


@dataclass(frozen=True, slots=True)
class ExtraPass:
    """What a pass over the whole rollout with the policy of now adds, float [N, T]: its log-probabilities, and φ of
    placements in the reward or the advantage where it needs logits."""

    logp: Tensor
    phi: Tensor | None = None


@message_type
@dataclass(frozen=True, slots=True)
class _Measured:
    """What one process measured: the loss of its part, and by trajectory the per-token quantities [n, T] of
    `TokenStats`, with the entropy."""

    loss: float
    rows: Tensor
    log_ratio: Tensor
    log_ratio_reference: Tensor
    ratio: Tensor
    weight: Tensor
    entropy: Tensor


def needs_current_policy(member: PackedCell) -> bool:
    """Whether advantages or weights of an update depend on the policy as it is before the update, which takes a pass
    of its own: weights with a solver, `kl_at: current`, `full` in the reward or the advantage, and advantages that ask
    for the policy's log-probabilities."""
    functions = axis_functions(member.cell.objective)
    detached = has_detached_kl(member)
    current = functions.solver is not None or (detached and functions.placement.kl_at == "current")
    current = current or not functions.asks["advantage"].isdisjoint({"logp", "log_ratio"})
    return (current and not member.cell.training.on_policy) or (detached and "logits" in functions.asks["estimator"])


def check_inputs(objective: Objective) -> None:
    """Raises UserError for an advantage or a solver that asks for what TRL does not keep of the whole update."""
    asks = axis_functions(objective).asks
    for axis in ("advantage", "solver"):
        for name in sorted(asks.get(axis, frozenset()) & {"logits", "logits_reference", "entropy", "values"}):
            raise UserError(
                f"asks for {name} of the whole update, which TRL does not keep",
                key=f"objective.{'weight' if axis == 'solver' else axis}",
                value=objective.advantage if axis == "advantage" else objective.weight,
                hint="Train the cell with training.engine: klab.",
            )


def has_detached_kl(member: PackedCell) -> bool:
    """Whether a KL enters the rewards or the advantages."""
    placement = axis_functions(member.cell.objective).placement
    return placement.reward is not None or placement.advantage is not None


class Update:
    """The update that follows `number` - 1 others.

    Args:
        experience: the rollout of all processes, N trajectories.
        coefficients: of this update.
        rows: those of the N trajectories that belong to the update, in order; None: all.

    Attributes:
        extra: to be set before the first loss where `needs_current_policy`.
    """

    def __init__(
        self,
        member: PackedCell,
        experience: Experience,
        coefficients: LossCoefficients,
        number: int,
        rows: Tensor | None = None,
    ) -> None:
        self.member, self.coefficients, self.number = member, coefficients, number
        self.used = drop_zero_variance(member, experience)
        self.minibatch = experience if rows is None else select_rows(experience, rows)
        self._place = self._places(experience)
        self._dropped = self.used is not experience
        self._rows = rows
        self.extra: ExtraPass | None = None
        self._measured: list[_Measured] = []
        self._own = self.minibatch if rows is not None else self.used

    def _places(self, experience: Experience) -> Tensor:
        """Int64 [N], where each trajectory stands among those that were not dropped; -1 for those that were."""
        count, device = len(experience.rewards), experience.rewards.device
        if self.used is experience:
            return torch.arange(count, device=device)
        size = experience.rollout.group_size
        kept = group_rows(nonzero_variance_groups(experience.rewards, size), size).to(device)
        place = torch.full((count,), -1, device=device)
        return place.index_copy_(0, kept, torch.arange(len(kept), device=device))

    @cached_property
    def _context(self) -> UpdateContext:
        """Advantages, denominators and solved parameters, from the trajectories of all processes."""
        extra = self.extra
        logp = self.used.rollout.logp if extra is None else self._of_used(extra.logp)
        phi = None if extra is None or extra.phi is None else self._of_used(extra.phi)
        batch = token_batch(self.member, self.used, ForwardPass(logp, torch.zeros_like(logp)))
        groups = self.used.rollout.grouping
        context = update_context(self.member.cell.objective, batch, self.coefficients, groups, phi, self.number - 1)
        if self._rows is None:
            return context
        chosen = torch.zeros(len(batch.rewards), 1, dtype=torch.bool, device=batch.mask.device)
        place = self._place[self._rows]
        chosen[place[place >= 0]] = True
        totals = Totals.of(batch.loss_mask & chosen, groups, batch.max_new_tokens)
        return replace(context, totals=replace(totals, trajectories=len(self._rows)))

    def _of_used(self, values: Tensor) -> Tensor:
        """The rows of [N, …] that were not dropped; where all were, as many as stand for none."""
        if not self._dropped:
            return values
        kept = values[self._place >= 0]
        return kept if len(kept) else values[: len(self.used.rewards)]

    def batch(self, rows: Tensor, computed: ForwardPass) -> TokenBatch:
        """Some trajectories as the objective reads them.

        Args:
            rows: of the rollout, none of them dropped.
            computed: the forward pass over them, as wide as their process padded it.
        """
        room = (0, self.used.rollout.tokens.shape[1] - computed.logp.shape[1])
        logits = [
            None if each is None else pad(each, (0, 0, *room)) for each in (computed.logits, computed.logits_reference)
        ]
        wide = ForwardPass(pad(computed.logp, room), pad(computed.entropy, room), *logits)
        return token_batch(self.member, self.used, wide, self._place[rows])

    def loss(self, rows: Tensor, computed: ForwardPass) -> Tensor:
        """The part of the update's loss that belongs to a micro-batch; what it measures is kept for `finish`."""
        kept = self._place[rows] >= 0
        if not bool(kept.any()):
            return computed.logp.new_zeros(()) + torch.where(computed.logp.isfinite(), computed.logp, 0.0).sum() * 0.0
        if not bool(kept.all()):
            rows, computed = rows[kept], _rows_of(computed, kept)
        batch = self.batch(rows, computed)
        context = self._context.rows(self._place[rows])
        out = objective_loss(self.member.cell.objective, batch, context)
        stats = out.token_stats
        room = (0, self.used.rollout.tokens.shape[1] - computed.entropy.shape[1])
        self._measured.append(
            _Measured(
                float(out.loss.detach()),
                self._place[rows],
                stats.log_ratio,
                stats.log_ratio_reference,
                stats.ratio,
                stats.weight,
                torch.where(batch.mask, pad(computed.entropy.detach(), room), 0.0),
            )
        )
        return out.loss

    def finish(self, group: ProcessGroup, gradient_norm: float, device: torch.device) -> tuple[Row, bool]:
        """The update's row of metrics, the same in all processes, and whether its step is to be taken.

        A step is left out where the loss or the gradient is not finite, and where filtering has left no token in the
        loss.
        """
        parts = [each for part in group.all_gather_object("an update", lambda: self._measured, device) for each in part]
        loss = math.fsum(each.loss for each in parts) if all(math.isfinite(each.loss) for each in parts) else math.nan
        finite = math.isfinite(loss) and math.isfinite(gradient_norm)
        used, dtype = self._own, self.used.rollout.logp.dtype
        stats, entropy = self._token_stats(parts)
        row = update_row(
            update=self.number,
            experience=used,
            entropy=entropy,
            loss=loss,
            metrics=update_metrics(stats, loss=torch.tensor(loss, dtype=dtype, device=stats.ratio.device)),
            gradient_norm=gradient_norm,
            lr=learning_rate(self.member.cell.training, self.number),
            nonfinite=not finite,
        )
        row |= coefficient_metrics(self.member.cell, self.coefficients)
        row |= filtering_metrics(self.member, self.minibatch, used)
        return row, finite and not has_no_loss_tokens(self.member, used)

    def _token_stats(self, parts: list[_Measured]) -> tuple[TokenStats, Tensor]:
        """The per-token quantities of the update's trajectories in their order, and their entropy."""
        used = self.used
        if not parts:
            nothing = torch.zeros_like(used.rollout.logp)
            mask = torch.zeros_like(used.rollout.mask)
            return TokenStats(nothing, nothing, nothing, nothing, nothing, mask, used.rollout.groups), nothing
        rows = torch.cat([part.rows for part in parts])
        order = rows.argsort()
        at = rows[order]

        def gathered(name: str) -> Tensor:
            return torch.cat([getattr(part, name) for part in parts])[order]

        stats = TokenStats(
            gathered("log_ratio"),
            gathered("log_ratio_reference"),
            gathered("ratio"),
            gathered("weight"),
            self._context.advantages[at],
            loss_mask(self.member, used)[at],
            used.rollout.groups[at],
        )
        return stats, gathered("entropy")


def _rows_of(computed: ForwardPass, kept: Tensor) -> ForwardPass:
    """Some rows of a forward pass."""
    values = (computed.logp, computed.entropy, computed.logits, computed.logits_reference)
    return ForwardPass(*(None if value is None else value[kept] for value in values))  # type: ignore[arg-type]
