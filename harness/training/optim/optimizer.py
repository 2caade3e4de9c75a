"""AdamW on stacked parameters, one cell at a time: own learning rate, own clipping, own step count.

Every reduction and every update runs on the slice of one cell, in the same order and on the same memory layout
whatever the cell is packed with: a cell's bits are the same alone and packed.

16-bit weights are rounded copies of float32 masters: a step of 1e-6 of a weight would be lost in bfloat16, whose
neighbouring values are 1/256 apart. Moments, clipping, steps and checkpoints are float32 then. Gradients of 16 bits
become float32 a few tensors at a time, in a buffer of the size of the largest one.

The step is torch's public functional `adamw` with its fused kernel. `torch.optim.AdamW` would need one optimizer
object per cell, with its state in dictionaries instead of the stacks, for the same kernel. `_foreach_norm`,
`_foreach_mul_` and `_foreach_copy_` are what `torch.nn.utils` and `torch.optim` themselves call; there is no public
name for them. `get_total_norm` would do for the norm, but sums in float32 and so rounds differently.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from klab.grid.schema.sections import TrainingSection

NARROW = (torch.float16, torch.bfloat16)

SAFE_BOUND = 1e30
"""Upper bound below which weights and second moments are provably finite, so that the isfinite check is skipped."""


@dataclass(frozen=True, slots=True)
class PreparedStep:
    """One cell's next step, complete: applying it allocates nothing.

    Attributes:
        buffer: float32, where 16-bit gradients become wide in turn; the cells of an optimizer share it. None where all
            gradients are as wide as the weights.
    """

    cell: int
    gradients: list[Tensor]
    lr: float
    norm: float
    clip_divisor: Tensor | None
    buffer: Tensor | None


class StackedAdamW:
    """Decoupled weight decay Adam (Loshchilov & Hutter 2019), fused, on the slices `[c]` of parameters `[C, …]`.

    Weight decay applies to matrices only; norms and biases (one dimension per cell) are left alone.

    Attributes:
        parameters: name -> [C, …], what gradients are taken of.
        masters: the same weights as steps change them: the parameters themselves, or float32 copies of 16-bit ones.
        first, second: Adam's moments.
    """

    def __init__(self, parameters: Mapping[str, Tensor], settings: Sequence[TrainingSection]) -> None:
        self.parameters = parameters
        self.settings = list(settings)
        self.masters = {name: _master(value.detach()) for name, value in parameters.items()}
        self.first = {name: torch.zeros_like(value) for name, value in self.masters.items()}
        self.second = {name: torch.zeros_like(value) for name, value in self.masters.items()}
        device = next(iter(parameters.values())).device
        # one entry per parameter, as `adamw` counts them; all entries of a cell are equal
        self._steps = [list(torch.zeros(len(parameters), device=device).unbind()) for _ in settings]
        # matrices first: the parameters that weight decay applies to are a prefix of each list
        self._order = sorted(parameters, key=lambda name: parameters[name].dim() < 3)
        self._matrices = sum(parameters[name].dim() >= 3 for name in self._order)
        self._buffer: Tensor | None = None
        self._weights, self._first, self._second = (
            self._slices(group) for group in (self.masters, self.first, self.second)
        )
        # the fused kernel divides by a float32 scalar on the fly, which saves a pass over the gradients
        self._divides = all(value.dtype == torch.float32 for value in self.masters.values())
        # per cell, upper bounds of the absolute weights and of the gradient norms so far
        self._max_weight = [math.inf] * len(self.settings)
        self._max_gradient_norm = [0.0] * len(self.settings)
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

    def gradient_norms(self, gradients: Sequence[Sequence[Tensor]]) -> list[float]:
        """The Euclidean norm of each cell's entry of `gradients()`."""
        norms: list[float] = torch.stack([norm(slices) for slices in gradients]).tolist()
        return norms

    @property
    def replicated(self) -> list[Tensor]:
        """The parameters whose gradients are still to be summed over processes: all."""
        return list(self.parameters.values())

    def clear(self) -> None:
        self._buffer = None
        for parameter in self.parameters.values():
            parameter.grad = None

    def prepare_step(self, cell: int, gradients: Sequence[Tensor], lr: float, norm: float) -> PreparedStep:
        """Allocate all that one cell's step needs; weights, moments and step count stay as they are.

        Args:
            gradients: the cell's entry of `gradients()`.
            norm: their Euclidean norm; gradients above `clip_norm` are scaled down to it.
        """
        clip_norm = self.settings[cell].clip_norm
        divisor = None
        if clip_norm is not None and norm > clip_norm:
            if self._divides:
                divisor = torch.tensor(norm / clip_norm).to(gradients[0].device, non_blocking=True)
            else:
                torch._foreach_mul_(list(gradients), clip_norm / norm)
        narrow = [gradient.numel() for gradient in gradients if gradient.dtype in NARROW]
        if narrow and self._buffer is None:
            self._buffer = torch.empty(max(narrow), device=gradients[0].device)
        return PreparedStep(cell, list(gradients), lr, norm, divisor, self._buffer)

    def apply_step(self, step: PreparedStep) -> None:
        """Take a prepared step. Everything happens in place: nothing is allocated, so that memory cannot run out."""
        cell, training = step.cell, self.settings[step.cell]
        decayed = self._matrices if training.weight_decay else len(self._order)
        for start, end, decay in ((0, decayed, training.weight_decay), (decayed, len(self._order), 0.0)):
            for part in _parts(step.gradients, start, end, step.buffer):
                adamw(
                    self._weights[cell][part],
                    _widened(step.gradients[part], step.buffer),
                    self._first[cell][part],
                    self._second[cell][part],
                    [],
                    self._steps[cell][part],
                    fused=True,
                    grad_scale=step.clip_divisor,
                    lr=step.lr,
                    beta1=training.adam_beta1,
                    beta2=training.adam_beta2,
                    weight_decay=decay,
                    eps=training.adam_eps,
                    amsgrad=False,
                    maximize=False,
                )
        self._round_to_parameters(cell)
        self._update_bounds(cell, step.lr, step.norm)

    def _update_bounds(self, cell: int, lr: float, norm: float) -> None:
        """Bound the weights after a step: m̂ is a mean of the gradients so far, and the step is lr·m̂/(√v̂ + ε)."""
        training = self.settings[cell]
        self._max_gradient_norm[cell] = max(self._max_gradient_norm[cell], min(norm, training.clip_norm or math.inf))
        largest_step = lr * self._max_gradient_norm[cell] / training.adam_eps
        self._max_weight[cell] = self._max_weight[cell] * (1 + lr * training.weight_decay) + largest_step

    @torch.no_grad()
    def _round_to_parameters(self, cell: int) -> None:
        """Round one cell's float32 weights to its 16-bit parameters."""
        narrow, wide = self._rounded[cell]
        if narrow:
            torch._foreach_copy_(narrow, wide)

    def finite(self) -> list[bool]:
        """Whether each cell's weights are all finite; they are looked at only if they may have become too large."""
        return [self._finite(cell) for cell in range(len(self.settings))]

    def _finite(self, cell: int) -> bool:
        if max(self._max_weight[cell], self._max_gradient_norm[cell] ** 2) < SAFE_BOUND:
            return True
        self._max_weight[cell] = float(norm(self._weights[cell]))
        return math.isfinite(self._max_weight[cell])

    def state(self, cell: int) -> dict[str, Tensor]:
        """One cell's weights and moments by name, as they lie there: a copy would cost 12 bytes per parameter."""
        groups = {"weight": self.masters, "first": self.first, "second": self.second}
        views = {f"{group}/{name}": value[cell] for group, values in groups.items() for name, value in values.items()}
        return {name: value.detach() for name, value in {**views, "steps": self._steps[cell][0]}.items()}

    @torch.no_grad()
    def restore(self, cell: int, state: Mapping[str, Tensor]) -> None:
        """Put back what `state` returned. Raises KeyError or ValueError where names or shapes differ."""
        for group, values in (("weight", self.masters), ("first", self.first), ("second", self.second)):
            for name, value in values.items():
                stored = state[f"{group}/{name}"]
                if stored.shape != value.shape[1:]:
                    raise ValueError(f"{name} has shape {tuple(stored.shape)}, not {tuple(value.shape[1:])}")
                value[cell].copy_(stored)
        for count in self._steps[cell]:
            count.copy_(state["steps"])
        self._round_to_parameters(cell)
        done, beta = int(state["steps"]), self.settings[cell].adam_beta1
        self._max_gradient_norm[cell] = float(norm(self._first[cell])) / (1 - beta**done) if done else 0.0
        self._max_weight[cell] = math.inf


