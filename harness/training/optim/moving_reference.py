"""Reference policies that move (`training.reference`): one per cell of a pack, each with weights of its own.

The policy that cells start from, which a pack holds once, stays beside them: evaluations measure KL to it.

Like a step of the optimizer, a move works on the slices of one cell, in place: the bits of a cell are the same alone
and packed, and nothing is allocated. Means of 16-bit weights are kept in float32, as the weights in training are: a
change of 1 − ema = 0.01 of a difference would be lost in bfloat16.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from klab.grid.kl_settings import refuse_late_logits
from klab.grid.schema.sections import ReferencePolicy
from klab.harness.policy.policy import Policy
from klab.harness.training.optim.optimizer import NARROW, StackedAdamW
from klab.harness.training.pack_settings import PackSettings
from klab.harness.training.packed_cell import PackedCell


class MovingReference:
    """The moving references of the cells of a pack.

    Args:
        rule: how they move, of all cells.
        policy: the policies in training, which they are copies of.
        masters: the weights of these as the optimizer has them, in float32 or wider.

    Attributes:
        policy: the references, without gradient.
        weights: name -> [C, …], theirs as the rule moves them: the policy's own tensors, or float32 copies of 16-bit
            ones.
    """

    def __init__(self, rule: ReferencePolicy, policy: Policy, masters: Mapping[str, Tensor]) -> None:
        self.rule = rule
        self.policy = policy.trailing_copy()
        rounded = self.policy.parameters
        widens = rule.ema > 0.0 and any(value.dtype in NARROW for value in rounded.values())
        self.weights = {name: value.float() for name, value in rounded.items()} if widens else rounded
        source = masters if widens else {name: value.detach() for name, value in policy.parameters.items()}
        self._cells = [
            _Slices(
                [value[c] for value in self.weights.values()],
                [source[name][c] for name in self.weights],
                [value[c] for value in rounded.values()] if widens else [],
            )
            for c in range(policy.cells)
        ]

    @classmethod
    def of(
        cls, settings: PackSettings, members: Sequence[PackedCell], policy: Policy, optimizer: StackedAdamW
    ) -> MovingReference | None:
        """Those of a pack; None where its reference stays, or where the log-probabilities of the policy that drew a
        rollout are all that is asked of it.

        Raises:
            UserError: logits are asked of a reference that may have moved since.
        """
        for member in members:
            if member.needs_reference_logits:
                refuse_late_logits(member.cell.training, "the objective")
        if settings.reference is None or not members[0].keeps_reference:
            return None
        return cls(settings.reference, policy, optimizer.masters)

    def follow(self, update: int) -> None:
        """Move after an update, counted from 1, where the rule says so."""
        if self.rule.moves_after(update):
            self._move()

    def follow_rollout(self) -> None:
        """A rollout is about to be drawn: the policy that draws it becomes the reference where that is the rule."""
        if self.rule.follows == "rollout":
            self._move()

    @torch.no_grad()
    def _move(self) -> None:
        for cell in self._cells:
            if self.rule.ema:
                torch._foreach_lerp_(cell.own, cell.source, 1.0 - self.rule.ema)
            else:
                torch._foreach_copy_(cell.own, cell.source)
            cell.round()

    def state(self, cell: int) -> dict[str, Tensor]:
        """One cell's reference by name, as it lies there."""
        return {name: value[cell] for name, value in self.weights.items()}

    @torch.no_grad()
    def restore(self, cell: int, state: Mapping[str, Tensor]) -> None:
        """Put back what `state` returned. Raises KeyError or ValueError where names or shapes differ."""
        for name, value in self.weights.items():
            if state[name].shape != value.shape[1:]:
                raise ValueError(f"{name} has shape {tuple(state[name].shape)}, not {tuple(value.shape[1:])}")
            value[cell].copy_(state[name])
        self._cells[cell].round()


class _Slices:
    """One cell's part of the stacks: its reference, what that moves to, and its copy in 16 bits, if any."""

    def __init__(self, own: list[Tensor], source: list[Tensor], rounded: list[Tensor]) -> None:
        self.own, self.source, self._rounded = own, source, rounded

    def round(self) -> None:
        if self._rounded:
            torch._foreach_copy_(self._rounded, self.own)
