"""The output layer: logits, and log-probabilities of chosen tokens without the logits of all rows at once.

Logits are float32 or wider whatever the weights: products of 16-bit numbers are accumulated in float32 and stay there,
where rounding them to 16 bits would move a logit of 20 by up to 0.04. Gradients are rounded like those of activations.

With z = h·W/τ, log p(token) = z[token] − log Σ exp z, whose gradient is onehot(token) − softmax(z), and the entropy
H = −Σ p·log p has the gradient −p·(log p + H). Chunks of z are computed for the value and once more for its gradient,
so that memory does not grow with rows × vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from klab.harness.policy.scores import max_logits
from klab.harness.policy.stacked.layers import linear

Chunks = list[tuple[int, int, int, int]]
"""Of each chunk: its first and last row, its first and last token."""


def float32_linear(
    x: Float[Tensor, "A K hidden_size"], weight: Float[Tensor, "A hidden_size vocab_size"]
) -> Float[Tensor, "A K vocab_size"]:
    """x times weight, cell by cell, in float32 or wider."""
    if x.dtype not in (torch.float16, torch.bfloat16):
        return linear(x, weight, None)
    out: Tensor = _Float32Linear.apply(x, weight)  # type: ignore[no-untyped-call]
    return out


def selective_log_softmax(
    hidden: Float[Tensor, "K hidden_size"],
    head: Float[Tensor, "hidden_size vocab_size"],
    rows: Int[Tensor, " P"],
    tokens: Int[Tensor, " P"],
    temperature: float,
    entropy: bool,
    entropy_gradient: bool = False,
) -> tuple[Float[Tensor, " P"], Float[Tensor, " K_or_0"]]:
    """Log-probabilities of chosen tokens, and the entropy in nats of every row's distribution, chunk by chunk.

    Args:
        hidden: final hidden states.
        head: the output layer.
        rows: the row that predicts each token, ascending, on the CPU.
        tokens: token ids.
        temperature: divides the logits.
        entropy: whether it is wanted.
        entropy_gradient: whether it carries the gradient.

    Returns:
        log-probabilities, and the entropies of the K rows, or none; float32 or wider.
    """
    K = len(hidden)
    step = max(1, max_logits(hidden.device) // head.shape[1])
    ends = [*range(step, K, step), K]
    bounds = [0, *torch.searchsorted(rows, torch.tensor(ends)).tolist()]
    chunks = list(zip([0, *ends], ends, bounds, bounds[1:], strict=False))
    values = (
        hidden,
        head,
        rows.to(hidden.device, non_blocking=True),
        tokens,
        temperature,
        entropy,
        entropy_gradient,
        chunks,
    )
    found: tuple[Tensor, Tensor] = _SelectiveLogSoftmax.apply(*values)  # type: ignore[no-untyped-call]
    return found


class _SelectiveLogSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        rows: Tensor,
        tokens: Tensor,
        temperature: float,
        entropy: bool,
        entropy_gradient: bool,
        chunks: Chunks,
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        found = hidden.new_empty(len(rows), dtype=wide)
        entropies = hidden.new_zeros(len(hidden) if entropy else 0, dtype=wide)
        for first, last, low, high in chunks:
            logp = _tempered_logits(hidden[first:last], head, temperature).log_softmax(-1)
            found[low:high] = logp[rows[low:high] - first, tokens[low:high]]
            if entropy:
                entropies[first:last] = -logp.exp().mul_(logp).nan_to_num_(0.0).sum(-1)
        ctx.save_for_backward(hidden, head, rows, tokens)
        ctx.temperature, ctx.chunks, ctx.entropies = temperature, chunks, entropies if entropy_gradient else None
        if not entropy_gradient:
            ctx.mark_non_differentiable(entropies)
        return found, entropies

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
        hidden, head, rows, tokens = ctx.saved_tensors
        d_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        d_head = torch.zeros_like(head, dtype=grad.dtype) if ctx.needs_input_grad[1] else None
        for first, last, low, high in ctx.chunks:
            row, given = rows[low:high] - first, grad[low:high] / ctx.temperature
            total = grad.new_zeros(last - first).index_put_((row,), given, accumulate=True)
            logits = _tempered_logits(hidden[first:last], head, ctx.temperature)
            d_logits = logits.softmax(-1).mul_(-total[:, None])
            d_logits = d_logits.index_put_((row, tokens[low:high]), given, accumulate=True)
            if ctx.entropies is not None:
                d_logits += _entropy_slope(logits.log_softmax(-1), ctx.entropies[first:last]).mul_(
                    grad_entropy[first:last, None] / ctx.temperature
                )
            d_logits = d_logits.to(hidden.dtype)
            if d_hidden is not None:
                d_hidden[first:last] = d_logits @ head.t()
            if d_head is not None:
                d_head += hidden[first:last].t() @ d_logits
        return d_hidden, None if d_head is None else d_head.to(head.dtype), *[None] * 6


def _entropy_slope(logp: Tensor, entropy: Tensor) -> Tensor:
    """−p·(log p + H), the gradient of the entropy with respect to the logits."""
    return (-logp.exp()).mul_(logp + entropy[:, None]).nan_to_num_(0.0)


def _tempered_logits(hidden: Tensor, head: Tensor, temperature: float) -> Tensor:
    values = float32_linear(hidden[None], head[None])[0]
    return values if temperature == 1.0 else values.div_(temperature)


class _Float32Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        shared = weight.stride(0) == 0  # all cells see the same memory
        if x.device.type == "cpu":
            return torch.bmm(x.float(), weight[:1].float().expand_as(weight) if shared else weight.float())
        if shared:
            return torch.mm(x.flatten(0, 1), weight[0], out_dtype=torch.float32).view(*x.shape[:2], -1)
        return torch.bmm(x, weight, out_dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        narrow = grad.to(x.dtype)
        d_x = linear(narrow, weight.transpose(1, 2), None) if ctx.needs_input_grad[0] else None
        return d_x, torch.bmm(x.transpose(1, 2), narrow) if ctx.needs_input_grad[1] else None
