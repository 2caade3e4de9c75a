"""Collect rollouts: choose prompts, sample a group of completions each, score them, compute reference log-probs."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import repeat

import torch
from torch import Tensor

from klab.harness.policy.policy import Policy
from klab.harness.policy.rollout import Rollout
from klab.harness.policy.scores import token_scores
from klab.harness.training.data.dynamic_sampling import SampledGroups, SamplingStats, fill, shortfall
from klab.harness.training.data.experience import Experience, old_policy
from klab.harness.training.data.generate import generate
from klab.harness.training.data.samplers import sample_function, sampling_budget, sampling_policy
from klab.harness.training.data.scoring import has_timeouts, reward_column, reward_terms, score_completions
from klab.harness.training.distributed.gathering import gathered
from klab.harness.training.distributed.messages import message_type
from klab.harness.training.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from klab.harness.training.microbatch import UNLIMITED, MemoryBudget, map_micro_batches
from klab.harness.training.pack_settings import PackSettings
from klab.harness.training.packed_cell import PackedCell
from klab.harness.training.runtime.rng import permutation, sample_indices
from klab.harness.training.runtime.timer import PhaseTimer
from klab.tasks.task import Example, Score

message_type(Rollout)
message_type(Score)


def collect_rollouts(
    settings: PackSettings,
    members: Sequence[PackedCell],
    behaviour: Policy,
    reference: Policy,
    number: int,
    timer: PhaseTimer,
    budget: MemoryBudget = UNLIMITED,
    process_group: ProcessGroup = SINGLE_PROCESS,
) -> list[Experience]:
    """Rollout `number` of every cell of a pack, drawn from the policies `behaviour`.

    Prompts are sampled, and trajectories looked at by the reference policy, within the memory budget. The processes
    of `process_group` share the prompts, and all get the whole rollout. Where the reference is the policy that drew
    the rollout, its log-probabilities are those of π_old.

    Raises:
        CellFailure: where a reward function raises or does not return a `Score`.
    """
    with gathered(process_group, behaviour):
        draws, sampling_stats = _sample_groups(settings, members, behaviour, number, timer, budget, process_group)
        rollouts = [each.rollout for each in draws]
        baselines = (
            _greedy_rewards(settings, members, behaviour, draws, timer, budget, process_group)
            if settings.needs_greedy
            else None
        )
        old_logprobs = None
        if settings.sampler is not None or settings.recomputes_old:
            with timer("reference"):
                old_logprobs = log_probabilities(behaviour, rollouts, settings.temperature, budget, process_group)
    if settings.reference_is_behaviour:
        recomputed = old_logprobs or repeat(None)
        looked_up = [old_policy(*pair, settings.sampler) for pair in zip(rollouts, recomputed, strict=False)]
    else:
        with timer("reference"), gathered(process_group, reference):
            looked_up = log_probabilities(reference, rollouts, settings.temperature, budget, process_group)
    return [
        Experience(
            number,
            each.rollout,
            each.rewards,
            each.correct,
            looked_up[c],
            greedy_rewards=None if baselines is None else baselines[c][0],
            old_logprobs=None if old_logprobs is None else old_logprobs[c],
            sampling_stats=sampling_stats[c],
            timeouts=_timeouts(each, None if baselines is None else baselines[c][1]),
            reward_terms=each.reward_terms,
        )
        for c, each in enumerate(draws)
    ]


def _sample_groups(
    settings: PackSettings,
    members: Sequence[PackedCell],
    behaviour: Policy,
    number: int,
    timer: PhaseTimer,
    budget: MemoryBudget,
    process_group: ProcessGroup,
) -> tuple[list[SampledGroups], list[SamplingStats | None]]:
    """The groups of rollout `number` of every cell, and, with dynamic sampling, what was drawn to find them.

    A cell that needs another draw shares it with those that need one too: what a cell gets does not depend on them.
    """
    with timer("rollout"):
        policy = sampling_policy(behaviour, settings.sampler)
    everyone = list(range(len(members)))
    examples = [rollout_prompts(member, number) for member in members]
    found = [
        [first]
        for first in _sample_and_score(
            settings, policy, members, everyone, examples, ("rollout", number), timer, budget, process_group
        )
    ]
    if not settings.refills:
        return [draws[0] for draws in found], [None] * len(members)
    for again in range(1, settings.refill_rounds + 1):
        needing = [c for c in everyone if shortfall(found[c], settings.prompts)]
        if not needing:
            break
        examples = [rollout_prompts(members[c], number, again) for c in needing]
        more = _sample_and_score(
            settings,
            policy,
            members,
            needing,
            examples,
            ("rollout", number, "again", again),
            timer,
            budget,
            process_group,
        )
        for c, another in zip(needing, more, strict=True):
            found[c].append(another)
    used = [fill(draws, settings.prompts) for draws in found]
    return used, [SamplingStats.of(*pair) for pair in zip(found, used, strict=True)]


def _sample_and_score(
    settings: PackSettings,
    policy: Policy,
    members: Sequence[PackedCell],
    positions: Sequence[int],
    examples: Sequence[list[Example]],
    purpose: tuple[int | str, ...],
    timer: PhaseTimer,
    budget: MemoryBudget,
    process_group: ProcessGroup,
) -> list[SampledGroups]:
    """A draw of the cells at some positions of the pack, one list of examples each, all equally long."""
    sampler = sample_function(settings.sampler, policy, members, process_group)
    share = process_group.shard(len(examples[0]))

    def drawn() -> list[tuple[Rollout, Tensor, Tensor, Tensor, Tensor | None]]:
        """By cell, the trajectories of this process's share, their rewards, whether they are correct, timeouts, and
        terms."""
        if not share:
            return []
        with timer("rollout"):
            rollouts = generate(
                policy if len(positions) == len(members) else policy.select(positions),
                [members[c] for c in positions],
                examples,
                settings.group_size,
                purpose,
                settings.max_new_tokens,
                settings.sampling_temperature,
                settings.top_p,
                sampler=sampler,
                positions=positions,
                budget=sampling_budget(settings.sampler, budget),
                share=share,
                keeps_states=settings.updates_what_it_drew and budget == UNLIMITED and process_group.size == 1,
            )
        with timer("reward"):
            asked = zip(positions, examples, rollouts, strict=True)
            scores = [
                score_completions(members, c, listed[share.start : share.stop], rollout) for c, listed, rollout in asked
            ]
        return [
            (
                rollout,
                reward_column(rollout, [s.reward for s in each]),
                reward_column(rollout, [float(s.correct) for s in each]),
                reward_column(rollout, [float(s.timeouts) for s in each]),
                reward_terms(members[c], each, rollout.logp),
            )
            for c, rollout, each in zip(positions, rollouts, scores, strict=True)
        ]

    parts = [part for part in process_group.all_gather_object("a draw", drawn, policy.device) if part]
    return [
        SampledGroups(
            listed,
            Rollout.concatenate([part[c][0] for part in parts]),
            torch.cat([part[c][1] for part in parts]),
            torch.cat([part[c][2] for part in parts]),
            torch.cat([part[c][3] for part in parts]) if has_timeouts(members[positions[c]]) else None,
            _joined([part[c][4] for part in parts]),
        )
        for c, listed in enumerate(examples)
    ]


def _joined(columns: Sequence[Tensor | None]) -> Tensor | None:
    known = [column for column in columns if column is not None]
    return torch.cat(known) if known else None


def _greedy_rewards(
    settings: PackSettings,
    members: Sequence[PackedCell],
    behaviour: Policy,
    draws: Sequence[SampledGroups],
    timer: PhaseTimer,
    budget: MemoryBudget,
    process_group: ProcessGroup,
) -> list[tuple[Tensor, Tensor]]:
    """Per cell, the reward [N] of the behaviour policy's greedy completion of each trajectory's prompt, and the
    timeouts [P] of each prompt's."""
    examples = [each.examples for each in draws]
    sampler = sample_function(settings.sampler, behaviour, members, process_group)
    share = process_group.shard(len(examples[0]))

    def rewards() -> list[tuple[Tensor, Tensor]]:
        with timer("rollout"):
            rollouts = generate(
                behaviour,
                members,
                examples,
                1,
                None,
                settings.max_new_tokens,
                sampler=sampler,
                budget=sampling_budget(settings.sampler, budget),
                share=share,
            )
        with timer("reward"):
            own = [listed[share.start : share.stop] for listed in examples]
            scores = [score_completions(members, c, own[c], rollout) for c, rollout in enumerate(rollouts)]
        return [
            (
                reward_column(rollout, [s.reward for s in each]),
                reward_column(rollout, [float(s.timeouts) for s in each]),
            )
            for rollout, each in zip(rollouts, scores, strict=True)
        ]

    parts = [
        part
        for part in process_group.all_gather_object("greedy", lambda: rewards() if share else [], behaviour.device)
        if part
    ]
    size = settings.group_size
    columns = [
        [torch.cat(each) for each in zip(*(part[c] for part in parts), strict=True)] for c in range(len(members))
    ]
    return [(scored.repeat_interleave(size), timeouts) for scored, timeouts in columns]


