"""Settings that all cells of a pack share, read from the cells once and checked once.

Which training settings may differ between the cells of a pack is `klab.grid.schema.training.STACKABLE`; those are read
from each cell. Everything that shapes the pack's common forward passes, rollouts and evaluations is here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields

from klab.grid.schema.sections import Critic, PolicySection, ReferencePolicy, Sampler
from klab.harness.training.microbatch import MemoryBudget
from klab.harness.training.optim.schedule import RolloutSchedule
from klab.harness.training.packed_cell import PackedCell


@dataclass(frozen=True, slots=True)
class PackSettings:
    """The shared settings of a pack; names as in the grid file's `training` section.

    Attributes:
        policy: dtype, engine, adapters and gradient checkpointing; the checkpoints themselves may differ.
        schedule: which rollout serves which update.
        budget: what may go through a policy at once.
        samples_reference: rollouts come from the reference policy (`behaviour: reference`).
        recomputes_old: the trainer computes π_old of what its own policy sampled (`old_logprobs: trainer`).
        reference: how the reference policy moves; None where it stays.
        refills: dynamic sampling (`equal_groups: refill`).
        max_new_tokens: the completion budget, the task's where the cell sets none.
        needs_logits: objectives compare whole distributions (estimator `full`).
        needs_entropy_gradient: losses may have an entropy bonus.
        needs_greedy: objectives need the reward of the greedy completion (`greedy_baseline`).
    """

    policy: PolicySection = field(compare=False)
    schedule: RolloutSchedule
    budget: MemoryBudget
    prompts: int
    group_size: int
    minibatches: int
    temperature: float
    top_p: float
    samples_reference: bool
    recomputes_old: bool
    reference: ReferencePolicy | None
    refills: bool
    refill_rounds: int
    sampler: Sampler | None
    critic: Critic | None
    evaluate_every: int
    evaluation_samples: int
    final_evaluation_samples: int
    checkpoint_updates: int
    checkpoint_seconds: float
    max_new_tokens: int
    needs_logits: bool
    needs_entropy_gradient: bool
    needs_greedy: bool

    @property
    def reference_is_behaviour(self) -> bool:
        """Whether the reference policy is the one that drew the rollout (`reference: rollout`)."""
        return self.reference is not None and self.reference.follows == "rollout"

    @property
    def updates_what_it_drew(self) -> bool:
        """Whether the first update of a rollout is of the whole of it, and of the very policy that drew it."""
        other_policy = self.samples_reference or self.sampler is not None or self.schedule.lag > 0
        return not other_policy and not self.refills and self.minibatches == 1

    @property
    def sampling_temperature(self) -> float:
        """The temperature at which rollouts are drawn: the sampler's own where it has one."""
        if self.sampler is not None and self.sampler.temperature is not None:
            return self.sampler.temperature
        return self.temperature

    def completions_after(self, update: int) -> int:
        """Completions per held-out prompt in the evaluation after `update` updates."""
        return self.final_evaluation_samples if update >= self.schedule.updates else self.evaluation_samples

    @property
    def minibatch_rows(self) -> int:
        """Trajectories per update and cell."""
        return self.prompts * self.group_size // self.minibatches

    @classmethod
    def of(cls, members: Sequence[PackedCell]) -> PackSettings:
        """The settings of these cells.

        Raises:
            ValueError: where two of them differ, which `PackedCell.shape` rules out.
        """
        first, *others = [cls._of_cell(member) for member in members]
        for member, other in zip(members[1:], others, strict=True):
            unlike = [each.name for each in fields(cls) if each.compare and _differ(each.name, first, other)]
            if unlike:
                raise ValueError(f"{member.id} cannot be in a pack with {members[0].id}: {', '.join(unlike)} differ")
        return first

    @classmethod
    def _of_cell(cls, member: PackedCell) -> PackSettings:
        training = member.cell.training
        return cls(
            policy=member.cell.policy,
            schedule=member.schedule,
            budget=MemoryBudget(training.micro_batch, training.token_budget),
            prompts=training.prompts,
            group_size=training.group_size,
            minibatches=training.minibatches,
            temperature=training.temperature,
            top_p=training.top_p,
            samples_reference=training.behaviour == "reference",
            recomputes_old=training.recomputes_old,
            reference=training.reference,
            refills=training.equal_groups == "refill",
            refill_rounds=training.refill_rounds,
            sampler=training.sampler,
            critic=training.critic,
            evaluate_every=training.evaluate_every,
            evaluation_samples=training.evaluation_samples,
            final_evaluation_samples=training.completions_at_the_end,
            checkpoint_updates=training.checkpoint_updates,
            checkpoint_seconds=training.checkpoint_seconds,
            max_new_tokens=member.max_new_tokens,
            needs_logits=member.needs_logits,
            needs_entropy_gradient=member.needs_entropy_gradient,
            needs_greedy=member.needs_greedy,
        )


def _differ(name: str, left: PackSettings, right: PackSettings) -> bool:
    return bool(getattr(left, name) != getattr(right, name))
