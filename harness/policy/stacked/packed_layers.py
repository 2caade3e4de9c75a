"""Decoder layers over a packed layout: cells of unequal sizes in one flat token axis, with hand-written gradients.

What works on single tokens (norms, rotary embedding, activations, gathers) is one operation over all cells' tokens
`[M, hidden_size]`; products use each cell's own weights on its segment, and attention is computed matrix by matrix,
with the shapes that the cell has alone. So the bits of a cell's result do not depend on the cells that it is packed
with, cells need not agree in any size, no weights are copied together, and a layer is one node of the autograd graph.

`batched_layers.py` is the reference: the same arithmetic, operation by operation, on cells of equal sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from klab.grid.errors import UserError
from klab.harness.policy.stacked.attention import MAX_EXPLICIT_KEYS, attention
from klab.harness.policy.stacked.grouped_ops import (
    grouped_linear,
    grouped_linear_backward,
    grouped_scale,
    rms_norm_backward,
    rms_normalize,
    rotate_,
)
from klab.harness.policy.stacked.layer_weights import LayerWeights
from klab.harness.policy.stacked.model import StackedModel
from klab.harness.policy.stacked.packed_layout import AttentionBatch, PackedLayout


class Activations(NamedTuple):
    """What the backward pass of a layer needs; `probs` are each attention batch's weights [num_matrices, S, K]."""

    y1: Tensor
    inverse_rms1: Tensor
    h1: Tensor
    gathered_qkv: Tensor
    attn: Tensor
    y2: Tensor
    inverse_rms2: Tensor
    h2: Tensor
    gate_up: Tensor
    silu: Tensor
    act: Tensor
    probs: tuple[Tensor, ...]


def layer_forward(
    x: Tensor,
    weights: LayerWeights,
    layout: PackedLayout,
    rotary: tuple[Tensor, Tensor],
    eps: float,
    last: bool,
    cache: Tensor | None = None,
) -> tuple[Tensor, Activations]:
    """One layer: x [M, hidden_size] -> [M, hidden_size], or the output tokens' [J, hidden_size] after the last.

    Args:
        rotary: cosines and sines [M, 1, head_dim] at the tokens' positions, see `RotaryEmbedding`.
        last: whether this is the model's last layer.
        cache: [capacity, 3 · heads · head_dim], queries, keys and values of all tokens so far, to which the new ones
            are added in place.
    """
    heads, head_dim, segments = layout.num_heads, rotary[0].shape[-1], layout.segments
    y1, inverse_rms1 = rms_normalize(x, eps)
    h1 = grouped_scale(y1, weights.input_norm, segments)
    qkv = grouped_linear(h1, weights.qkv, weights.qkv_bias, segments)
    rotate_(qkv.view(-1, 3 * heads, head_dim)[:, : 2 * heads], *rotary)
    if cache is not None:
        cache[layout.start : layout.start + len(qkv)] = qkv
        qkv = cache
    gathered_qkv = qkv.view(-1, head_dim).index_select(0, layout.qkv_index)
    attn_rows = x.new_empty(layout.attn_rows, head_dim)
    probs = [_attention_forward(batch, gathered_qkv, attn_rows) for batch in layout.batches]
    attn_index = layout.attn_index
    if last and layout.output_index is not None:
        x = x.index_select(0, layout.output_index)
        attn_index, segments = layout.output_attn_index, layout.output_segments
    attn = attn_rows.index_select(0, attn_index).view(-1, heads * head_dim)
    x = grouped_linear(attn, weights.out, weights.out_bias, segments).add_(x)
    y2, inverse_rms2 = rms_normalize(x, eps)
    h2 = grouped_scale(y2, weights.mlp_norm, segments)
    gate_up = grouped_linear(h2, weights.gate_up, weights.gate_up_bias, segments)
    gate, up = gate_up.chunk(2, -1)
    silu = functional.silu(gate)
    act = silu * up
    x = grouped_linear(act, weights.down, weights.down_bias, segments).add_(x)
    return x, Activations(
        y1, inverse_rms1, h1, gathered_qkv, attn, y2, inverse_rms2, h2, gate_up, silu, act, tuple(probs)
    )


