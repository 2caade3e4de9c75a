"""The loss of a critic, and what is measured about it."""

from __future__ import annotations

import torch
from torch import Tensor

from klab.harness.objective.aggregate import Totals, token_mean
from klab.harness.objective.masking import masked


def value_loss(
    values: Tensor, old: Tensor, targets: Tensor, mask: Tensor, totals: Totals, clip: float | None
) -> Tensor:
    """½·max((V − R̂)², (clip(V, V_old ± clip) − R̂)²), a mean over the update's own tokens, as PPO's released code.

    A value that has moved further than `clip` from V_old towards its target has no gradient.

    Args:
        values: V `[n, T]` with gradient, of some rows of the update.
        old: V_old `[n, T]`, at the rollout.
        targets: R̂ `[n, T]`.
        mask: own tokens of these rows, bool `[n, T]`.
        totals: of the whole update; the losses of its micro-batches add up.
        clip: None does not clip.
    """
    errors, _ = _errors(masked(values, mask), masked(old, mask), masked(targets, mask), clip)
    return token_mean(masked(0.5 * errors, mask), mask, totals)


def value_metrics(values: Tensor, old: Tensor, targets: Tensor, mask: Tensor, clip: float | None) -> dict[str, float]:
    """Over own tokens: `explained_variance`, 1 − Var(R̂ − V)/Var(R̂), NaN where all targets are equal; and
    `value_clip_fraction`, the share of values without gradient."""
    if not bool(mask.any()):
        return {"explained_variance": float("nan"), "value_clip_fraction": 0.0}
    clipped = _errors(values, old, targets, clip)[1][mask]
    wanted, error = targets[mask].double(), (targets - values)[mask].double()
    spread = wanted.var(correction=0)
    explained = torch.where(spread > 0, 1.0 - error.var(correction=0) / spread, torch.nan)
    return {"explained_variance": float(explained), "value_clip_fraction": float(clipped.double().mean())}


def _errors(values: Tensor, old: Tensor, targets: Tensor, clip: float | None) -> tuple[Tensor, Tensor]:
    """The larger squared error, and where it is that of the clipped value; `[n, T]`."""
    plain = (values - targets).square()
    if clip is None:
        return plain, torch.zeros_like(plain, dtype=torch.bool)
    moved = values - old
    near = (old + moved.clamp(-clip, clip) - targets).square()
    clipped = (moved.abs() > clip) & (near > plain)
    return torch.where(clipped, near, plain), clipped
