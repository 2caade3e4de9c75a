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
from klab.harness.policy.stacked.native.engine import NativeLayers
from klab.harness.policy.stacked.native.token_trees import rollout_trees
from klab.harness.policy.stacked.native_decoding import KnownStates
from klab.harness.policy.stacked.prefix_tree_layout import PrefixTreeBatch


def score_rollouts(model: StackedModel, rollouts: Sequence[Rollout], options: ScoreOptions) -> list[TokenScores]:
    """Score the rollout of every cell: in compiled layers where the model has them, else those whose trajectories give
    equal shapes in one batch."""
    if model.native is not None and not options.plain:
        return _score_natively(model, model.native, rollouts, options)
    max_shared_row = None if options.plain else MAX_EXPLICIT_KEYS
    trees = [rollout.prefix_tree(max_shared_row) for rollout in rollouts]
    found: dict[int, TokenScores] = {}
    stacks = model.stacks([tree.shape for tree in trees])
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
    return [found[c] for c in range(model.cells)]


def _score_natively(
    model: StackedModel, layers: NativeLayers, rollouts: Sequence[Rollout], options: ScoreOptions
) -> list[TokenScores]:
    known = [_known_states(model, rollout) for rollout in rollouts]
    pairs = zip(known, rollouts, strict=True)
    trees = [each.trees if each else rollout_trees(one.prompts, one.prefixes) for each, one in pairs]
    activations = [None if each is None else each.activations for each in known]
    states = layers.states(model.parameters, trees, activations)
    found = []
    heads = model.lm_head(model.parameters).unbind(0)
    for rollout, hidden, head in zip(rollouts, states, heads, strict=True):
        logits_index = torch.from_numpy(rollout.prefixes.logits_index)
        if _needs_chunks(len(hidden), model, options):
            found.append(_score_in_chunks(rollout, logits_index, hidden, head, options))
        else:
            found.append(gather_scores(rollout, logits_index, hidden @ head, hidden, options))
    return found


def _known_states(model: StackedModel, rollout: Rollout) -> KnownStates | None:
    """What is known of a rollout's tokens where it still holds, for a backward pass; it is used once."""
    known = rollout.known_states
    if not torch.is_grad_enabled() or not isinstance(known, KnownStates) or not known.holds_for(model):
        return None
    rollout.known_states = None
    return known


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
