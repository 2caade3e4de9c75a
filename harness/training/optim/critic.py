"""Critics: learned values V for generalised advantage estimation, one per cell."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from klab.grid.schema.sections import Critic, TrainingSection
from klab.harness.objective import TokenBatch, UpdateContext, value_loss, value_metrics
from klab.harness.policy.policy import Policy
from klab.harness.policy.rollout import Rollout
from klab.harness.policy.scores import token_scores
from klab.harness.policy.value_head import ValueHead
from klab.harness.training.data.experience import Experience
from klab.harness.training.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from klab.harness.training.metrics import Row, finite
from klab.harness.training.microbatch import UNLIMITED, MemoryBudget, map_micro_batches
from klab.harness.training.optim.optimizer import PreparedStep, StackedAdamW, norm
from klab.harness.training.optim.schedule import learning_rate


@dataclass(frozen=True, slots=True)
class CriticGradient:
    """Gradient of one cell's critic, parameter by parameter, and its norm before clipping."""

    slices: list[Tensor]
    norm: float


@dataclass(frozen=True, slots=True)
class ValueStats:
    """Statistics of one cell's critic in one update."""

    loss: float
    explained_variance: float
    clip_fraction: float

    def row(self, gradient: CriticGradient) -> Row:
        """As columns of the update's row of metrics."""
        return {
            "value_loss": finite(self.loss),
            "explained_variance": finite(self.explained_variance),
            "value_clip_fraction": finite(self.clip_fraction),
            "critic_gradient_norm": finite(gradient.norm),
        }

    def is_finite(self, gradient: CriticGradient) -> bool:
        """Whether the critic may take the step."""
        return math.isfinite(self.loss) and math.isfinite(gradient.norm)


class Critics:
    """The critics of a pack, one per cell and all of one kind.

    Attributes:
        trunk: the models below the heads; None where these stand on the policies themselves.
        head: V of a final hidden state; 0 before the first update.
        optimizer: of the heads, and of the trunk where it is the critics' own.
    """

    def __init__(
        self, settings: Critic, trainings: Sequence[TrainingSection], policy: Policy, trunk: Policy | None
    ) -> None:
        self.settings = settings
        self.trunk = trunk
        below = {} if trunk is None else trunk.parameters
        wide = torch.promote_types(policy.dtype, torch.float32)
        self.head = ValueHead(len(trainings), policy.hidden_size, wide, policy.device)
        self.optimizer = StackedAdamW({**below, **self.head.parameters}, trainings)

    @classmethod
    def of(
        cls,
        settings: Critic | None,
        trainings: Sequence[TrainingSection],
        policy: Policy,
        load_trunk: Callable[[], Policy],
    ) -> Critics | None:
        """The critics that a pack's settings ask for, if any.

        Args:
            trainings: one section per cell, for its optimizer.
            load_trunk: makes a trainable copy of the cells' initial policies, called for `kind: model`.
        """
        if settings is None:
            return None
        return cls(settings, trainings, policy, load_trunk() if settings.kind == "model" else None)

    @property
    def shares_trunk(self) -> bool:
        return self.trunk is None

    def in_warmup(self, number: int) -> bool:
        """Whether update `number` (1-based) belongs to critic warm-up, in which only the critics learn."""
        return number <= self.settings.warmup_updates

    def values(self, rollouts: Sequence[Rollout], states: Sequence[Tensor | None]) -> list[Tensor]:
        """V [N, T] before each own token of each cell's rollout, with gradient; 0 elsewhere.

        Args:
            states: the policies' final hidden states [N, T, width], read where the trunk is theirs.
        """
        if self.trunk is not None:
            states = [scores.states for scores in token_scores(self.trunk, list(rollouts), states=True)]
        found = self.head([each for each in states if each is not None])
        return [torch.where(rollout.mask, each, 0.0) for rollout, each in zip(rollouts, found, strict=True)]

    @torch.no_grad()
    def compute_values(
        self,
        experiences: Sequence[Experience],
        policy: Policy,
        budget: MemoryBudget = UNLIMITED,
        process_group: ProcessGroup = SINGLE_PROCESS,
    ) -> None:
        """Compute V_old of rollouts that were just sampled, within the memory budget."""

        def values(pieces: list[Rollout]) -> list[Tensor]:
            states: list[Tensor | None] = [None] * len(pieces)
            if self.shares_trunk:
                states = [scores.states for scores in token_scores(policy, pieces, states=True)]
            return self.values(pieces, states)

        found = map_micro_batches([each.rollout for each in experiences], budget, values, process_group)
        for experience, each in zip(experiences, found, strict=True):
            experience.values = each

    def loss(self, values: Tensor, batch: TokenBatch, context: UpdateContext) -> Tensor:
        """The value loss of some rows of a cell's update, times `coefficient` where the trunk is the policy's."""
        assert batch.values is not None
        assert context.value_targets is not None
        loss = value_loss(
            values, batch.values, context.value_targets, batch.loss_mask, context.totals, self.settings.clip
        )
        return self.settings.coefficient * loss if self.shares_trunk else loss

    @torch.no_grad()
    def value_stats(self, values: Tensor, batch: TokenBatch, context: UpdateContext) -> ValueStats:
        """Value loss and its statistics over a whole update."""
        assert batch.values is not None
        assert context.value_targets is not None
        common = (values, batch.values, context.value_targets, batch.loss_mask)
        figures = value_metrics(*common, self.settings.clip)
        loss = float(value_loss(*common, context.totals, self.settings.clip))
        return ValueStats(loss, figures["explained_variance"], figures["value_clip_fraction"])

    def gradients(self) -> list[CriticGradient]:
        """What backward left, cell by cell."""
        slices = self.optimizer.gradients()
        norms: list[float] = torch.stack([norm(each) for each in slices]).tolist()
        return [CriticGradient(*pair) for pair in zip(slices, norms, strict=True)]

    def prepare_step(self, cell: int, gradient: CriticGradient, number: int) -> PreparedStep:
        """Update number `number` (1-based) of one cell's critic, to be applied by `optimizer`."""
        lr = learning_rate(self.optimizer.settings[cell], number, self.settings.lr)
        return self.optimizer.prepare_step(cell, gradient.slices, lr, gradient.norm)
