"""The arithmetic of one decoder layer, with hand-written gradients where that saves passes over memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[A, M, in] times [A, in, out], plus [A, out].

    A weight that all cells share (expanded along A) is read once by a GPU. A CPU multiplies cell by cell, so that the
    bits of a cell do not depend on its mates.
    """
    if weight.device.type != "cpu" and weight.stride(0) == 0:
        out = x @ weight[0]
        return out if bias is None else out + bias.unsqueeze(1)
    if weight.device.type == "cpu" and 1 in weight.shape[1:]:
        out = _thin_product(x, weight)
        return out if bias is None else out + bias.unsqueeze(1)
    return torch.bmm(x, weight) if bias is None else torch.baddbmm(bias.unsqueeze(1), x, weight)


def _thin_product(x: Tensor, weight: Tensor) -> Tensor:
    """[A, M, in] times [A, in, out] where `in` or `out` is 1 (adapters of rank 1), as sums.

    torch hands a single matrix times a vector to another routine than a stack of them, with other bits.
    """
    if weight.shape[1] == 1:
        return x * weight
    return (x * weight.transpose(1, 2)).sum(-1, keepdim=True)


def embedded(table: Tensor, tokens: Tensor) -> Tensor:
    """Rows of each cell's table [A, V, hidden] at tokens [A, M]."""
    A, V, D = table.shape
    if table.stride(0) == 0:
        return functional.embedding(tokens, table[0])
    rows = tokens + torch.arange(A, device=tokens.device)[:, None] * V
    return functional.embedding(rows.view(-1), table.reshape(A * V, D)).view(A, -1, D)


def normed(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    """RMS norm over the last axis, times `scale` (broadcast); computed in float32 at least, like transformers."""
    if x.dtype in (torch.float16, torch.bfloat16):
        wide = x.float()
        return scale * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)
    out: Tensor = _RootMeanSquareNorm.apply(x, scale, eps)  # type: ignore[no-untyped-call]
    return out


def rotated(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotary embedding of [..., size] with the factors that `Rotary` gives."""
    out: Tensor = _Rotation.apply(x, cosines, sines)  # type: ignore[no-untyped-call]
    return out


def gated(gate_up: Tensor) -> Tensor:
    """silu(gate) · up of [..., 2 F] with the gate in the first half."""
    gate, up = gate_up.chunk(2, -1)
    return functional.silu(gate) * up


class _RootMeanSquareNorm(torch.autograd.Function):
    """y = x / rms(x); out = scale · y. dx = (g − y·mean(g·y)) / rms with g = scale · dout."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, eps: float) -> Tensor:
        inverse = torch.rsqrt(x.square().mean(-1, keepdim=True).add_(eps))
        y = x * inverse
        ctx.save_for_backward(y, inverse, scale)
        return y * scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        y, inverse, scale = ctx.saved_tensors
        grad_scale = (grad * y).sum_to_size(scale.shape) if ctx.needs_input_grad[1] else None
        inner = grad * scale
        share = (inner * y).mean(-1, keepdim=True)
        return inner.sub_(y.mul(share)).mul_(inverse), grad_scale, None


class _Rotation(torch.autograd.Function):
    """out = x·c + swap(x)·s, where swap exchanges the halves; the gradient is the rotation back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        ctx.save_for_backward(cosines, sines)
        return torch.addcmul(x * cosines, _swapped(x), sines)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cosines, sines = ctx.saved_tensors
        return torch.addcmul(grad * cosines, _swapped(grad), sines, value=-1), None, None


def _swapped(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((second, first), -1)
