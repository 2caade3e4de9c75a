"""Log-probabilities of the tokens of rollouts under a policy, with gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from klab.harness.policy.policy import Policy
from klab.harness.policy.rollout import Rollout
from klab.harness.policy.stacked.attention import MAX_EXPLICIT_KEYS
from klab.harness.policy.stacked.lm_head import max_logits, selective_log_softmax
from klab.harness.policy.stacked.packed_layers import final_states
from klab.harness.policy.stacked.packed_layout import PackedLayout
from klab.harness.policy.stacked.prefix_tree import PrefixTreeBatch

if TYPE_CHECKING:
    from klab.harness.policy.stacked.batched_layers import Weights
    from klab.harness.policy.stacked.policy import StackedPolicy


@dataclass(slots=True)
class TokenScores:
    """One cell's trajectories under a policy; 0 outside own tokens.

    Attributes:
        logp: [N, T], log-probability of each own token; carries the gradient where gradients are enabled.
        entropy: [N, T], entropy in nats of the distribution that each own token was drawn from; without gradient.
        logits: [N, T, V], divided by the temperature; carries the gradient.
        states: [N, T, width], the final hidden state that each own token was drawn from; carries the gradient.
    """

    logp: Tensor
    entropy: Tensor | None = None
    logits: Tensor | None = None
    states: Tensor | None = None


def token_scores(
    policy: Policy,
    rollouts: Sequence[Rollout],
    *,
    temperature: float = 1.0,
    logits: bool = False,
    entropy: bool = False,
    states: bool = False,
    plain: bool = False,
) -> list[TokenScores]:
    """Score every cell's rollout under its policy, one per cell.

    What is computed for a cell depends on that cell alone. Logits are divided by `temperature`, as the sampler does;
    top-p does not enter.

    Args:
        rollouts: one per cell of the policy.
        plain: the reference path: every trajectory forwarded in full, nothing merged.
    """
    if len(rollouts) != policy.cells:
        raise ValueError(f"{len(rollouts)} rollouts for {policy.cells} cells")
    return policy.score(rollouts, temperature=temperature, logits=logits, entropy=entropy, states=states, plain=plain)


def stacked_scores(
    policy: StackedPolicy,
    rollouts: Sequence[Rollout],
    *,
    temperature: float,
    logits: bool,
    entropy: bool,
    states: bool,
    plain: bool,
) -> list[TokenScores]:
    """`token_scores` of stacked cells: cells with short lanes in one layout, where the policy can do that; of the
    others those whose trajectories give equal shapes together, and the rest apart."""
    forests = [rollout.prefix_tree(plain) for rollout in rollouts]
    found: list[TokenScores | None] = [None] * policy.cells
    ragged = policy.packable and not plain
    short = [c for c, f in enumerate(forests) if ragged and f.slots.shape[1] <= MAX_EXPLICIT_KEYS]
    if short:
        layout = PackedLayout(
            short, [forests[c].lanes(policy.dtype) for c in short], policy.architecture.num_heads, policy.cells
        )
        every = policy.head(policy.parameters).unbind(0)
        for c, each in zip(short, final_states(policy, layout).split_with_sizes(layout.kept_sizes), strict=True):
            if not logits and len(each) * policy.vocab_size > max_logits(policy.device):
                state = each if states else None
                found[c] = _chunked(rollouts[c], forests[c].source, each, every[c], temperature, state, entropy)
                continue
            values = each @ every[c]
            tempered = values if temperature == 1.0 else values / temperature
            found[c] = gather_scores(
                rollouts[c], forests[c].source, tempered, each if states else None, logits, entropy
            )
    long = [c for c in range(policy.cells) if found[c] is None]
    stacks = [[long[m] for m in members] for members in policy.stacks([forests[c].shape for c in long])]
    for cells, weights in zip(stacks, policy.weights(stacks), strict=True):
        grove = PrefixTreeBatch([forests[c] for c in cells], policy.device, policy.dtype)
        hidden = policy.hidden_states(weights, grove.tokens, grove)
        sources = [forests[c].source for c in cells]
        kept = [each if states else None for each in hidden.unbind(0)]
        if not logits and hidden.shape[1] * policy.vocab_size > max_logits(policy.device):
            heads = policy.head(weights).unbind(0)
            for c, source, each, head, state in zip(cells, sources, hidden.unbind(0), heads, kept, strict=True):
                found[c] = _chunked(rollouts[c], source, each, head, temperature, state, entropy)
            continue
        scored = _tempered(policy, weights, hidden, temperature)
        for c, source, tempered, state in zip(cells, sources, scored, kept, strict=True):
            found[c] = gather_scores(rollouts[c], source.to(policy.device), tempered, state, logits, entropy)
    return [scores for scores in found if scores is not None]


def _tempered(policy: StackedPolicy, weights: Weights, hidden: Tensor, temperature: float) -> tuple[Tensor, ...]:
    """Tempered logits [K, V] of each cell's kept tokens, at least in float32."""
    values = policy.logits(weights, hidden)
    return (values if temperature == 1.0 else values / temperature).unbind(0)


def _chunked(
    rollout: Rollout,
    source: Tensor,
    hidden: Tensor,
    head: Tensor,
    temperature: float,
    states: Tensor | None,
    entropy: bool,
) -> TokenScores:
    """What `gather_scores` gives, from hidden states [K, hidden], without the logits of all rows at once."""
    mask, device = rollout.mask, hidden.device
    own = mask.cpu().view(-1).nonzero().view(-1)
    rows, order = source.view(-1)[own].sort(stable=True)
    places = own[order].to(device)
    logp, surprise = selective_log_softmax(hidden, head, rows, rollout.tokens.view(-1)[places], temperature, entropy)
    scores = TokenScores(logp.new_zeros(mask.numel()).index_put((places,), logp).view(mask.shape))
    if entropy:
        scores.entropy = torch.where(mask, surprise[source.to(device)], 0.0)
    if states is not None:
        scores.states = _rows(states, source.to(device), mask)
    return scores


def gather_scores(
    rollout: Rollout, source: Tensor, tempered: Tensor, states: Tensor | None, logits: bool, entropy: bool
) -> TokenScores:
    """The scores of a rollout from what was computed once for several of its tokens.

    Args:
        source: int64 [N, T], the row that each own token was drawn from.
        tempered: [K, V], logits divided by the temperature, at least in float32.
        states: [K, width], if they are wanted.
    """
    mask, V = rollout.mask, tempered.shape[-1]
    N, T = mask.shape
    logp = tempered.log_softmax(-1)
    chosen = logp.view(-1).gather(0, (source * V + rollout.tokens).view(-1)).view(N, T)
    scores = TokenScores(torch.where(mask, chosen, 0.0))
    if entropy:
        with torch.no_grad():
            each = -(logp.exp() * logp).nan_to_num(0.0).sum(-1)
            scores.entropy = torch.where(mask, each[source], 0.0)
    if logits:
        scores.logits = _rows(tempered, source, mask)
    if states is not None:
        scores.states = _rows(states, source, mask)
    return scores


def _rows(values: Tensor, source: Tensor, mask: Tensor) -> Tensor:
    """[N, T, …], rows of values [K, …]; 0 outside the mask."""
    rows = values.index_select(0, source.view(-1)).view(*source.shape, -1)
    return torch.where(mask.unsqueeze(-1), rows, 0.0)
