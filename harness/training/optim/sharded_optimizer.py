"""AdamW on the shares that each process has of one cell's weights (see `policy/hf/sharded.py`).

A step works on every number by itself, so each process makes that of its own shares. What concerns all weights (the
norm of the gradient, and whether weights are finite) is summed over the processes in the order of their ranks, in
float64: every process gets the same bits, and clips alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from klab.grid.schema.sections import TrainingSection
from klab.harness.policy.hf.sharded import ShardedPolicy
from klab.harness.training.distributed.process_group import ProcessGroup
from klab.harness.training.optim.optimizer import SAFE_BOUND, PreparedStep, StackedAdamW, norm

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


class ShardedAdamW(StackedAdamW):
    """`StackedAdamW` of one cell, whose parameters are this process's shares `[1, …]`; some may have no rows.

    Gradients arrive summed over the processes. `finite` reads what the last collective step has found.
    """

    def __init__(self, policy: ShardedPolicy, training: TrainingSection, process_group: ProcessGroup) -> None:
        self._shares = policy.trained.shares
        self._process_group = process_group
        super().__init__(
            {name: share.to_local().detach().unsqueeze(0) for name, share in self._shares.items()}, [training]
        )
        # where the shares lie, which may be the host's memory: `zeros_like` keeps to it, `DTensor.from_local` would not
        self._moments: dict[str, dict[str, Any]] = {
            group: {name: torch.zeros_like(share.detach()) for name, share in self._shares.items()}
            for group in ("first", "second")
        }
        self.first, self.second = (
            {name: moment.to_local().unsqueeze(0) for name, moment in self._moments[group].items()}
            for group in ("first", "second")
        )
        self._first, self._second = self._slices(self.first), self._slices(self.second)
        self._look_at_weights()

    def gradients(self) -> list[list[Tensor]]:
        """[0][parameter] this process's part of the gradient; a parameter that took no part gets zeros."""
        found = []
        for name in self._order:
            gradient = self._shares[name].grad
            found.append(torch.zeros_like(self.parameters[name][0]) if gradient is None else _local(gradient))
        return [found]

    def gradient_norms(self, gradients: Sequence[Sequence[Tensor]]) -> list[float]:
        return [self._norm(slices) for slices in gradients]

    @property
    def replicated(self) -> list[Tensor]:
        """None: the backward pass sums gradients."""
        return []

    def clear(self) -> None:
        for share in self._shares.values():
            share.grad = None

    def apply_step(self, step: PreparedStep) -> None:
        super().apply_step(step)
        if not self._is_bounded(step.cell):
            self._look_at_weights()

    def _finite(self, cell: int) -> bool:
        return self._is_bounded(cell) or math.isfinite(self._max_weight[cell])

    def _is_bounded(self, cell: int) -> bool:
        return max(self._max_weight[cell], self._max_gradient_norm[cell] ** 2) < SAFE_BOUND

    def _look_at_weights(self) -> None:
        """Collective: bound the weights by their norm."""
        self._max_weight[0] = self._norm(self._weights[0])

    def _norm(self, own: Sequence[Tensor]) -> float:
        """Collective: the norm of what all processes have."""
        parts = self._process_group.all_gather_object("a norm", lambda: float(norm(own)) ** 2)
        return math.sqrt(math.fsum(parts)) if all(map(math.isfinite, parts)) else math.nan

    def state(self, cell: int) -> dict[str, Tensor]:
        """The step count alone: `state_shares` has the rest."""
        return {"steps": self._steps[cell][0].detach().cpu().clone()}

    def state_shares(self) -> dict[str, DTensor]:
        """This process's shares of weights and moments by name, as `StackedAdamW.state` names them."""
        groups: dict[str, Mapping[str, Any]] = {"weight": self._shares, **self._moments}
        return {f"{group}/{name}": value.detach() for group, values in groups.items() for name, value in values.items()}

    def restore(self, cell: int, state: Mapping[str, Tensor]) -> None:
        """Collective: go on from `state`, once the shares have been read into `state_shares`."""
        for count in self._steps[cell]:
            count.copy_(state["steps"])
        done, beta = int(state["steps"]), self.settings[cell].adam_beta1
        self._max_gradient_norm[cell] = self._norm(self._first[cell]) / (1 - beta**done) if done else 0.0
        self._look_at_weights()


def _local(gradient: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor

    return gradient.to_local() if isinstance(gradient, DTensor) else gradient
