"""What an update measures about itself, over its own tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from harness.objective.kl import behaviour_kl, k1, k2, k3


@dataclass(frozen=True)
class Observation:
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


def measured(seen: Observation, **losses: Tensor) -> dict[str, float]:
    """The metrics of an update as plain numbers; all 0 without own tokens.

    `k1`, `k2`, `k3`: mean estimate per own token of KL(π‖π_ref). `kl_behaviour`: of KL(π_old‖π), by k3 on tokens of
    π_old. `ratio_mean`, `ratio_max`: of ρ. `ess`: (Σw)²/(n·Σw²), 0 when every weight is 0. `weight_mean`;
    `clip_fraction`: share of weights that are 0. `informative_groups`: share of the groups with an advantage other than
    0. `advantage_mean`, `advantage_std` (population).

    Args:
        losses: scalars to report beside them, by name.
    """
    mask = seen.mask
    names = [*losses, *_NAMES]
    if not bool(mask.any()):
        return dict.fromkeys(names, 0.0) | {name: float(value.detach()) for name, value in losses.items()}
    kappa, ratio, weight, advantage = (
        values[mask] for values in (seen.log_ratio_reference, seen.ratio, seen.weight, seen.advantage)
    )
    square = weight.square().sum() * len(weight)
    informative = ((seen.advantage != 0) & mask).any(1)
    figures = [
        *losses.values(),
        k1(kappa).mean(),
        k2(kappa).mean(),
        k3(kappa).mean(),
        behaviour_kl(seen.log_ratio[mask]).mean(),
        ratio.mean(),
        ratio.max(),
        torch.where(square == 0, 0.0, weight.sum().square() / square),
        weight.mean(),
        (weight == 0).to(weight.dtype).mean(),
        weight.new_tensor(len(set(seen.groups[informative].tolist())) / len(set(seen.groups.tolist()))),
        advantage.mean(),
        advantage.std(correction=0),
    ]
    return dict(zip(names, torch.stack([figure.detach().double() for figure in figures]).tolist(), strict=True))


_NAMES = (
    "k1", "k2", "k3", "kl_behaviour", "ratio_mean", "ratio_max", "ess", "weight_mean", "clip_fraction",
    "informative_groups", "advantage_mean", "advantage_std",
)  # fmt: skip