def _attention_forward(batch: AttentionBatch, gathered_qkv: Tensor, attn_rows: Tensor) -> Tensor:
    """Write a batch's attention output; return its weights [num_matrices, S, K], empty where rows are long."""
    cells, heads, L, S, K = batch.shape
    queries, keys, values = batch.split_qkv(gathered_qkv)
    out = attn_rows[batch.output_slice].view(batch.num_matrices, S, -1)
    if K > MAX_EXPLICIT_KEYS:
        shape = (heads, cells * L, -1, gathered_qkv.shape[1])
        found = attention(queries.view(shape), keys.view(shape), values.view(shape), batch.attn_bias[0, 0])
        out.copy_(found.view_as(out))
        return gathered_qkv.new_empty(0)
    scores = torch.bmm(queries, keys.transpose(1, 2)).view(batch.shape)
    scaled = torch.add(batch.attn_bias, scores, alpha=gathered_qkv.shape[1] ** -0.5)
    probs = scaled.softmax(-1).view(batch.num_matrices, S, K)
    torch.bmm(probs, values, out=out)
    return probs


def _attention_backward(
    batch: AttentionBatch, gathered_qkv: Tensor, probs: Tensor, d_attn: Tensor, d_gathered: Tensor
) -> None:
    """Write the gradients of a batch's queries, keys and values."""
    queries, keys, values = batch.split_qkv(gathered_qkv)
    d_queries, d_keys, d_values = batch.split_qkv(d_gathered)
    d_out = d_attn[batch.output_slice].view_as(queries)
    torch.bmm(probs.transpose(1, 2), d_out, out=d_values)
    d_probs = torch.bmm(d_out, values.transpose(1, 2))
    # torch has no public function for the gradient of a softmax given its output; autograd calls this one
    d_scores = torch.ops.aten._softmax_backward_data(d_probs, probs, -1, probs.dtype)
    d_scores.mul_(gathered_qkv.shape[1] ** -0.5)
    torch.bmm(d_scores, keys, out=d_queries)
    torch.bmm(d_scores.transpose(1, 2), queries, out=d_keys)


def layer_backward(
    grad: Tensor,
    weights: LayerWeights,
    layout: PackedLayout,
    rotary: tuple[Tensor, Tensor],
    last: bool,
    acts: Activations,
) -> tuple[Tensor, LayerWeights]:
    """Gradients of a layer's input [M, hidden_size] and of its parameters, from those of its output."""
    heads, head_dim = layout.num_heads, acts.gathered_qkv.shape[1]
    chosen = last and layout.output_index is not None
    segments = layout.output_segments if chosen else layout.segments
    d_act, d_down, d_down_bias = grouped_linear_backward(grad, acts.act, weights.down, weights.down_bias, segments)
    gate, up = acts.gate_up.chunk(2, -1)
    d_gate_up = torch.empty_like(acts.gate_up)
    d_gate, d_up = d_gate_up.chunk(2, -1)
    torch.mul(d_act, acts.silu, out=d_up)
    # the public functions of torch do not include the gradient of silu either
    torch.ops.aten.silu_backward.grad_input(d_act.mul_(up), gate, grad_input=d_gate)
    d_h, d_gate_up_weight, d_gate_up_bias = grouped_linear_backward(
        d_gate_up, acts.h2, weights.gate_up, weights.gate_up_bias, segments
    )
    grad, d_mlp_norm = rms_norm_backward(grad, d_h, acts.y2, acts.inverse_rms2, weights.mlp_norm, segments)
    d_attn, d_out, d_out_bias = grouped_linear_backward(grad, acts.attn, weights.out, weights.out_bias, segments)
    d_attn_rows = grad.new_zeros(layout.attn_rows, head_dim)
    d_attn_rows.index_add_(0, layout.output_attn_index if chosen else layout.attn_index, d_attn.view(-1, head_dim))
    total = len(layout.qkv_index)
    d_gathered = grad.new_empty(total + 1, head_dim)
    for batch, probs in zip(layout.batches, acts.probs, strict=True):
        _attention_backward(batch, acts.gathered_qkv, probs, d_attn_rows, d_gathered)
    if layout.qkv_inverse_index is not None:
        d_gathered[total] = 0.0
        d_qkv = d_gathered.index_select(0, layout.qkv_inverse_index).view(-1, 3 * heads * head_dim)
    else:
        d_qkv = grad.new_zeros(len(layout.tokens) * 3 * heads, head_dim)
        d_qkv = d_qkv.index_add_(0, layout.qkv_index, d_gathered[:total]).view(-1, 3 * heads * head_dim)
    rotate_(d_qkv.view(-1, 3 * heads, head_dim)[:, : 2 * heads], rotary[0], rotary[1], inverse=True)
    d_h, d_qkv_weight, d_qkv_bias = grouped_linear_backward(
        d_qkv, acts.h1, weights.qkv, weights.qkv_bias, layout.segments
    )
    if chosen:
        assert layout.output_index is not None
        grad = grad.new_zeros(len(layout.tokens), grad.shape[1]).index_add_(0, layout.output_index, grad)
    d_x, d_input_norm = rms_norm_backward(grad, d_h, acts.y1, acts.inverse_rms1, weights.input_norm, layout.segments)
    return d_x, LayerWeights(
        input_norm=d_input_norm,
        qkv=d_qkv_weight,
        qkv_bias=d_qkv_bias,
        out=d_out,
        out_bias=d_out_bias,
        mlp_norm=d_mlp_norm,
        gate_up=d_gate_up_weight,
        gate_up_bias=d_gate_up_bias,
        down=d_down,
        down_bias=d_down_bias,
    )


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        layout: PackedLayout,
        rotary: tuple[Tensor, Tensor],
        eps: float,
        last: bool,
        x: Tensor,
        *weights: Tensor | None,
    ) -> Tensor:
        out, acts = layer_forward(x, LayerWeights._make(weights), layout, rotary, eps, last)
        ctx.save_for_backward(*weights, *acts[:-1], *acts.probs)
        ctx.constants = layout, rotary, last
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        layout, rotary, last = ctx.constants
        parameters = len(LayerWeights._fields)
        weights, saved = LayerWeights._make(ctx.saved_tensors[:parameters]), ctx.saved_tensors[parameters:]
        single = len(Activations._fields) - 1
        acts = Activations._make((*saved[:single], saved[single:]))
        d_x, gradients = layer_backward(grad.contiguous(), weights, layout, rotary, last, acts)
        return (None, None, None, None, d_x, *gradients)


