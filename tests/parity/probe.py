"""Batches on which klab and its peers are compared, and klab's gradient on them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from klab.grid import Objective
from klab.grid.schema.sections import Sampler
from klab.harness.objective import TokenBatch, objective_loss
from klab.harness.training.data.sampler_mismatch import correction_weights

GROUPS, SIZE, WIDTH, BUDGET = 13, 5, 8, 11
"""Prompts, trajectories of each, padded length, completion budget. 5/4 and 65/64, the Bessel corrections that TRL
computes in single precision, are exact there."""


@dataclass(frozen=True)
class Probe:
    """N trajectories: three log-probabilities `[N, T]`, present tokens, own tokens, rewards, groups.

    Attributes:
        logp: under the current policy.
        behaviour: under the policy that sampled.
        reference: under the reference policy.
        present: bool, tokens that exist: own and environment tokens.
        own: bool, the policy's own tokens.
        rewards: `[N]`.
        greedy: `[N]`, the greedy completion's reward of the same prompt.
        groups: int `[N]`.
        sampled: `[N, T]`, under the sampler, where that is not the behaviour policy.
        values: `[N, T]`, a critic's.
    """

    logp: Tensor
    behaviour: Tensor
    reference: Tensor
    present: Tensor
    own: Tensor
    rewards: Tensor
    greedy: Tensor
    groups: Tensor
    sampled: Tensor | None = None
    values: Tensor | None = None

    @property
    def size(self) -> int:
        """Trajectories of each prompt."""
        return int((self.groups == 0).sum())

    def drawn_by_another(self, drift: float) -> Probe:
        """The same probe, drawn by a sampler whose log-probabilities differ by this standard deviation."""
        source = torch.Generator().manual_seed(11)
        noise = drift * torch.randn(self.logp.shape, generator=source, dtype=torch.float64)
        return replace(self, sampled=(self.behaviour + noise).float().double())  # TRL stores them in single precision

    def with_values(self, values: Tensor | None) -> Probe:
        """The same probe with a critic's values."""
        return replace(self, values=values)

    def batch(self, logp: Tensor, sampler: Sampler | None = None) -> TokenBatch:
        """klab's batch of this probe, with the correction of a sampler."""
        correction = None
        if sampler is not None and self.sampled is not None:
            correction = correction_weights(sampler, self.behaviour, self.sampled, self.own)
        return TokenBatch(
            logp,
            self.behaviour,
            self.reference,
            mask=self.own,
            rewards=self.rewards,
            groups=self.groups,
            max_new_tokens=BUDGET,
            greedy_rewards=self.greedy,
            correction=correction,
            values=self.values,
        )


def probe(
    *,
    drift: float = 0.4,
    gaps: bool = True,
    binary: bool = True,
    scale: float = 1.0,
    equal_lengths: bool = False,
    size: int = SIZE,
) -> Probe:
    """A probe with ragged lengths, a gap of environment tokens, mixed groups and one whose rewards are all equal.

    Args:
        drift: standard deviation of the log-ratios to the behaviour policy and to the reference.
        gaps: whether some rows contain environment tokens.
        binary: rewards 0 and 1, else normal.
        scale: multiplies the rewards.
        equal_lengths: every row has all its tokens.
        size: trajectories of each prompt.
    """
    source = torch.Generator().manual_seed(7)
    count = GROUPS * size

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=source, dtype=torch.float64)

    logp = -normal(count, WIDTH).abs() - 0.05
    behaviour = logp - drift * normal(count, WIDTH)
    reference = logp - (drift * normal(count, WIDTH)).clamp(-2, 2)
    lengths = torch.randint(3, WIDTH + 1, (count,), generator=source)
    if equal_lengths:
        lengths = torch.full((count,), WIDTH)
    present = torch.arange(WIDTH) < lengths[:, None]
    own = present.clone()
    if gaps:
        for row in range(0, count, 3):
            own[row, 1] = False
    rewards = (normal(count) > 0).to(torch.float64) if binary else normal(count)
    rewards[size : 2 * size] = 1.0  # an uninformative group
    rewards[0], rewards[1] = 0.0, 1.0
    greedy = (normal(GROUPS) > 0).to(torch.float64).repeat_interleave(size)
    groups = torch.arange(GROUPS).repeat_interleave(size)
    return Probe(logp, behaviour, reference, present, own, scale * rewards, scale * greedy, groups)


def klab_gradient(objective: Objective, data: Probe, sampler: Sampler | None = None) -> Tensor:
    """Gradient of klab's loss with respect to the log-probabilities of the tokens, `[N, T]`."""
    logp = data.logp.clone().requires_grad_()
    return torch.autograd.grad(objective_loss(objective, data.batch(logp, sampler)).loss, logp)[0]


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """Norm of the difference over the norm of the peer's gradient, which must not vanish."""
    assert float(theirs.norm()) > 1e-6, "the peer's gradient vanishes: this probe compares nothing"
    return float((ours - theirs).norm() / theirs.norm())


def assert_same(
    name: str,
    objective: Objective,
    data: Probe,
    theirs: Tensor,
    tolerance: float = 1e-8,
    sampler: Sampler | None = None,
) -> None:
    """klab's gradient equals the peer's to the tolerance; prints the error (`pytest -s` or `-rP` shows the table)."""
    error = relative_error(klab_gradient(objective, data, sampler), theirs)
    print(f"{name:<60} {error:.2e}")
    assert error <= tolerance, f"{name}: relative gradient error {error:.2e} > {tolerance:.0e}"
