"""The decoder's layers on stacks of cells with equal sizes, one torch operation at a time.

It serves every architecture, adapters, GPUs and 16-bit weights, and is the reference for the compiled `native/` layers.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from klab.grid.errors import UserError
from klab.harness.policy.ordered_gather import take_rows
from klab.harness.policy.stacked.architecture import Architecture
from klab.harness.policy.stacked.attention import AttentionLayout
from klab.harness.policy.stacked.layers import apply_rotary, embed, linear, rms_norm, swiglu
from klab.harness.policy.stacked.model import StackedModel, Weights


def batched_forward(model: StackedModel, weights: Weights, tokens: Tensor, layout: AttentionLayout) -> Tensor:
    """Final, normalised hidden states [A, K, hidden_size] of the layout's K output tokens per cell.

    Args:
        weights: of A cells.
        tokens: token ids [A, M].
        layout: which token attends to which, and which are output tokens.

    Raises:
        UserError: a sequence exceeds the model's context.
    """
    a = model.architecture
    heads = a.num_heads + 2 * a.num_kv_heads
    if layout.position_limit > a.context_length:
        raise UserError(
            f"sequences of {layout.position_limit} tokens exceed the model's context", value=a.context_length
        )
    rotary = model.rotary(layout.positions, model.dtype, layout.position_limit)
    # one gather takes qkv from (token, head) to (head, row, slot), another takes the attention output back
    head = torch.arange(heads, device=tokens.device)[:, None]
    qkv_index = (layout.token_of_slot * heads + head).view(-1)
    head, stride = head[: a.num_heads, 0], len(layout.token_of_slot)
    attn_index = (layout.slot_of_token[:, None] + head * stride).view(-1)
    output = layout.output_index
    output_attn_index = attn_index
    if output is not None:
        output_attn_index = (layout.slot_of_token[output][:, None] + head * stride).view(-1)
    x = embed(weights["embedding"], tokens)
    for layer in range(a.num_layers):
        last = layer == a.num_layers - 1
        index, chosen = (output_attn_index, output) if last else (attn_index, None)
        inputs = (model, x, weights, layer, layout, rotary, qkv_index, index, chosen)
        if model.gradient_checkpointing and torch.is_grad_enabled():
            x = checkpoint(_layer, *inputs, use_reentrant=False, preserve_rng_state=False)
        else:
            x = _layer(*inputs)
    return rms_norm(x, weights["norm"].unsqueeze(1), a.norm_eps)


def _layer(
    model: StackedModel,
    x: Tensor,
    weights: Weights,
    layer: int,
    layout: AttentionLayout,
    rotary: tuple[Tensor, Tensor],
    qkv_index: Tensor,
    attn_index: Tensor,
    output: Tensor | None,
) -> Tensor:
    """One layer on x [A, M, hidden_size]; with `output`, only those tokens' new states [A, K, hidden_size]."""
    a, A, prefix = model.architecture, len(x), f"layers.{layer}."
    heads, rotated_heads = a.num_heads + 2 * a.num_kv_heads, a.num_heads + a.num_kv_heads
    h = rms_norm(x, weights[prefix + "input_norm"].unsqueeze(1), a.norm_eps)
    qkv = _linear(model, h, weights, prefix + "qkv").view(-1, a.head_dim)
    qkv = take_rows(qkv, qkv_index).view(heads, -1, layout.positions.shape[1], a.head_dim)
    queries_keys, values = torch.split(qkv, [rotated_heads, a.num_kv_heads])
    if a.qk_norm:
        queries_keys = _qk_norm(a, queries_keys, weights[prefix + "q_norm"], weights[prefix + "k_norm"])
    queries, keys = torch.split(apply_rotary(queries_keys, *rotary), [a.num_heads, a.num_kv_heads])
    attn = layout.attend(layer, queries, keys, values).reshape(-1, a.head_dim)
    if output is not None:
        x = take_rows(x.flatten(0, 1), output).view(A, -1, a.hidden_size)
    attn = take_rows(attn, attn_index).view(A, -1, a.num_heads * a.head_dim)
    x = x + _linear(model, attn, weights, prefix + "out")
    h = rms_norm(x, weights[prefix + "mlp_norm"].unsqueeze(1), a.norm_eps)
    return x + _linear(model, swiglu(_linear(model, h, weights, prefix + "gate_up")), weights, prefix + "down")


def _linear(model: StackedModel, x: Tensor, weights: Weights, name: str) -> Tensor:
    out = linear(x, weights[name], weights.get(name + "_bias"))
    return out if model.adapters is None else model.adapters.add_to(out, x, weights, name)


def _qk_norm(a: Architecture, queries_keys: Tensor, query_scale: Tensor, key_scale: Tensor) -> Tensor:
    """RMS norm of each head's queries and keys [heads + kv_heads, A·L, S, head_dim] with scales [A, head_dim]."""
    A = len(query_scale)
    scale = torch.cat((query_scale.expand(a.num_heads, A, -1), key_scale.expand(a.num_kv_heads, A, -1))).unsqueeze(2)
    by_cell = queries_keys.reshape(len(queries_keys), A, -1, a.head_dim)
    return rms_norm(by_cell, scale, a.norm_eps).view(queries_keys.shape)