def _timeouts(drawn: SampledGroups, greedy: Tensor | None) -> Tensor | None:
    """Those of a draw, and of each prompt's greedy completion with the prompt's first trajectory."""
    if drawn.timeouts is None or greedy is None:
        return drawn.timeouts
    found = drawn.timeouts.clone()
    found[:: drawn.rollout.group_size] += greedy
    return found


@torch.no_grad()
def log_probabilities(
    policy: Policy,
    rollouts: Sequence[Rollout],
    temperature: float,
    budget: MemoryBudget = UNLIMITED,
    process_group: ProcessGroup = SINGLE_PROCESS,
) -> list[Tensor]:
    """Per cell, log-probabilities [N, T] of its trajectories, within the memory budget."""

    def scored(pieces: list[Rollout]) -> list[Tensor]:
        return [scores.logp for scores in token_scores(policy, pieces, temperature=temperature)]

    return map_micro_batches(rollouts, budget, scored, process_group)


def rollout_prompts(member: PackedCell, number: int, again: int = 0) -> list[Example]:
    """The prompts of a rollout, or of its further draw `again` (from 1): a function of the seed and the two numbers.

    A further draw has none of the prompts drawn for this rollout before, as long as there are others.
    """
    split, training = member.split("train"), member.cell.training
    purpose = ("prompts", member.cell.seed, number)
    chosen, before = prompt_indices(member, number, len(split)), set[int]()
    for further in range(1, again + 1):
        before.update(chosen)
        chosen = _unseen_first(len(split), training.prompts, before, *purpose, further)
    return [split[index] for index in chosen]


def prompt_indices(member: PackedCell, number: int, size: int) -> list[int]:
    """Where the prompts of rollout `number` stand in the training split, which has `size` prompts."""
    return sample_indices(size, member.cell.training.prompts, "prompts", member.cell.seed, number)


def _unseen_first(size: int, count: int, before: Collection[int], *purpose: int | str) -> list[int]:
    """`count` indices below `size`, those that were not drawn before first."""
    if size - len(before) >= count:
        return [index for index in sample_indices(size, count + len(before), *purpose) if index not in before][:count]
    order = sorted(permutation(size, *purpose), key=before.__contains__)
    return (order * -(-count // size))[:count]
