"""The setting of a measurement: a current, a behaviour and a reference policy that can be enumerated, and a reward."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from klab.grid import Objective
from klab.harness.exact.divergences import Scale, token_divergence
from klab.harness.exact.gradients import exact_entropy, expected_reward, gradient_of
from klab.harness.exact.tabular import Reward, TabularPolicy, Trajectories
from klab.harness.objective import Divergence, TokenBatch
from klab.harness.objective.functions import divergence_of
from klab.harness.objective.kl import entropy


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """Which entry of the policy's logits each token of U updates of N trajectories is drawn from.

    Attributes:
        members: indices of trajectories.
        entries: the entry (context * V + symbol) of the flattened logits of each token.
        own: 1 on own tokens, 0 elsewhere.
        tokens: number of own tokens of each update.
    """

    members: Int64[Tensor, "U N"]
    entries: Int64[Tensor, "U N*H"]
    own: Float64[Tensor, "U N*H"]
    tokens: Float64[Tensor, " U"]

    @classmethod
    def of(cls, members: Int64[Tensor, "U N"], trajectories: Trajectories, vocabulary: int) -> Layout:
        entries = (trajectories.contexts * vocabulary + trajectories.tokens)[members].flatten(1)
        own = trajectories.mask[members].flatten(1).to(torch.float64)
        return cls(members, entries, own, own.sum(1))


@dataclass(frozen=True, eq=False)
class Setting:
    """Three policies over the same trajectories and a reward (see `tabular.Reward`).

    Raises:
        ValueError: the policies differ in shape or in their end symbol.
    """

    policy: TabularPolicy
    behaviour: TabularPolicy
    reference: TabularPolicy
    reward: Reward

    def __post_init__(self) -> None:
        for other in (self.behaviour, self.reference):
            if other.logits.shape != self.policy.logits.shape or other.end != self.policy.end:
                raise ValueError("policy, behaviour and reference must have the same shape and end symbol")

    @cached_property
    def trajectories(self) -> Trajectories:
        """Every trajectory, lexicographic."""
        return self.policy.trajectories

    @cached_property
    def rewards(self) -> Float64[Tensor, " M"]:
        """Reward of each trajectory."""
        return self.policy.reward_of(self.reward).detach()

    @cached_property
    def fixed_length(self) -> bool:
        """Whether every trajectory has the same number of tokens."""
        return self.policy.end is None or self.policy.horizon == 1

    @cached_property
    def mean_length(self) -> float:
        """Expected own tokens of a trajectory of the behaviour policy."""
        return float((self._probabilities * self.trajectories.lengths).sum())

    def batch(self, members: Int64[Tensor, " N"], groups: Int64[Tensor, " N"], with_logits: bool) -> TokenBatch:
        """The token batch of the trajectories `members`.

        Args:
            members: indices of trajectories.
            groups: the group of each.
            with_logits: whether to include both logit tensors, which the estimator `full` and the gradient of an
                entropy bonus read.
        """
        return TokenBatch(
            logp=self.logp[members],
            logp_behaviour=self.logp_behaviour[members],
            logp_reference=self.logp_reference[members],
            mask=self.trajectories.mask[members],
            rewards=self.rewards[members],
            groups=groups,
            max_new_tokens=self.policy.horizon,
            logits=self.logits[members] if with_logits else None,
            logits_reference=self.logits_reference[members] if with_logits else None,
            greedy_rewards=self._greedy_reward.expand(members.shape),
            entropy=None if with_logits else self._entropy[members],
        )

    def parameter_gradients(
        self,
        layout: Layout,
        logp_gradient: Float64[Tensor, "U N H"],
        logits_gradient: Float64[Tensor, "U N H V"] | None,
    ) -> Float64[Tensor, "U contexts*V"]:
        """Chain per-token gradients of each update to the policy's logits.

        Args:
            layout: U updates of N trajectories.
            logp_gradient: gradient with respect to each token's log-probability.
            logits_gradient: gradient with respect to the logits themselves.

        Returns:
            summed over the trajectories of each update.
        """
        rows, vocabulary = self.policy.logits.shape
        picked = torch.zeros(len(layout.members), rows * vocabulary, dtype=torch.float64)
        picked.scatter_add_(1, layout.entries, logp_gradient.flatten(1))
        per_context = picked.view(-1, rows, vocabulary)
        gradients = per_context - per_context.sum(-1, keepdim=True) * self._conditionals
        if logits_gradient is not None:
            contexts = (layout.entries // vocabulary)[..., None].expand(-1, -1, vocabulary)
            gradients.scatter_add_(1, contexts, logits_gradient.flatten(1, 2))
        return gradients.flatten(1)

    def truth(self, objective: Objective) -> Float64[Tensor, "contexts V"]:
        """The true gradient, with which the cell's is compared.

        It is the gradient of E[R] - beta * D + c * H at the current policy. D is the cell's own divergence from the
        reference (`token_divergence`), summed over tokens, or averaged over each trajectory's own tokens where the cell
        divides its returns by the length (`kl_scale: mean` in use); it is left out where the cell has no KL term that
        acts. H is the entropy of trajectories, c the coefficient of the cell's entropy bonus. All is multiplied by the
        factor that the aggregation puts on every token: 1 for `sequence_sum`, 1/H_max for `constant`, 1/E[H] for
        `sequence_mean` and `token_mean`. Only the canonical form counts, so that two spellings of one algorithm have
        one truth.
        """
        active = objective.canonical()
        scale: Scale = "mean" if active.get("placement.kl_scale") == "mean" else "sum"
        beta = float(active.get("placement.beta", 0.0))
        truth = self.true_gradient(beta, scale, divergence_of(objective))
        if objective.entropy_bonus:
            truth = truth + objective.entropy_bonus * self._entropy_gradient
        return truth * self.aggregation_factor(objective)

    def aggregation_factor(self, objective: Objective) -> float:
        """What the aggregation multiplies a token's term by, on average: see `truth`."""
        factors = {"sequence_sum": 1.0, "constant": 1.0 / self.policy.horizon}
        return factors.get(objective.aggregation, 1.0 / self.mean_length)

    def true_gradient(self, beta: float, scale: Scale, divergence: Divergence) -> Float64[Tensor, "contexts V"]:
        """Gradient of E[R] - beta * D at the current policy, cached."""

        def value(moving: TabularPolicy) -> Tensor:
            total = expected_reward(moving, self.reward)
            return total - beta * token_divergence(moving, self.reference, divergence, scale) if beta else total

        key = (beta, scale, divergence if beta else None)
        if key not in self._truths:
            self._truths[key] = gradient_of(self.policy, value)
        return self._truths[key]

    @cached_property
    def _truths(self) -> dict[tuple[float, Scale, Divergence | None], Tensor]:
        return {}

    @cached_property
    def _entropy_gradient(self) -> Tensor:
        """Of the entropy of trajectories with respect to the policy's logits, [contexts, V]."""
        return gradient_of(self.policy, exact_entropy)

    @cached_property
    def _probabilities(self) -> Tensor:
        return self.behaviour.probabilities().detach()

    @cached_property
    def _conditionals(self) -> Tensor:
        return self.policy.conditionals().detach()

    @cached_property
    def logp(self) -> Float64[Tensor, "M H"]:
        """Log-probability of each token under the current policy."""
        return self.policy.token_logp().detach()

    @cached_property
    def logp_behaviour(self) -> Float64[Tensor, "M H"]:
        """The same under the behaviour policy."""
        return self.behaviour.token_logp().detach()

    @cached_property
    def logp_reference(self) -> Float64[Tensor, "M H"]:
        """The same under the reference policy."""
        return self.reference.token_logp().detach()

    @cached_property
    def logits(self) -> Float64[Tensor, "M H V"]:
        """The logits that each token is drawn from under the current policy."""
        return self.policy.token_logits().detach()

    @cached_property
    def logits_reference(self) -> Float64[Tensor, "M H V"]:
        """The same under the reference policy."""
        return self.reference.token_logits().detach()

    @cached_property
    def _entropy(self) -> Tensor:
        """Entropy of the current policy before each token of each trajectory, [M, H]."""
        return entropy(self.logits)

    @cached_property
    def _greedy_reward(self) -> Tensor:
        return self.rewards[self.behaviour.greedy()]
