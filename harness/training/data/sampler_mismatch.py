"""Mismatch between sampler and trainer: which policy samples, and the corrections TIS and IcePop.

μ is the sampler, π_old the behaviour policy as the trainer computes it. Ratios π_old/μ are per token and constants.
"""

from __future__ import annotations

import torch
from torch import Tensor

from klab.grid.errors import UserError
from klab.grid.schema.sections import Sampler
from klab.harness.objective.kl import k3
from klab.harness.policy.policy import Policy
from klab.harness.policy.sampling.sample import sample
from klab.harness.policy.sampling.sampler import SampleFunction
from klab.harness.training.packed_cell import PackedCell


def sample_function(sampler: Sampler | None) -> SampleFunction:
    """Who draws the rollouts of a cell.

    Raises:
        UserError: vllm is not installed, or there is no GPU for it.
    """
    if sampler is None or sampler.engine == "klab":
        return sample
    from klab.harness.policy.sampling.vllm import vllm_sampler

    return vllm_sampler(sampler.dtype)


def check_sampler(member: PackedCell) -> None:
    """Raises UserError where the cell's sampler cannot run here, or cannot run its policy."""
    training, policy = member.cell.training, member.cell.policy
    sample_function(training.sampler)
    if training.sampler is not None and training.sampler.engine == "vllm" and policy.lora is not None:
        raise UserError(
            "vllm is given whole checkpoints, not adapters",
            key="training.sampler.engine",
            value="vllm",
            hint="Choose the engine klab, or leave policy.lora out.",
        )


def sampling_policy(behaviour: Policy, sampler: Sampler | None) -> Policy:
    """The policy that the sampler draws from: the behaviour policy itself, or a copy of it in another precision."""
    if sampler is None or sampler.engine != "klab" or sampler.dtype is None:
        return behaviour
    dtype: torch.dtype = getattr(torch, sampler.dtype)
    return behaviour if dtype == behaviour.dtype else behaviour.frozen_copy(dtype)


def correction_weights(sampler: Sampler, old: Tensor, sampled: Tensor) -> Tensor | None:
    """The factor of each token's surrogate [N, T]; None where there is none. Off the own tokens it means nothing.

    Args:
        old: log π_old [N, T].
        sampled: log μ [N, T].
    """
    if sampler.correction not in ("tis", "icepop"):
        return None
    ratio = (old - sampled).exp()
    if sampler.correction == "tis":
        return ratio.clamp(max=sampler.cap)
    return torch.where((sampler.low <= ratio) & (ratio <= sampler.high), ratio, 0.0)


def mismatch_metrics(sampler: Sampler, old: Tensor, sampled: Tensor, mask: Tensor) -> dict[str, float]:
    """How far the sampler is from the trainer, over own tokens; all 0 where there are none.

    `sampler_kl`: KL(μ‖π_old) per token, by k3. `sampler_ess`: (Σr)²/(n·Σr²) of r = π_old/μ, before any correction.
    `correction_mean`: of the factors of the surrogate; 1 without any.
    """
    if not bool(mask.any()):
        return {"sampler_kl": 0.0, "sampler_ess": 0.0, "correction_mean": 0.0}
    log_ratio = (old - sampled)[mask].double()
    ratio, factors = log_ratio.exp(), correction_weights(sampler, old, sampled)
    return {
        "sampler_kl": float(k3(-log_ratio).mean()),
        "sampler_ess": float(ratio.sum().square() / (ratio.square().sum() * len(ratio))),
        "correction_mean": 1.0 if factors is None else float(factors[mask].double().mean()),
    }