class _FinalNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, layout: PackedLayout, eps: float, x: Tensor, scale: Tensor) -> Tensor:
        y, inverse_rms = rms_normalize(x, eps)
        ctx.save_for_backward(y, inverse_rms, scale)
        ctx.segments = layout.output_segments
        return grouped_scale(y, scale, layout.output_segments)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        y, inverse_rms, scale = ctx.saved_tensors
        d_x, d_scale = rms_norm_backward(y.new_zeros(()), grad.clone(), y, inverse_rms, scale, ctx.segments)
        return None, None, d_x, d_scale


def layer(
    x: Tensor,
    weights: Sequence[Tensor | None],
    layout: PackedLayout,
    rotary: tuple[Tensor, Tensor],
    eps: float,
    last: bool,
) -> Tensor:
    """`layer_forward` with gradients; those of a cell without tokens are zero."""
    out: Tensor = _Layer.apply(layout, rotary, eps, last, x, *weights)  # type: ignore[no-untyped-call]
    return out


def final_norm(x: Tensor, scale: Tensor, layout: PackedLayout, eps: float) -> Tensor:
    """RMS norm of the output tokens' states x [J, hidden_size], with each cell's scale [C, hidden_size]."""
    out: Tensor = _FinalNorm.apply(layout, eps, x, scale)  # type: ignore[no-untyped-call]
    return out


def packed_forward(model: StackedModel, layout: PackedLayout, caches: Sequence[Tensor] | None = None) -> Tensor:
    """Final, normalised hidden states [J, hidden_size] of a layout's output tokens, cell after cell.

    Args:
        caches: by layer, see `layer_forward`; only without gradient.

    Raises:
        UserError: a sequence exceeds the model's context.
    """
    a, parameters = model.architecture, model.parameters
    if layout.position_limit > a.context_length:
        raise UserError(
            f"sequences of {layout.position_limit} tokens exceed the model's context", value=a.context_length
        )
    cosines, sines = model.rotary(layout.positions, model.dtype, layout.position_limit)
    rotary = cosines.unsqueeze(1), sines.unsqueeze(1)
    x = layout.embed(parameters["embedding"])
    for number in range(a.num_layers):
        weights, last = LayerWeights.of_layer(parameters, number), number == a.num_layers - 1
        if torch.is_grad_enabled():
            x = layer(x, weights, layout, rotary, a.norm_eps, last)
        else:
            cache = None if caches is None else caches[number]
            x, _ = layer_forward(x, weights, layout, rotary, a.norm_eps, last, cache)
    return final_norm(x, parameters["norm"], layout, a.norm_eps)
