"""The metrics of an update: KL estimates, ratios, weights and advantages, summarised over its own tokens."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import compress

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from klab.harness.objective.kl import behaviour_kl, k1, k2, k3


@dataclass(frozen=True)
class TokenStats:
    """Per-token quantities of an update, without gradient and 0 off the own tokens where not said otherwise.

    Attributes:
        log_ratio: λ, to the behaviour policy.
        log_ratio_reference: κ, to the reference policy.
        ratio: ρ (1 off the own tokens).
        weight: w (arbitrary off the own tokens).
        advantage: A.
        mask: own tokens of the loss.
        groups: which prompt each trajectory answers.
    """

    log_ratio: Float[Tensor, "N T"]
    log_ratio_reference: Float[Tensor, "N T"]
    ratio: Float[Tensor, "N T"]
    weight: Float[Tensor, "N T"]
    advantage: Float[Tensor, "N T"]
    mask: Bool[Tensor, "N T"]
    groups: Int[Tensor, " N"]


@torch.no_grad()
def update_metrics(stats: TokenStats, **losses: Float[Tensor, ""]) -> dict[str, float]:
    """The metrics of an update as plain numbers, over its own tokens; all 0 where it has none.

    * `k1`, `k2`, `k3`: mean per token of the terms log π − log π_ref, half its square, and π_ref/π − 1 + k1, in nats,
      over tokens that π_old drew: estimates of KL(π‖π_ref) only where π is still π_old.
    * `kl_behaviour`: of KL(π_old‖π).
    * `ratio_mean`, `ratio_max`: of ρ; `weight_mean`: of w; `clip_fraction`: share of the weights that are 0.
    * `ess`: effective sample size as a share, (Σw)²/(n·Σw²); 0 when every weight is 0.
    * `advantage_mean`, `advantage_std` (population); `informative_groups`: share of groups with a non-zero advantage.

    Args:
        losses: scalars to report beside them, by name.
    """
    at = stats.mask.flatten().nonzero().squeeze(1)
    if not at.numel():
        return dict.fromkeys(_NAMES, 0.0) | {name: float(value) for name, value in losses.items()}
    log_ratio, kappa, ratio, weight, advantage = (
        values.take(at)
        for values in (stats.log_ratio, stats.log_ratio_reference, stats.ratio, stats.weight, stats.advantage)
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
        "advantage_std": advantage.std(correction=0),
    }
    figures = torch.cat([torch.stack([*means.values()]).mean(1), torch.stack([*others.values()])])
    informative = ((stats.advantage != 0) & stats.mask).any(1)
    # all in one copy to the host, which waits for the device
    copied = torch.cat([figures.double(), stats.groups.double(), informative.double()]).cpu()
    numbers, groups, chosen = (
        part.tolist() for part in copied.tensor_split((len(figures), len(copied) - len(informative)))
    )
    share = torch.tensor(len(set(compress(groups, chosen))) / len(set(groups)), dtype=advantage.dtype)
    return dict(zip([*means, *others], numbers, strict=True)) | {"informative_groups": float(share)}


_NAMES = (
    "k1", "k2", "k3", "kl_behaviour", "ratio_mean", "ratio_max", "ess", "weight_mean", "clip_fraction",
    "informative_groups", "advantage_mean", "advantage_std",
)  # fmt: skip
