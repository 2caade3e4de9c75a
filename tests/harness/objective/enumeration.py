"""Tabular policies small enough to list every trajectory: exact expectations for the facts about gradients."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from klab.grid import Objective
from klab.harness.objective import TokenBatch
from tests.support.random_batches import gradient


class Enumeration:
    """All sequences of `steps` symbols out of `symbols`, and policies given by logits `[prefixes, symbols]`."""

    def __init__(self, symbols: int, steps: int) -> None:
        self.symbols, self.steps = symbols, steps
        self.sequences = torch.tensor(list(itertools.product(range(symbols), repeat=steps)))
        prefixes = [p for length in range(steps) for p in itertools.product(range(symbols), repeat=length)]
        row = {prefix: i for i, prefix in enumerate(prefixes)}
        self.rows = torch.tensor([[row[tuple(s[:j])] for j in range(steps)] for s in self.sequences.tolist()])
        self.prefixes = len(prefixes)

    def policy(self, seed: int) -> Tensor:
        """Random logits."""
        noise = torch.Generator().manual_seed(seed)
        return torch.randn(self.prefixes, self.symbols, generator=noise, dtype=torch.float64)

    def logp(self, logits: Tensor) -> Tensor:
        """Log-probability of every symbol of every sequence, `[S, steps]`."""
        return logits.log_softmax(-1)[self.rows, self.sequences]

    def loss_gradient(
        self, objective: Objective, policy: Tensor, behaviour: Tensor, reference: Tensor, rewards: Tensor
    ) -> Tensor:
        """Expected gradient of the loss to the policy's logits, trajectories drawn from the behaviour policy.

        The advantage must be a trajectory's own, and the aggregation a mean over trajectories.
        """
        number = len(self.sequences)
        old, ref = self.logp(behaviour), self.logp(reference)
        batch = TokenBatch(
            self.logp(policy), old, ref, torch.ones(number, self.steps, dtype=torch.bool), rewards,
            torch.zeros(number, dtype=torch.long), self.steps,
        )  # fmt: skip
        coefficients = number * gradient(objective, batch)
        return self.derivative(lambda z: (old.sum(1).exp() * (coefficients * self.logp(z)).sum(1)).sum(), policy)

    def expected_reward(self, policy: Tensor, rewards: Tensor) -> Tensor:
        """E[R]."""
        return (self.logp(policy).sum(1).exp() * rewards).sum()

    def divergence(self, policy: Tensor, reference: Tensor) -> Tensor:
        """KL(policy‖reference) of whole sequences."""
        p, q = self.logp(policy).sum(1), self.logp(reference).sum(1)
        return (p.exp() * (p - q)).sum()

    def derivative(self, function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
        """Gradient of a scalar function of logits."""
        leaf = at.detach().clone().requires_grad_()
        return torch.autograd.grad(function(leaf), leaf)[0]
