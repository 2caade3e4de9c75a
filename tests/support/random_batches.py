"""Random updates and objectives for the tests: ragged lengths, gaps between own tokens, garbage everywhere else."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

from klab.grid import Objective
from klab.grid.catalogue import AXES
from klab.grid.parameters import TERMS
from klab.harness.objective import TokenBatch, objective_loss
from tests.harness.objective.oracle import Trajectory

PARAMETERS = {
    "beta": (0.0, 0.04, 0.5, 1.0),
    "alpha": (0.05, 0.5, 1.0, 2.0),
    "eps_low": (0.0, 0.1, 0.2, 0.5),
    "eps_high": (0.0, 0.1, 0.28, 0.5),
    "q": (0.0, 0.25, 0.5, 1.0),
    "cap": (1.0, 1.2, 2.0),
    "c": (1.0, 1.3, 3.0),
    "low": (0.0, 0.5, 0.9),
    "high": (1.05, 2.0),
    "tau_pos": (0.5, 1.0, 3.0),
    "tau_neg": (0.5, 1.05, 3.0),
    "ess": (0.3, 0.7, 0.9, 0.99),
    "ceiling": (1.0, 1.15, 4.0),
    "tv_low": (0.0, 0.05, 0.15),
    "tv_high": (0.0, 0.05, 0.15),
    "kl_low": (0.0, 0.01, 0.05),
    "kl_high": (0.0, 0.01, 0.05),
    "truncation": (1.0, 1.3, 20.0),
    "drift": (0.0, 0.05, 0.2),
    "worst": (0.0, 0.05, 0.5),
    "moment": (0.0, 0.01, 0.04),
    "k_pos": (0.5, 2.0),
    "rate_pos": (0.5, 3.0),
    "k_neg": (0.5, 3.0),
    "rate_neg": (0.5, 2.0),
    "half_life": (0.5, 2.0, 32.0),
    "influence": (0.0, 0.2, 1.0),
    "safety": (1.0, 1.2, 4.0),
    "clip_low": (0.0, 0.1, 0.4),
    "clip_high": (0.0, 0.1, 0.4),
    "cov_share": (0.0002, 0.2, 1.0),
    "cov_low": (-2.0, 0.05, 0.5),
    "cov_high": (0.6, 5.0),
    "cov_penalty": (0.0, 0.5, 1.0),
    "log_low": (0.0, 0.025, 0.2),
    "log_high": (0.0, 0.05, 0.3),
    "log_ceiling": (0.0, 0.05, 0.3),
    "growth": (-0.5, 0.0, 0.5),
    "tv_limit": (0.0, 0.05, 0.15),
    "least_weight": (0.0, 0.5, 0.8, 1.0),
    "budget": (0.0, 0.02, 0.1),
    "tv_scale": (0.05, 1.0, 12.5),
    "band": (0.0, 0.05, 0.1),
    "band_penalty": (0.0, 1e-3, 0.5),
    "entropy_bonus": (0.0, 0.01, 0.5),
    "entropy_share": (0.0, 0.2, 0.5, 1.0, 1.0),
    "gamma": (0.0, 0.5, 0.99, 1.0),
    "lam": (0.0, 0.5, 0.95, 1.0),
    "whiten": ("none", "batch"),
    "rejected": (0.0, -0.5, -1.0),
    "std": ("population", "sample"),
    "eps": (0.0, 1e-6, 1e-2),
    "kl_scale": ("mean", "sum"),
    "kl_at": ("rollout", "current"),
}
"""Settings to draw from, limits included; others than the defaults."""


def random_objective(source: random.Random, **fixed: str) -> Objective:
    """One value on every axis, and a setting for each parameter that the values have."""
    chosen = {name: fixed.get(name, source.choice(list(axis.values))) for name, axis in AXES.items()}
    names = {parameter for name, value in chosen.items() for parameter in AXES[name].values[value].parameters}
    names |= set(TERMS) if source.random() < 0.4 else set()
    return Objective(**chosen, **{name: source.choice(PARAMETERS[name]) for name in sorted(names)})


def random_batch(source: random.Random, drift: float | None = None, garbage: float = float("nan")) -> TokenBatch:
    """A float64 update of up to four groups of one to four trajectories, up to six columns.

    Masks have gaps; some trajectories have no own token; some groups have equal rewards; some updates are on-policy.
    Whatever does not belong to an own token is `garbage`.
    """
    sizes = [source.randint(1, 4) for _ in range(source.randint(1, 4))]
    groups = [label for label, size in enumerate(sizes) for _ in range(size)]
    source.shuffle(groups)
    n, t, v = len(groups), source.randint(1, 6), 3
    noise = torch.Generator().manual_seed(source.randrange(2**31))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=noise, dtype=torch.float64)

    mask = torch.rand(n, t, generator=noise) < source.choice((0.4, 0.7, 1.0))
    kind = source.choice(("binary", "real", "equal", "negative"))
    rewards = {
        "binary": (normal(n) > 0).double(),
        "real": normal(n),
        "equal": torch.full((n,), 0.1, dtype=torch.float64),
        "negative": -normal(n).abs(),
    }[kind]
    drift = source.choice((0.0, 0.1, 0.5)) if drift is None else drift
    behaviour = -normal(n, t).abs()
    logp = behaviour + drift * normal(n, t)
    dirty = torch.where(mask, 0.0, garbage).double()
    values = normal(n, t) if source.random() < 0.5 else None
    return TokenBatch(
        logp=(logp + dirty).requires_grad_(),
        logp_behaviour=behaviour + dirty,
        logp_reference=behaviour + 0.5 * normal(n, t) + dirty,
        mask=mask,
        rewards=rewards,
        groups=torch.tensor(groups) * 7 + 3,
        max_new_tokens=t + source.randint(0, 3),
        logits=(normal(n, t, v) + dirty[..., None]).requires_grad_(),
        logits_reference=normal(n, t, v) + dirty[..., None],
        greedy_rewards=normal(n),
        values=None if values is None else values + dirty,
        **_reward_terms(source, rewards),
    )


def _reward_terms(source: random.Random, rewards: Tensor) -> dict[str, Any]:
    """Two terms that make up the rewards, the second of which some trajectories lack; or none."""
    if source.random() < 0.3:
        return {}
    n = len(rewards)
    noise = torch.Generator().manual_seed(source.randrange(2**31))
    second = torch.randn(n, generator=noise, dtype=torch.float64)
    first, weight = rewards - 0.5 * second, source.choice((0.5, -0.5))
    missing = torch.rand(n, generator=noise) < 0.2
    terms = torch.stack([first, torch.where(missing, torch.nan, second * (0.5 / weight))], 1)
    return {"reward_terms": terms, "term_weights": (1.0, weight)}


def with_sampler(source: random.Random, batch: TokenBatch) -> TokenBatch:
    """The batch as another sampler drew it: factors of its tokens, zeros among them, and trajectories left out."""
    n, t = batch.mask.shape
    noise = torch.Generator().manual_seed(source.randrange(2**31))
    factors = torch.randn(n, t, generator=noise, dtype=torch.float64).exp()
    factors = torch.where(torch.rand(n, t, generator=noise) < 0.2, 0.0, factors)
    return batch.replace(
        correction=torch.where(batch.mask, factors, float("nan")) if source.random() < 0.5 else None,
        excluded_from_loss=torch.rand(n, generator=noise) < source.choice((0.2, 0.5, 1.0))
        if source.random() < 0.5
        else None,
    )


def trajectories(batch: TokenBatch) -> list[Trajectory]:
    """The batch as the oracle reads it."""
    result = []
    for n in range(len(batch.rewards)):
        columns = [j for j, inside in enumerate(batch.mask[n].tolist()) if inside]

        def own(values: Tensor, n: int = n, columns: list[int] = columns) -> list:
            return values.detach()[n][columns].tolist()

        result.append(
            Trajectory(
                group=int(batch.groups[n]),
                reward=float(batch.rewards[n]),
                columns=columns,
                now=own(batch.logp),
                old=own(batch.logp_behaviour),
                ref=own(batch.logp_reference),
                greedy=0.0 if batch.greedy_rewards is None else float(batch.greedy_rewards[n]),
                values=None if batch.values is None else own(batch.values),
                logits=None if batch.logits is None else own(batch.logits),
                logits_ref=None if batch.logits_reference is None else own(batch.logits_reference),
                terms=[float(batch.rewards[n])] if batch.reward_terms is None else batch.reward_terms[n].tolist(),
                term_weights=list(batch.term_weights or (1.0,)),
                correction=None if batch.correction is None else own(batch.correction),
                excluded_from_loss=batch.excluded_from_loss is not None and bool(batch.excluded_from_loss[n]),
            )
        )
    return result


def gradient(objective: Objective, batch: TokenBatch) -> Tensor:
    """Gradient of the loss with respect to the log-probabilities, `[N, T]`."""
    logp = batch.logp.detach().requires_grad_()
    loss = objective_loss(objective, batch.replace(logp=logp)).loss
    return torch.autograd.grad(loss, logp, materialize_grads=True)[0]


def tokens(
    logp: list[list[float]],
    behaviour: list[list[float]] | None = None,
    reference: list[list[float]] | None = None,
    rewards: list[float] | None = None,
    groups: list[int] | None = None,
    mask: list[list[bool]] | None = None,
    **more: object,
) -> TokenBatch:
    """A float64 batch from lists; what is left out is on-policy, one group, all tokens own, reward 1."""
    now = torch.tensor(logp, dtype=torch.float64)
    n, t = now.shape
    return TokenBatch(
        logp=now.clone().requires_grad_(),
        logp_behaviour=now.clone() if behaviour is None else torch.tensor(behaviour, dtype=torch.float64),
        logp_reference=now.clone() if reference is None else torch.tensor(reference, dtype=torch.float64),
        mask=torch.ones(n, t, dtype=torch.bool) if mask is None else torch.tensor(mask),
        rewards=torch.ones(n, dtype=torch.float64) if rewards is None else torch.tensor(rewards, dtype=torch.float64),
        groups=torch.zeros(n, dtype=torch.long) if groups is None else torch.tensor(groups),
        max_new_tokens=more.pop("max_new_tokens", t),  # type: ignore[arg-type]
        **more,  # type: ignore[arg-type]
    )
