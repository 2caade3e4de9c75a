"""Filtering of a minibatch: groups that are dropped, tokens excluded from the loss, and the metrics of both.

An update without tokens in its loss changes nothing: no step, no weight decay, no change of coefficients.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from klab.harness.training.data.dynamic_sampling import nonzero_variance_groups
from klab.harness.training.data.experience import Experience
from klab.harness.training.data.minibatch import select_groups
from klab.harness.training.data.overlong import excluded_rows, length_penalties
from klab.harness.training.data.sampler_mismatch import mismatch_metrics
from klab.harness.training.metrics import Row, finite, sampled_figures
from klab.harness.training.packed_cell import PackedCell


def drop_zero_variance(member: PackedCell, minibatch: Experience) -> Experience:
    """The minibatch without its groups of equal rewards, where these are dropped.

    Where none is left it is one group without own tokens, so that packs keep their forward pass.
    """
    if member.cell.training.equal_groups != "drop":
        return minibatch
    groups = nonzero_variance_groups(minibatch.rewards, minibatch.rollout.group_size)
    if groups:
        return select_groups(minibatch, groups)
    one = select_groups(minibatch, [0])
    return replace(one, rollout=replace(one.rollout, mask=torch.zeros_like(one.rollout.mask)))


def loss_mask(member: PackedCell, used: Experience) -> Tensor:
    """bool [N, T], the tokens of the loss; see `klab.harness.objective.TokenBatch.loss_mask`."""
    out = excluded_rows(member, used.rollout)
    return used.rollout.mask if out is None else used.rollout.mask & ~out[:, None]


def has_no_loss_tokens(member: PackedCell, used: Experience) -> bool:
    """Whether dropping groups or masking trajectories has left no token in the loss."""
    training = member.cell.training
    selects = training.equal_groups == "drop" or training.truncated == "mask"
    return selects and not bool(loss_mask(member, used).any())


def filtering_metrics(member: PackedCell, minibatch: Experience, used: Experience) -> Row:
    """Metrics of filtering and sampling; empty for a cell that filters nothing.

    Rewards, lengths and tokens are those of the minibatch before anything left it. With dynamic sampling rewards are
    those of the first draw of the rollout, since its groups were chosen for theirs; `sampled_groups` and
    `sampled_tokens` are what was drawn for the whole rollout, `unused_tokens` what of it the rollout does not have.
    `kept_groups`: left after `equal_groups: drop`.
    `reward_timeouts`: rewards that a limit of time decided.
    `loss_tokens`: in the loss. `overlong`: mean charge for length. See `mismatch_metrics` for the sampler's.
    """
    training, row = member.cell.training, Row()
    if training.equal_groups == "drop":
        row |= sampled_figures(minibatch)
        row["kept_groups"] = len(nonzero_variance_groups(minibatch.rewards, minibatch.rollout.group_size))
    if minibatch.sampling_stats is not None:
        drawn = minibatch.sampling_stats
        row["reward_mean"], row["reward_std"] = finite(drawn.reward_mean), finite(drawn.reward_std)
        row["correct"] = drawn.correct
        row["sampled_groups"], row["sampled_tokens"] = drawn.groups, drawn.tokens
        row["unused_tokens"] = drawn.unused
    if minibatch.timeouts is not None:
        row["reward_timeouts"] = int(minibatch.timeouts.sum())
    if training.equal_groups == "drop" or training.truncated == "mask":
        row["loss_tokens"] = int(loss_mask(member, used).sum())
    if training.overlong_buffer is not None:
        row["overlong"] = float(length_penalties(minibatch.rollout, member).mean())
    if training.sampler is not None and minibatch.old_logprobs is not None:
        rollout = minibatch.rollout
        found = mismatch_metrics(training.sampler, minibatch.old_logprobs, rollout.logp, rollout.mask)
        row |= {name: finite(value) for name, value in found.items()}
    return row
