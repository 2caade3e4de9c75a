"""Grouped operations: the tokens of C cells in one flat axis `[M, width]`, each cell's segment with its own weights.

Weights, scales and biases are stacks `[C, …]`. A cell without tokens has a segment of length 0 and zero gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional

HAS_GROUPED_MM = hasattr(functional, "grouped_mm")
"""Whether torch multiplies all segments in one call: the same products one after the other, without Python between
them. Older versions of torch do not, and no version does for float64."""


def _uses_grouped_mm(x: Tensor) -> bool:
    return HAS_GROUPED_MM and x.dtype == torch.float32


class Segments:
    """Lengths of the C segments, Σ = M.

    Attributes:
        sizes: the lengths.
        offsets: int32 [C], where each segment ends.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        self.sizes = list(sizes)
        self.offsets = torch.tensor(self.sizes).cumsum(0).int()

    @cached_property
    def ids(self) -> Tensor:
        """int64 [M], the cell of each token."""
        return torch.arange(len(self.sizes)).repeat_interleave(torch.tensor(self.sizes))

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """The segments of x [M, …]."""
        return x.split_with_sizes(self.sizes)


def rms_normalize(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x / rms(x) for x [M, width], and 1 / rms(x) [M, 1]."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    inverse_rms = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return x * inverse_rms, inverse_rms


def grouped_scale(y: Tensor, scale: Tensor, segments: Segments) -> Tensor:
    """y [M, width] times each cell's scale [C, width]."""
    return y * scale.index_select(0, segments.ids)


def grouped_linear(x: Tensor, weight: Tensor, bias: Tensor | None, segments: Segments) -> Tensor:
    """x [M, in] times each cell's weight [C, in, out], plus its bias [C, out]."""
    if _uses_grouped_mm(x):
        out = functional.grouped_mm(x, weight, offs=segments.offsets)
    else:
        out = x.new_empty(len(x), weight.shape[2])
        for part, matrix, target in zip(segments.split(x), weight.unbind(0), segments.split(out), strict=True):
            torch.mm(part, matrix, out=target)
    return out if bias is None else out.add_(bias.index_select(0, segments.ids))


def grouped_linear_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, segments: Segments
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of x [M, in], weight [C, in, out] and bias [C, out] from those of the output [M, out]."""
    d_weight = _weight_grad(x, grad, segments)
    d_bias = None if bias is None else segment_sum(grad, segments)
    return grouped_linear(grad, weight.transpose(1, 2), None, segments), d_weight, d_bias


def _weight_grad(x: Tensor, grad: Tensor, segments: Segments) -> Tensor:
    if _uses_grouped_mm(x):
        return functional.grouped_mm(x.t(), grad, offs=segments.offsets)
    out = x.new_empty(len(segments.sizes), x.shape[1], grad.shape[1])
    for part, given, target in zip(segments.split(x), segments.split(grad), out.unbind(0), strict=True):
        torch.mm(part.t(), given, out=target)
    return out


def segment_sum(x: Tensor, segments: Segments) -> Tensor:
    """Sum [C, width] of each segment of x [M, width]."""
    return x.new_zeros(len(segments.sizes), x.shape[1]).index_add_(0, segments.ids, x)


def rms_norm_backward(
    residual_grad: Tensor, grad: Tensor, y: Tensor, inverse_rms: Tensor, scale: Tensor, segments: Segments
) -> tuple[Tensor, Tensor]:
    """Gradients of the input and of the scale of `grouped_scale(rms_normalize(x))`.

    d_x = residual_grad + (g − y·mean(g·y)) / rms with g = scale · grad.

    Args:
        residual_grad: [M, width] or a scalar, gradient of x from elsewhere, added.
        grad: [M, width], gradient of the output; overwritten.
        y, inverse_rms: what `rms_normalize` returned.
    """
    product = grad * y
    d_scale = segment_sum(product, segments)
    grad.mul_(scale.index_select(0, segments.ids))
    mean = torch.mul(grad, y, out=product).mean(-1, keepdim=True)
    return torch.addcmul(residual_grad, grad.addcmul_(y, mean, value=-1), inverse_rms), d_scale


def rotate_(x: Tensor, cosines: Tensor, sines: Tensor, inverse: bool = False) -> None:
    """Apply the rotary embedding, or its inverse, to x [M, heads, head_dim] in place."""
    first, second = x.chunk(2, -1)
    swapped = torch.cat((second, first), -1)
    x.mul_(cosines).addcmul_(swapped, sines, value=-1 if inverse else 1)
