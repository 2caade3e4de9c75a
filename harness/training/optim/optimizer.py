"""AdamW on stacked parameters, one cell at a time: own learning rate, own clipping, own step count.

Every reduction and every update runs on the slice of one cell, in the same order and on the same memory layout
whatever the cell is packed with. That is what keeps a cell's bits the same alone and packed.

Weights of 16 bits are copies of float32 ones: a step of 1e-6 of a weight is lost in bfloat16, whose neighbours are
1/256 apart. Moments, clipping and steps are float32 then, and so is what a checkpoint holds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from klab.grid.schema.sections import TrainingSection

NARROW = (torch.float16, torch.bfloat16)

_FAR = 1e30
"""Weights that cannot be larger are finite; so are second moments of gradients whose squares cannot be."""


class StackedAdamW:
    """Decoupled weight decay Adam (Loshchilov & Hutter 2019), fused, on the slices `[c]` of parameters `[C, …]`.

    Weight decay applies to matrices only; norms and biases (one dimension per cell) are left alone.

    Attributes:
        parameters: name -> [C, …], what gradients are taken of.
        masters: the same weights as steps change them: the parameters themselves, or float32 copies of 16-bit ones.
        first, second: Adam's moments.
        steps: each cell's step count.
    """

    def __init__(self, parameters: Mapping[str, Tensor], settings: Sequence[TrainingSection]) -> None:
        self.parameters = parameters
        self.settings = list(settings)
        self.masters = {name: _master(value.detach()) for name, value in parameters.items()}
        self.first = {name: torch.zeros_like(value) for name, value in self.masters.items()}
        self.second = {name: torch.zeros_like(value) for name, value in self.masters.items()}
        device = next(iter(parameters.values())).device
        self.steps = [torch.zeros((), device=device) for _ in settings]
        # matrices first, so that the decayed slices are one contiguous stretch of each list
        self._order = sorted(parameters, key=lambda name: parameters[name].dim() < 3)
        self._matrices = sum(parameters[name].dim() >= 3 for name in self._order)
        self._weights, self._first, self._second = (
            self._slices(group) for group in (self.masters, self.first, self.second)
        )
        # the fused step divides by a float32 number as it goes, which spares a pass over the gradients
        self._divides = all(value.dtype == torch.float32 for value in self.masters.values())
        # each cell's bounds of its weights and of its gradients so far
        self._reach = [math.inf] * len(self.settings)
        self._steepest = [0.0] * len(self.settings)
        rounded = [name for name, value in parameters.items() if value.dtype != self.masters[name].dtype]
        self._rounded = [
            ([parameters[name].detach()[c] for name in rounded], [self.masters[name][c] for name in rounded])
            for c in range(len(self.settings))
        ]

    def _slices(self, stacked: Mapping[str, Tensor]) -> list[list[Tensor]]:
        """[cell][parameter] views that share storage with the stack."""
        return [list(column) for column in zip(*(stacked[name].unbind(0) for name in self._order), strict=True)]

    def gradients(self) -> list[list[Tensor]]:
        """[cell][parameter] views of the gradients that backward left; a parameter that took no part gets zeros."""
        for parameter in self.parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return self._slices({n: p.grad for n, p in self.parameters.items() if p.grad is not None})

    def clear(self) -> None:
        for parameter in self.parameters.values():
            parameter.grad = None

    def step(self, cell: int, gradients: Sequence[Tensor], lr: float, norm: float) -> None:
        """One update of one cell, its gradient scaled down so that its norm is at most `clip_norm`."""
        training = self.settings[cell]
        gradients = [g.to(weight.dtype) for g, weight in zip(gradients, self._weights[cell], strict=True)]
        divisor = None
        if training.clip_norm is not None and norm > training.clip_norm:
            if self._divides:
                divisor = torch.tensor(norm / training.clip_norm, device=gradients[0].device)
            else:
                torch._foreach_mul_(gradients, training.clip_norm / norm)
        self.steps[cell] += 1
        cut = self._matrices if training.weight_decay else len(self._order)
        for part, decay in ((slice(0, cut), training.weight_decay), (slice(cut, None), 0.0)):
            weights = self._weights[cell][part]
            if weights:
                torch._fused_adamw_(
                    weights,
                    gradients[part],
                    self._first[cell][part],
                    self._second[cell][part],
                    [],
                    [self.steps[cell]] * len(weights),
                    lr=lr,
                    beta1=training.adam_beta1,
                    beta2=training.adam_beta2,
                    weight_decay=decay,
                    eps=training.adam_eps,
                    amsgrad=False,
                    maximize=False,
                    grad_scale=divisor,
                )
        self._publish(cell)
        self._stretch(cell, lr, norm)

    def _stretch(self, cell: int, lr: float, norm: float) -> None:
        """How large a weight may be after a step: m̂ is a mean of gradients so far, and the step is lr·m̂/(√v̂ + ε)."""
        training = self.settings[cell]
        self._steepest[cell] = max(self._steepest[cell], min(norm, training.clip_norm or math.inf))
        farthest = lr * self._steepest[cell] / training.adam_eps
        self._reach[cell] = self._reach[cell] * (1 + lr * training.weight_decay) + farthest

    @torch.no_grad()
    def _publish(self, cell: int) -> None:
        """Round one cell's float32 weights to its 16-bit parameters."""
        narrow, wide = self._rounded[cell]
        if narrow:
            torch._foreach_copy_(narrow, wide)

    def finite(self) -> list[bool]:
        """Whether each cell's weights are all finite; they are looked at only if they may have become too large."""
        return [self._finite(cell) for cell in range(len(self.settings))]

    def _finite(self, cell: int) -> bool:
        if max(self._reach[cell], self._steepest[cell] ** 2) < _FAR:
            return True
        self._reach[cell] = float(norm(self._weights[cell]))
        return math.isfinite(self._reach[cell])

    def state(self, cell: int) -> dict[str, Tensor]:
        """One cell's weights and moments by name, as copies on the CPU."""
        groups = {"weight": self.masters, "first": self.first, "second": self.second}
        views = {f"{group}/{name}": value[cell] for group, values in groups.items() for name, value in values.items()}
        return {name: value.detach().cpu().clone() for name, value in {**views, "steps": self.steps[cell]}.items()}

    @torch.no_grad()
    def restore(self, cell: int, state: Mapping[str, Tensor]) -> None:
        """Put back what `state` returned. Raises KeyError or ValueError where names or shapes differ."""
        for group, values in (("weight", self.masters), ("first", self.first), ("second", self.second)):
            for name, value in values.items():
                stored = state[f"{group}/{name}"]
                if stored.shape != value.shape[1:]:
                    raise ValueError(f"{name} has shape {tuple(stored.shape)}, not {tuple(value.shape[1:])}")
                value[cell].copy_(stored)
        self.steps[cell].copy_(state["steps"])
        self._publish(cell)
        done, beta = int(self.steps[cell]), self.settings[cell].adam_beta1
        self._steepest[cell] = float(norm(self._first[cell])) / (1 - beta**done) if done else 0.0
        self._reach[cell] = math.inf


def norm(tensors: Sequence[Tensor]) -> Tensor:
    """The Euclidean norm of all tensors together, a float64 scalar tensor."""
    wide = torch.float32 if any(tensor.dtype in NARROW for tensor in tensors) else None
    norms = torch.stack(torch._foreach_norm(list(tensors), 2, wide)).double()
    return norms.square().sum().sqrt()


def _master(weight: Tensor) -> Tensor:
    return weight.float() if weight.dtype in NARROW else weight
