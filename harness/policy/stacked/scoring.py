"""Log-probabilities of rollouts under stacked models, with every shared prefix forwarded once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from klab.harness.policy.ordered_gather import take_rows
from klab.harness.policy.rollout import Rollout
from klab.harness.policy.scores import ScoreOptions, TokenScores, gather_rows, gather_scores, max_logits
from klab.harness.policy.stacked.attention import MAX_EXPLICIT_KEYS
from klab.harness.policy.stacked.batched_layers import batched_forward
from klab.harness.policy.stacked.lm_head import selective_log_softmax
from klab.harness.policy.stacked.model import StackedModel
from klab.harness.policy.stacked.packed_layers import packed_forward
from klab.harness.policy.stacked.packed_layout import PackedLayout
from klab.harness.policy.stacked.prefix_tree_layout import PrefixTreeBatch, attention_rows


def score_rollouts(model: StackedModel, rollouts: Sequence[Rollout], options: ScoreOptions) -> list[TokenScores]:
    """Score the rollout of every cell.

    Cells with short rows are computed in one packed layout, where the model supports that; of the others, those whose
    trajectories give equal shapes in one batch.
    """
    max_shared_row = None if options.plain else MAX_EXPLICIT_KEYS
    trees = [rollout.prefix_tree(max_shared_row) for rollout in rollouts]
    found: list[TokenScores | None] = [None] * model.cells
    packed = [
        c
        for c, tree in enumerate(trees)
        if model.packable and not options.plain and tree.token_of_slot.shape[1] <= MAX_EXPLICIT_KEYS
    ]
    if packed:
        rows = [attention_rows(trees[c], model.dtype) for c in packed]
        layout = PackedLayout(packed, rows, model.architecture.num_heads, model.cells)
        heads = model.lm_head(model.parameters).unbind(0)
        states = packed_forward(model, layout).split_with_sizes(layout.output_sizes)
        for c, hidden in zip(packed, states, strict=True):
            if _needs_chunks(len(hidden), model, options):
                found[c] = _score_in_chunks(rollouts[c], trees[c].logits_index, hidden, heads[c], options)
            else:
                found[c] = gather_scores(rollouts[c], trees[c].logits_index, hidden @ heads[c], hidden, options)
    others = [c for c in range(model.cells) if found[c] is None]
    stacks = [[others[m] for m in members] for members in model.stacks([trees[c].shape for c in others])]
    for cells, weights in zip(stacks, model.weights(stacks), strict=True):
        batch = PrefixTreeBatch([trees[c] for c in cells], model.device, model.dtype)
        hidden = batched_forward(model, weights, batch.tokens, batch)
        if _needs_chunks(hidden.shape[1], model, options):
            heads = model.lm_head(weights).unbind(0)
            for c, each, head in zip(cells, hidden.unbind(0), heads, strict=True):
                found[c] = _score_in_chunks(rollouts[c], trees[c].logits_index, each, head, options)
            continue
        logits = model.logits(weights, hidden)
        for c, each, state in zip(cells, logits.unbind(0), hidden.unbind(0), strict=True):
            found[c] = gather_scores(
                rollouts[c], trees[c].logits_index.to(model.device, non_blocking=True), each, state, options
            )
    return [scores for scores in found if scores is not None]


def _needs_chunks(rows: int, model: StackedModel, options: ScoreOptions) -> bool:
    """Whether the logits of a cell's rows are too many to hold at once; they are held if the caller wants them."""
    return not options.logits and rows * model.vocab_size > max_logits(model.device)


def _score_in_chunks(
    rollout: Rollout, logits_index: Tensor, hidden: Tensor, head: Tensor, options: ScoreOptions
) -> TokenScores:
    """What `gather_scores` gives, from hidden states [K, hidden_size] and without the logits of all rows at once."""
    mask, device = rollout.mask, hidden.device
    own = rollout.on_host.mask.view(-1).nonzero().view(-1)
    rows, order = logits_index.view(-1)[own].sort(stable=True)
    places = own[order].to(device, non_blocking=True)
    logits_index = logits_index.to(device, non_blocking=True)
    tokens = rollout.tokens.view(-1)[places]
    logp, entropy = selective_log_softmax(
        hidden, head, rows, tokens, options.temperature, options.entropy, options.entropy_gradient
    )
    scores = TokenScores(logp.new_zeros(mask.numel()).index_put((places,), logp).view(mask.shape))
    if options.entropy:
        scores.entropy = torch.where(mask, take_rows(entropy, logits_index.view(-1)).view(mask.shape), 0.0)
    if options.states:
        scores.states = gather_rows(hidden, logits_index, mask)
    return scores
