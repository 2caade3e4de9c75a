"""The value loss of a critic, and its metrics."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from klab.harness.objective.aggregate import Totals, token_mean
from klab.harness.objective.masking import masked


def value_loss(
    values: Float[Tensor, "n T"],
    old: Float[Tensor, "n T"],
    targets: Float[Tensor, "n T"],
    mask: Bool[Tensor, "n T"],
    totals: Totals,
    clip: float | None,
) -> Float[Tensor, ""]:
    """½·max((V − R̂)², (clip(V, V_old ± clip) − R̂)²), a mean over the update's own tokens (the code of
    Schulman et al. 2017).

    A value that has moved further than `clip` from V_old towards its target has no gradient.

    Args:
        values: V with gradient, of some rows of the update.
        old: V_old, the values when the rollout was drawn.
        targets: R̂.
        mask: own tokens of these rows.
        totals: of the whole update; the losses of its micro-batches add up to that of the whole.
        clip: how far V may move from V_old before its gradient is 0; None does not clip.
    """
    errors, _ = _squared_errors(masked(values, mask), masked(old, mask), masked(targets, mask), clip)
    return token_mean(masked(0.5 * errors, mask), mask, totals)


def value_metrics(
    values: Float[Tensor, "n T"],
    old: Float[Tensor, "n T"],
    targets: Float[Tensor, "n T"],
    mask: Bool[Tensor, "n T"],
    clip: float | None,
) -> dict[str, float]:
    """Over own tokens: `explained_variance`, 1 − Var(R̂ − V)/Var(R̂), NaN where all targets are equal; and
    `value_clip_fraction`, the share of values without gradient."""
    if not bool(mask.any()):
        return {"explained_variance": float("nan"), "value_clip_fraction": 0.0}
    clipped = _squared_errors(values, old, targets, clip)[1][mask]
    wanted, error = targets[mask].double(), (targets - values)[mask].double()
    spread = wanted.var(correction=0)
    explained = torch.where(spread > 0, 1.0 - error.var(correction=0) / spread, torch.nan)
    return {"explained_variance": float(explained), "value_clip_fraction": float(clipped.double().mean())}


def _squared_errors(
    values: Float[Tensor, "n T"], old: Float[Tensor, "n T"], targets: Float[Tensor, "n T"], clip: float | None
) -> tuple[Float[Tensor, "n T"], Bool[Tensor, "n T"]]:
    """The larger of the two squared errors, and where that is the clipped value's."""
    plain = (values - targets).square()
    if clip is None:
        return plain, torch.zeros_like(plain, dtype=torch.bool)
    moved = values - old
    near = (old + moved.clamp(-clip, clip) - targets).square()
    clipped = (moved.abs() > clip) & (near > plain)
    return torch.where(clipped, near, plain), clipped
