"""What a function on an axis may ask for by the names of its parameters, beyond its positional arguments.

`klab.grid.custom_values.VIEW` lists the names; built-in values and the user's own use the same mechanism. Everything is
given without gradient, except the logits of an estimator, and per-token values are 0 off the own tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from klab.harness.objective.batch import TokenBatch
from klab.harness.objective.groups import Groups
from klab.harness.objective.masking import lengths, masked


@dataclass(frozen=True, eq=False)
class View:
    """What is known of an update, or of a micro-batch of it, when an axis function is called.

    Attributes:
        batch: its rows.
        mask: own tokens of these rows, bool [N, T].
        update: number of the update, from 0.
        advantage: A [N, T], once it is known.
        ratio: ρ [N, T], once it is known.
        groups: the trajectories by prompt, where the rows are a whole update.
    """

    batch: TokenBatch
    mask: Tensor
    update: int = 0
    advantage: Tensor | None = None
    ratio: Tensor | None = None
    groups: Groups | None = None

    def inputs(self, names: Collection[str]) -> dict[str, Any]:
        """The values of these names.

        Raises:
            ValueError: for something that the batch does not have.
        """
        found = {name: _READERS[name](self) for name in sorted(names)}
        for name, value in found.items():
            if value is None:
                raise ValueError(f"this objective needs {name}, which the batch does not have")
        return found


def _column(name: str) -> Callable[[View], Tensor | None]:
    """A float tensor [N, T] of the batch at own tokens."""

    def read(view: View) -> Tensor | None:
        value = getattr(view.batch, name)
        return None if value is None else masked(value.detach().to(view.batch.logp.dtype), view.mask)

    return read


def _given(name: str) -> Callable[[View], Any]:
    """A float tensor of the batch as it stands there."""

    def read(view: View) -> Any:
        value = getattr(view.batch, name)
        return None if value is None else value.detach().to(view.batch.logp.dtype)

    return read


def _logits(name: str) -> Callable[[View], Tensor | None]:
    """Logits [N, T, V] of the batch, 0 off the own tokens."""

    def read(view: View) -> Tensor | None:
        value = getattr(view.batch, name)
        return None if value is None else masked(value, view.mask[..., None])

    return read


def _entropy(view: View) -> Tensor | None:
    value = view.batch.token_entropy(view.mask)
    return None if value is None else value.detach()


def _log_ratio(view: View) -> Tensor:
    return masked((view.batch.logp - view.batch.logp_behaviour).detach(), view.mask)


def _reward_terms(view: View) -> Tensor:
    """The terms of the reward [N, K]; a reward without terms is one."""
    terms, rewards = view.batch.reward_terms, view.batch.rewards
    return (rewards[:, None] if terms is None else terms).to(view.batch.logp.dtype)


def _term_weights(view: View) -> Tensor:
    weights = view.batch.term_weights
    like = view.batch.logp
    return torch.ones(1, dtype=like.dtype, device=like.device) if weights is None else like.new_tensor(weights)


_READERS: dict[str, Callable[[View], Any]] = {
    "logp": _column("logp"),
    "logp_behaviour": _column("logp_behaviour"),
    "logp_reference": _column("logp_reference"),
    "entropy": _entropy,
    "values": _column("values"),
    "logits": _logits("logits"),
    "logits_reference": _logits("logits_reference"),
    "rewards": _given("rewards"),
    "greedy_rewards": _given("greedy_rewards"),
    "reward_terms": _reward_terms,
    "term_weights": _term_weights,
    "log_ratio": _log_ratio,
    "mask": lambda view: view.mask,
    "lengths": lambda view: lengths(view.mask),
    "positions": lambda view: (view.mask.cumsum(1) - 1).clamp(min=0),
    "advantage": lambda view: view.advantage,
    "ratio": lambda view: view.ratio,
    "groups": lambda view: view.groups,
    "update": lambda view: view.update,
}