def norm(tensors: Sequence[Tensor]) -> Tensor:
    """The Euclidean norm of all tensors together, a float64 scalar tensor."""
    wide = torch.float32 if any(tensor.dtype in NARROW for tensor in tensors) else None
    norms = torch.stack(torch._foreach_norm(list(tensors), 2, wide)).double()
    return norms.square().sum().sqrt()


_ALIGNED = 4
"""Numbers: a float32 tensor in the buffer begins at a multiple of 16 bytes, as fast kernels want it."""


def _parts(gradients: Sequence[Tensor], start: int, end: int, buffer: Tensor | None) -> list[slice]:
    """Entries `start` to `end` in runs whose 16-bit gradients fit into the buffer; one run without a buffer."""
    bounds, filled = [start], 0
    for index in range(start, end if buffer is not None else start):
        if gradients[index].dtype in NARROW:
            size = gradients[index].numel()
            if buffer is not None and filled + size > len(buffer):
                bounds.append(index)
                filled = 0
            filled += -(-size // _ALIGNED) * _ALIGNED
    return [slice(*pair) for pair in zip(bounds, [*bounds[1:], end], strict=True)]


def _widened(gradients: Sequence[Tensor], buffer: Tensor | None) -> list[Tensor]:
    """The gradients, those of 16 bits as float32 in the buffer."""
    found, filled = [], 0
    for gradient in gradients:
        if buffer is None or gradient.dtype not in NARROW:
            found.append(gradient)
            continue
        size = gradient.numel()
        found.append(buffer[filled : filled + size].view(gradient.shape).copy_(gradient))
        filled += -(-size // _ALIGNED) * _ALIGNED
    return found


def _master(weight: Tensor) -> Tensor:
    return weight.float() if weight.dtype in NARROW else weight
