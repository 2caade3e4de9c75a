"""Arithmetic on the tokens of cells in one flat axis `[M, width]`, each cell's stretch with its own weights.

`sizes` are the lengths of the stretches; weights, scales and biases come cell by cell.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def root_mean_square(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x / rms(x), and 1 / rms(x)."""
    inverse = x.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    return x * inverse, inverse


def scaled(y: Tensor, scales: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    if len(sizes) == 1:
        return y * scales[0]
    out = torch.empty_like(y)
    for part, scale, target in zip(y.split_with_sizes(sizes), scales, out.split_with_sizes(sizes), strict=True):
        torch.mul(part, scale, out=target)
    return out


def products(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor] | None, sizes: Sequence[int]) -> Tensor:
    out = x.new_empty(len(x), weights[0].shape[1])
    for i, (part, target) in enumerate(zip(x.split_with_sizes(sizes), out.split_with_sizes(sizes), strict=True)):
        if biases is None:
            torch.mm(part, weights[i], out=target)
        else:
            torch.addmm(biases[i], part, weights[i], out=target)
    return out


def added_products(
    x: Tensor, h: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor] | None, sizes: Sequence[int]
) -> Tensor:
    """x plus the products of h."""
    out = torch.empty_like(x)
    parts = zip(x.split_with_sizes(sizes), h.split_with_sizes(sizes), out.split_with_sizes(sizes), weights, strict=True)
    for i, (before, part, target, weight) in enumerate(parts):
        torch.addmm(before if biases is None else before + biases[i], part, weight, out=target)
    return out


def back_products(
    grad: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    sizes: Sequence[int],
    into: Sequence[Tensor],
    into_bias: Sequence[Tensor] | None,
) -> Tensor:
    """Gradient of the inputs x of products; those of weights and biases are written."""
    out = torch.empty_like(x)
    parts = zip(
        grad.split_with_sizes(sizes), x.split_with_sizes(sizes), out.split_with_sizes(sizes), weights, into, strict=True
    )
    for i, (g, part, target, weight, d_weight) in enumerate(parts):
        torch.mm(g, weight.t(), out=target)
        torch.mm(part.t(), g, out=d_weight)
        if into_bias is not None:
            torch.sum(g, 0, out=into_bias[i])
    return out


def back_normed(
    grad: Tensor,
    d_h: Tensor,
    y: Tensor,
    inverse: Tensor,
    scales: Sequence[Tensor],
    into: Sequence[Tensor],
    sizes: Sequence[int],
) -> Tensor:
    """grad + (g − y·mean(g·y)) / rms with g = scale · d_h, which is overwritten."""
    products = d_h * y
    for product, d, scale, d_scale in zip(
        products.split_with_sizes(sizes), d_h.split_with_sizes(sizes), scales, into, strict=True
    ):
        torch.sum(product, 0, out=d_scale)
        d.mul_(scale)
    share = torch.mul(d_h, y, out=products).mean(-1, keepdim=True)
    return torch.addcmul(grad, d_h.addcmul_(y, share, value=-1), inverse)


def room_for_gradient(stacked: Tensor, cells: int) -> Tensor:
    """Room for a parameter's gradient; zeros where not all cells take part."""
    return torch.empty_like(stacked) if cells == len(stacked) else torch.zeros_like(stacked)


def turn(x: Tensor, cosines: Tensor, sines: Tensor, back: bool = False) -> None:
    """Rotate [M, heads, size] in place, or back."""
    first, second = x.chunk(2, -1)
    swapped = torch.cat((second, first), -1)
    x.mul_(cosines).addcmul_(swapped, sines, value=-1 if back else 1)


def attention_weights(queries: Tensor, keys: Tensor, bias: Tensor, heads: int) -> Tensor:
    """Attention weights [heads · L, S, all slots]."""
    B, S, size = queries.shape
    K = keys.shape[1]
    scores = torch.bmm(queries, keys.transpose(1, 2)).view(heads, B // heads, S, K)
    return torch.add(bias, scores, alpha=size**-0.5).softmax(-1).view(B, S, K)
