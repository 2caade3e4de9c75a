"""Building blocks of a decoder layer on stacked cells, with hand-written gradients where these save memory traffic."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Each cell's tokens times its own matrix: x [A, M, in], weight [A, in, out], bias [A, out] -> [A, M, out].

    A weight that all cells share (expanded along A) is one product over all tokens on a GPU. On a CPU it is multiplied
    cell by cell, so that the bits of a cell's result do not depend on the cells that it is packed with.
    """
    if weight.device.type != "cpu" and weight.stride(0) == 0:
        out = x @ weight[0]
        return out if bias is None else out + bias.unsqueeze(1)
    if weight.device.type == "cpu" and 1 in weight.shape[1:]:
        out = _thin_product(x, weight)
        return out if bias is None else out + bias.unsqueeze(1)
    return torch.bmm(x, weight) if bias is None else torch.baddbmm(bias.unsqueeze(1), x, weight)


def _thin_product(x: Tensor, weight: Tensor) -> Tensor:
    """[A, M, in] times [A, in, out] as sums, where `in` or `out` is 1 (adapters of rank 1).

    torch computes a single matrix times a vector by another routine than a stack of them, with other bits.
    """
    if weight.shape[1] == 1:
        return x * weight
    return (x * weight.transpose(1, 2)).sum(-1, keepdim=True)


def embed(table: Tensor, tokens: Tensor) -> Tensor:
    """Token embeddings [A, M, hidden_size] of token ids [A, M] from each cell's table [A, vocab_size, hidden_size]."""
    A, V, D = table.shape
    if table.stride(0) == 0:
        return functional.embedding(tokens, table[0])
    rows = tokens + torch.arange(A, device=tokens.device)[:, None] * V
    return functional.embedding(rows.view(-1), table.reshape(A * V, D)).view(A, -1, D)


def rms_norm(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    """RMS norm over the last axis times `scale` (broadcast), computed in float32 or wider as in transformers."""
    if x.dtype in (torch.float16, torch.bfloat16):
        wide = x.float()
        return scale * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)
    out: Tensor = _RMSNorm.apply(x, scale, eps)  # type: ignore[no-untyped-call]
    return out


def apply_rotary(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotary position embedding of x [..., head_dim] with the factors of `RotaryEmbedding`."""
    out: Tensor = _Rotary.apply(x, cosines, sines)  # type: ignore[no-untyped-call]
    return out


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) · up of [..., 2·intermediate_size], the gate in the first half."""
    gate, up = gate_up.chunk(2, -1)
    return functional.silu(gate) * up


class _RMSNorm(torch.autograd.Function):
    """y = x / rms(x); out = scale · y. dx = (g − y·mean(g·y)) / rms with g = scale · dout."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, eps: float) -> Tensor:
        inverse_rms = torch.rsqrt(x.square().mean(-1, keepdim=True).add_(eps))
        y = x * inverse_rms
        ctx.save_for_backward(y, inverse_rms, scale)
        return y * scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        y, inverse_rms, scale = ctx.saved_tensors
        grad_scale = (grad * y).sum_to_size(scale.shape) if ctx.needs_input_grad[1] else None
        g = grad * scale
        mean = (g * y).mean(-1, keepdim=True)
        return g.sub_(y.mul(mean)).mul_(inverse_rms), grad_scale, None


class _Rotary(torch.autograd.Function):
    """out = x·cosines + swap(x)·sines, where swap exchanges the halves; the gradient is the inverse rotation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        ctx.save_for_backward(cosines, sines)
        return torch.addcmul(x * cosines, _swap_halves(x), sines)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cosines, sines = ctx.saved_tensors
        return torch.addcmul(grad * cosines, _swap_halves(grad), sines, value=-1), None, None


def _swap_halves(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((second, first), -1)
