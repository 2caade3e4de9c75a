"""Arithmetic on the tokens of cells in one flat axis `[M, width]`, each cell's stretch with its own weights.

Weights, scales and biases are stacks `[C, …]`. A cell without tokens has a stretch of length 0, and gradients of 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional

GROUPED = hasattr(functional, "grouped_mm")
"""Whether torch multiplies all stretches in one call: it takes the same products one after the other, without Python
between them. Older versions do not, and none does for float64."""


def _in_one_call(x: Tensor) -> bool:
    return GROUPED and x.dtype == torch.float32


class Segments:
    """The lengths of C stretches, Σ = M."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self.sizes = list(sizes)
        self.offsets = torch.tensor(self.sizes).cumsum(0).int()

    @cached_property
    def owner(self) -> Tensor:
        """[M], the cell of each token."""
        return torch.arange(len(self.sizes)).repeat_interleave(torch.tensor(self.sizes))

    def parts(self, x: Tensor) -> tuple[Tensor, ...]:
        """The stretches of x [M, …]."""
        return x.split_with_sizes(self.sizes)


def root_mean_square(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x / rms(x), and 1 / rms(x)."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    inverse = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return x * inverse, inverse


def scaled(y: Tensor, scale: Tensor, stretches: Segments) -> Tensor:
    """y [M, width] times each cell's scale [C, width]."""
    return y * scale.index_select(0, stretches.owner)


def products(x: Tensor, weight: Tensor, bias: Tensor | None, stretches: Segments) -> Tensor:
    """x [M, in] times each cell's weight [C, in, out], plus its bias [C, out]."""
    if _in_one_call(x):
        out = functional.grouped_mm(x, weight, offs=stretches.offsets)
    else:
        out = x.new_empty(len(x), weight.shape[2])
        for part, own, target in zip(stretches.parts(x), weight.unbind(0), stretches.parts(out), strict=True):
            torch.mm(part, own, out=target)
    return out if bias is None else out.add_(bias.index_select(0, stretches.owner))


def weight_gradients(x: Tensor, grad: Tensor, stretches: Segments) -> Tensor:
    """[C, in, out], gradients of the weights of products of x [M, in], from those of the products [M, out]."""
    if _in_one_call(x):
        return functional.grouped_mm(x.t(), grad, offs=stretches.offsets)
    out = x.new_empty(len(stretches.sizes), x.shape[1], grad.shape[1])
    for part, given, target in zip(stretches.parts(x), stretches.parts(grad), out.unbind(0), strict=True):
        torch.mm(part.t(), given, out=target)
    return out


def sums(x: Tensor, stretches: Segments) -> Tensor:
    """[C, width], the sum of each stretch of x [M, width]."""
    return x.new_zeros(len(stretches.sizes), x.shape[1]).index_add_(0, stretches.owner, x)


def back_products(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, stretches: Segments
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of the inputs x, the weights and the biases of products."""
    d_weight = weight_gradients(x, grad, stretches)
    d_bias = None if bias is None else sums(grad, stretches)
    return products(grad, weight.transpose(1, 2), None, stretches), d_weight, d_bias


def back_normed(
    grad: Tensor, d_h: Tensor, y: Tensor, inverse: Tensor, scale: Tensor, stretches: Segments
) -> tuple[Tensor, Tensor]:
    """grad + (g − y·mean(g·y)) / rms with g = scale · d_h, which is overwritten; and the scale's gradient."""
    product = d_h * y
    d_scale = sums(product, stretches)
    d_h.mul_(scale.index_select(0, stretches.owner))
    share = torch.mul(d_h, y, out=product).mean(-1, keepdim=True)
    return torch.addcmul(grad, d_h.addcmul_(y, share, value=-1), inverse), d_scale


def turn(x: Tensor, cosines: Tensor, sines: Tensor, back: bool = False) -> None:
    """Rotate [M, heads, size] in place, or back."""
    first, second = x.chunk(2, -1)
    swapped = torch.cat((second, first), -1)
    x.mul_(cosines).addcmul_(swapped, sines, value=-1 if back else 1)
