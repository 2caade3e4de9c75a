"""Mismatch between sampler and trainer: how far they are apart, and what corrects for the difference.

μ is the sampler, π_old the behaviour policy as the trainer computes it. Ratios π_old/μ are constants.
"""

from __future__ import annotations

import torch
from torch import Tensor

from klab.grid.schema.sections import Rejection, Sampler
from klab.harness.objective.kl import k3
from klab.harness.objective.masking import lengths, masked


def correction_weights(sampler: Sampler, old: Tensor, sampled: Tensor, mask: Tensor) -> Tensor | None:
    """The factor of each token's surrogate [N, T]; None where there is none. Off the own tokens it means nothing.

    Args:
        old: log π_old [N, T].
        sampled: log μ [N, T].
        mask: own tokens [N, T].
    """
    if not sampler.multiplies:
        return None
    log_ratio = masked(old - sampled, mask)
    factor = torch.ones_like(log_ratio)
    if sampler.correction in ("tis", "icepop"):
        whole = sampler.level == "sequence"
        ratio = (log_ratio.sum(1, keepdim=True).expand_as(log_ratio) if whole else log_ratio).exp()
        if sampler.correction == "tis":
            factor = ratio.clamp(min=sampler.floor, max=sampler.cap)
        else:
            factor = torch.where((sampler.low <= ratio) & (ratio <= sampler.high), ratio, 0.0)
    return factor if sampler.reject is None else torch.where(kept_tokens(sampler.reject, log_ratio, mask), factor, 0.0)


def kept_tokens(reject: Rejection, log_ratio: Tensor, mask: Tensor) -> Tensor:
    """bool [N, T]: where sampler and trainer agree well enough.

    Args:
        log_ratio: log(π_old/μ) [N, T], 0 off the own tokens.
        mask: own tokens [N, T].
    """
    if reject.divergence == "k1":
        each = log_ratio
    else:
        each = log_ratio.square() / 2 if reject.divergence == "k2" else k3(-log_ratio)
    if reject.over == "mean":
        each = each.sum(1, keepdim=True) / lengths(mask).clamp(min=1)
    elif reject.over != "token":
        each = each.sum(1, keepdim=True) if reject.over == "sum" else each.amax(1, keepdim=True)
    if reject.divergence == "k1":
        ratio = each.exp()
        kept = (reject.lower_bound <= ratio) & (ratio <= reject.high)
    else:
        kept = each <= reject.high
    return kept.expand_as(mask)


def mismatch_metrics(sampler: Sampler, old: Tensor, sampled: Tensor, mask: Tensor) -> dict[str, float]:
    """How far the sampler is from the trainer, over own tokens; all 0 where there are none.

    `sampler_kl`: KL(μ‖π_old) per token, by k3. `sampler_ess`: (Σr)²/(n·Σr²) of r = π_old/μ, before any correction.
    `correction_mean`: of the factors of the surrogate; 1 without any. `sampler_rejected`: share of tokens that
    `reject` leaves out, where there is one.
    """
    if not bool(mask.any()):
        found = {"sampler_kl": 0.0, "sampler_ess": 0.0, "correction_mean": 0.0}
        return found if sampler.reject is None else {**found, "sampler_rejected": 0.0}
    log_ratio = (old - sampled)[mask].double()
    ratio, factors = log_ratio.exp(), correction_weights(sampler, old, sampled, mask)
    found = {
        "sampler_kl": float(k3(-log_ratio).mean()),
        "sampler_ess": float(ratio.sum().square() / (ratio.square().sum() * len(ratio))),
        "correction_mean": 1.0 if factors is None else float(factors[mask].double().mean()),
    }
    if sampler.reject is not None:
        kept = kept_tokens(sampler.reject, masked(old - sampled, mask), mask)[mask]
        found["sampler_rejected"] = 1.0 - float(kept.double().mean())
    return found
