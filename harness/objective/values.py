"""Every value of the axes that have several modules: whoever imports a registry from here finds all of them in it."""

from collections.abc import Callable

from torch import Tensor

from klab.harness.objective import advantage_groups, covariance, soft_weights, weight_masks
from klab.harness.objective.advantage import ADVANTAGES
from klab.harness.objective.covariance import PENALTIES, drawn_tokens, largest_tokens
from klab.harness.objective.weight import WEIGHTS, largest_exponent
from klab.harness.objective.weight_masks import second_moment_tokens

__all__ = [
    "ADVANTAGES",
    "PENALTIES",
    "SOLVERS",
    "WEIGHTS",
    "advantage_groups",
    "covariance",
    "soft_weights",
    "weight_masks",
]

SOLVERS: dict[str, Callable[..., dict[str, Tensor]]] = {
    "adaptive": largest_exponent,
    "second_moment_mask": second_moment_tokens,
    "clip_cov": drawn_tokens,
    "kl_cov": largest_tokens,
}
"""Weights whose parameters are found once per update, from log ρ and the mask of the whole of it."""
