"""The output layer of a transformers model: log-probabilities without the logits of all rows at once.

Models may change what their output embedding gives: Gemma 2 caps logits (c·tanh(z/c)), Cohere multiplies them, Granite
divides them. Which of these a model does is found by handing it made-up logits and looking at what comes out, so that
log-probabilities are those of the whole logits. Of a model that does anything else the whole logits are kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from klab.harness.policy.scores import entropy_of, max_logits

Finish = Callable[[Tensor], Tensor]
"""What a model makes of the products of its output embedding, element by element."""

_LARGEST_MADE_UP = 50.0


def known_finish(head: nn.Module, config: Any, logits_of: Callable[[Tensor], Tensor]) -> Finish | None:
    """How a model finishes its logits; None where it is not one of the known ways.

    Args:
        head: its output embedding.
        config: its transformers configuration, for text.
        logits_of: the model's logits where the output embedding gives these numbers [1, 2, vocab_size].
    """
    if type(head) is not nn.Linear:
        return None
    vocabulary, dtype = head.weight.shape[0], head.weight.dtype
    given = torch.linspace(-_LARGEST_MADE_UP, _LARGEST_MADE_UP, 2 * vocabulary).view(1, 2, vocabulary).to(dtype)
    given = given.to(head.weight.device)
    found = logits_of(given)
    for finish in _candidates(config):
        expected = finish(given).to(found.dtype)
        if found.shape == expected.shape and torch.equal(found, expected):
            return lambda products: finish(products).to(found.dtype)
    return None


def _candidates(config: Any) -> list[Finish]:
    found: list[Finish] = [lambda z: z]
    cap, factor, divisor = (
        getattr(config, name, None) for name in ("final_logit_softcapping", "logit_scale", "logits_scaling")
    )
    if cap:
        found.append(lambda z: torch.tanh(z / cap) * cap)
    if factor:
        found.append(lambda z: z * factor)
    if divisor:
        found.append(lambda z: z / divisor)
    return found


def chunked_log_softmax(
    hidden: Float[Tensor, "K hidden_size"],
    weight: Float[Tensor, "vocab_size hidden_size"],
    bias: Float[Tensor, " vocab_size"] | None,
    finish: Finish,
    tokens: Int[Tensor, " K"],
    temperature: float,
    entropy: bool,
    entropy_gradient: bool = False,
) -> tuple[Float[Tensor, " K"], Float[Tensor, " K_or_0"]]:
    """Log-probability of one token per row, with gradient, and the entropy in nats of each row's distribution.

    Logits are computed chunk by chunk as the model computes them, rounded to its precision, and once more for the
    gradient, so that memory does not grow with K × vocab_size.

    Args:
        hidden: final hidden states.
        weight, bias: the output embedding's.
        temperature: divides the logits.
        entropy: whether it is wanted.
        entropy_gradient: whether it carries the gradient.
    """
    given = (hidden, weight, bias, finish, tokens, temperature, entropy, entropy_gradient)
    found: tuple[Tensor, Tensor] = _ChunkedLogSoftmax.apply(*given)  # type: ignore[no-untyped-call]
    return found


def _log_softmax(products: Tensor, finish: Finish, temperature: float) -> Tensor:
    logits = finish(products)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return (logits if temperature == 1.0 else logits / temperature).log_softmax(-1)


def _chunks(hidden: Tensor, weight: Tensor) -> list[slice]:
    step = max(1, max_logits(hidden.device) // weight.shape[0])
    return [slice(start, start + step) for start in range(0, len(hidden), step)]


class _ChunkedLogSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        finish: Finish,
        tokens: Tensor,
        temperature: float,
        entropy: bool,
        entropy_gradient: bool,
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        chosen = hidden.new_empty(len(hidden), dtype=wide)
        entropies = hidden.new_empty(len(hidden) if entropy else 0, dtype=wide)
        for rows in _chunks(hidden, weight):
            logp = _log_softmax(nn.functional.linear(hidden[rows], weight, bias), finish, temperature)
            chosen[rows] = logp.gather(1, tokens[rows, None])[:, 0]
            if entropy:
                entropies[rows] = -logp.exp().mul_(logp).nan_to_num_(0.0).sum(-1)
        ctx.save_for_backward(hidden, weight, bias, tokens)
        ctx.finish, ctx.temperature, ctx.entropy_gradient = finish, temperature, entropy_gradient
        if not entropy_gradient:
            ctx.mark_non_differentiable(entropies)
        return chosen, entropies

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, tokens = ctx.saved_tensors
        d_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        d_weight = torch.zeros_like(weight, dtype=grad.dtype) if ctx.needs_input_grad[1] else None
        d_bias = torch.zeros_like(bias, dtype=grad.dtype) if bias is not None and ctx.needs_input_grad[2] else None
        for rows in _chunks(hidden, weight):
            products = nn.functional.linear(hidden[rows], weight, bias).requires_grad_()
            with torch.enable_grad():
                logp = _log_softmax(products, ctx.finish, ctx.temperature)
                found, given = [logp.gather(1, tokens[rows, None])], [grad[rows, None]]
                if ctx.entropy_gradient:
                    found.append(entropy_of(logp))
                    given.append(grad_entropy[rows])
            (d_products,) = torch.autograd.grad(found, products, given)
            if d_hidden is not None:
                d_hidden[rows] = d_products @ weight
            if d_weight is not None:
                d_weight += d_products.t() @ hidden[rows]
            if d_bias is not None:
                d_bias += d_products.sum(0)
        narrow = None if d_weight is None else d_weight.to(weight.dtype)
        return d_hidden, narrow, None if d_bias is None else d_bias.to(bias.dtype), *[None] * 5
