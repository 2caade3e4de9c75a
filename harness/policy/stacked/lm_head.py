"""The output layer: logits, and log-probabilities of single tokens without the logits of all rows at once.

Logits are at least float32 whatever the weights: products of 16-bit numbers are accumulated in float32 and stay there,
where rounding them to 16 bits would move a logit of 20 by up to 0.04. Gradients are rounded like all activations'.

With z = h·W/τ, ℓ = z[token] − log Σ exp z: dℓ/dz = onehot(token) − softmax(z). Chunks of z are computed for ℓ and once
more for its gradient, so that memory does not grow with rows × vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from klab.harness.policy.stacked.layers import linear

CHUNKS = {"cpu": 2**24, "cuda": 2**28}
"""Logits held at once, by kind of device, each in two or three tensors of 4 or 8 bytes."""

Plan = list[tuple[int, int, int, int]]
"""For each chunk: its first and last row, first and last token."""


def max_logits(device: torch.device) -> int:
    """Logits held at once on a device."""
    return CHUNKS.get(device.type, CHUNKS["cuda"])


def float32_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [A, K, hidden] times weight [A, hidden, V], at least in float32."""
    if x.dtype not in (torch.float16, torch.bfloat16):
        return linear(x, weight, None)
    out: Tensor = _WideProduct.apply(x, weight)  # type: ignore[no-untyped-call]
    return out


def selective_log_softmax(
    hidden: Tensor, head: Tensor, rows: Tensor, tokens: Tensor, temperature: float, entropy: bool
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of tokens after some rows, and the entropy in nats of every row, without gradient.

    Args:
        hidden: [K, hidden].
        head: [hidden, V].
        rows: int64 [P], ascending, on the CPU: the row before each token.
        tokens: int64 [P].
        temperature: divides the logits.

    Returns:
        [P], and [K] or empty; at least in float32.
    """
    K = len(hidden)
    step = max(1, max_logits(hidden.device) // head.shape[1])
    ends = [*range(step, K, step), K]
    bounds = [0, *torch.searchsorted(rows, torch.tensor(ends)).tolist()]
    plan = list(zip([0, *ends], ends, bounds, bounds[1:], strict=False))
    values = (hidden, head, rows.to(hidden.device), tokens, temperature, entropy, plan)
    found: tuple[Tensor, Tensor] = _Picked.apply(*values)  # type: ignore[no-untyped-call]
    return found


class _Picked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        rows: Tensor,
        tokens: Tensor,
        temperature: float,
        entropy: bool,
        plan: Plan,
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        found = hidden.new_empty(len(rows), dtype=wide)
        surprise = hidden.new_zeros(len(hidden) if entropy else 0, dtype=wide)
        for first, last, low, high in plan:
            logp = _tempered(hidden[first:last], head, temperature).log_softmax(-1)
            found[low:high] = logp[rows[low:high] - first, tokens[low:high]]
            if entropy:
                surprise[first:last] = -logp.exp().mul_(logp).nan_to_num_(0.0).sum(-1)
        ctx.save_for_backward(hidden, head, rows, tokens)
        ctx.temperature, ctx.plan = temperature, plan
        ctx.mark_non_differentiable(surprise)
        return found, surprise

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, head, rows, tokens = ctx.saved_tensors
        for_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for_head = torch.zeros_like(head, dtype=grad.dtype) if ctx.needs_input_grad[1] else None
        for first, last, low, high in ctx.plan:
            at, given = rows[low:high] - first, grad[low:high] / ctx.temperature
            total = grad.new_zeros(last - first).index_put_((at,), given, accumulate=True)
            slope = _tempered(hidden[first:last], head, ctx.temperature).softmax(-1).mul_(-total[:, None])
            slope = slope.index_put_((at, tokens[low:high]), given, accumulate=True).to(hidden.dtype)
            if for_hidden is not None:
                for_hidden[first:last] = slope @ head.t()
            if for_head is not None:
                for_head += hidden[first:last].t() @ slope
        return for_hidden, None if for_head is None else for_head.to(head.dtype), None, None, None, None, None


def _tempered(hidden: Tensor, head: Tensor, temperature: float) -> Tensor:
    values = float32_linear(hidden[None], head[None])[0]
    return values if temperature == 1.0 else values.div_(temperature)


class _WideProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        if x.device.type == "cpu":
            return torch.bmm(x.float(), weight[:1].float().expand_as(weight) if _shared(weight) else weight.float())
        if _shared(weight):
            return torch.mm(x.flatten(0, 1), weight[0], out_dtype=torch.float32).view(*x.shape[:2], -1)
        return torch.bmm(x, weight, out_dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        narrow = grad.to(x.dtype)
        for_x = linear(narrow, weight.transpose(1, 2), None) if ctx.needs_input_grad[0] else None
        return for_x, torch.bmm(x.transpose(1, 2), narrow) if ctx.needs_input_grad[1] else None


def _shared(weight: Tensor) -> bool:
    """Whether all cells see the same memory."""
    return weight.stride(0) == 0
