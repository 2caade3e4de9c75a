"""What an update measures about itself, over its own tokens."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import compress

import torch
from torch import Tensor

from klab.harness.objective.kl import behaviour_kl, k1, k2, k3


@dataclass(frozen=True)
class TokenStats:
    """Per-token quantities of an update, without gradient; `[N, T]` and 0 off the own tokens where not said otherwise.

    Attributes:
        log_ratio: λ, to the behaviour policy.
        log_ratio_reference: κ, to the reference policy.
        ratio: ρ (1 off the own tokens).
        weight: w (anything off the own tokens).
        advantage: A.
        mask: own tokens, bool.
        groups: int `[N]`.
    """

    log_ratio: Tensor
    log_ratio_reference: Tensor
    ratio: Tensor
    weight: Tensor
    advantage: Tensor
    mask: Tensor
    groups: Tensor


@torch.no_grad()
def update_metrics(seen: TokenStats, **losses: Tensor) -> dict[str, float]:
    """The metrics of an update as plain numbers; all 0 without own tokens.

    `k1`, `k2`, `k3`: mean estimate per own token of KL(π‖π_ref). `kl_behaviour`: of KL(π_old‖π), by k3 on tokens of
    π_old. `ratio_mean`, `ratio_max`: of ρ. `ess`: (Σw)²/(n·Σw²), 0 when every weight is 0. `weight_mean`;
    `clip_fraction`: share of weights that are 0. `informative_groups`: share of the groups with an advantage other than
    0. `advantage_mean`, `advantage_std` (population).

    Args:
        losses: scalars to report beside them, by name.
    """
    own = seen.mask.flatten().nonzero().squeeze(1)
    if not own.numel():
        return dict.fromkeys(_NAMES, 0.0) | {name: float(value) for name, value in losses.items()}
    log_ratio, kappa, ratio, weight, advantage = (
        values.take(own)
        for values in (seen.log_ratio, seen.log_ratio_reference, seen.ratio, seen.weight, seen.advantage)
    )
    square = weight.square().sum() * weight.numel()
    means = {
        "k1": k1(kappa),
        "k2": k2(kappa),
        "k3": k3(kappa),
        "kl_behaviour": behaviour_kl(log_ratio),
        "ratio_mean": ratio,
        "weight_mean": weight,
        "clip_fraction": (weight == 0).to(weight.dtype),
        "advantage_mean": advantage,
    }
    others = {
        **losses,
        "ratio_max": ratio.max(),
        "ess": torch.where(square == 0, 0.0, weight.sum().square() / square),
        "informative_groups": advantage.new_tensor(_informative(seen)),
        "advantage_std": advantage.std(correction=0),
    }
    figures = torch.cat([torch.stack([*means.values()]).mean(1), torch.stack([*others.values()])])
    return dict(zip([*means, *others], figures.double().tolist(), strict=True))


def _informative(seen: TokenStats) -> float:
    """The share of the groups with an advantage other than 0."""
    groups, told = seen.groups.tolist(), ((seen.advantage != 0) & seen.mask).any(1).tolist()
    return len(set(compress(groups, told))) / len(set(groups))


_NAMES = (
    "k1", "k2", "k3", "kl_behaviour", "ratio_mean", "ratio_max", "ess", "weight_mean", "clip_fraction",
    "informative_groups", "advantage_mean", "advantage_std",
)  # fmt: skip
