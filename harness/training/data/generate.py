"""Sample completions of examples for every cell of a pack, each with random numbers of its own."""

from __future__ import annotations

from collections.abc import Sequence

from klab.harness.policy.categorical import UniformSlice
from klab.harness.policy.policy import Policy
from klab.harness.policy.rollout import Rollout
from klab.harness.policy.sampling.sample import sample
from klab.harness.policy.sampling.sampler import Environment, SampleFunction, SamplingOptions, TranscribingEnvironment
from klab.harness.training.data.prompts import encode_prompts
from klab.harness.training.microbatch import UNLIMITED, MemoryBudget
from klab.harness.training.packed_cell import CellFailure, PackedCell
from klab.harness.training.runtime.rng import generator
from klab.tasks.task import Example, scores_transcripts


def generate(
    policy: Policy,
    members: Sequence[PackedCell],
    examples: Sequence[Sequence[Example]],
    group_size: int,
    purpose: tuple[int | str, ...] | None,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seeded: bool = True,
    sampler: SampleFunction = sample,
    positions: Sequence[int] | None = None,
    budget: MemoryBudget = UNLIMITED,
    share: range | None = None,
    keeps_states: bool = False,
) -> list[Rollout]:
    """Sample completions of each cell's examples.

    Args:
        purpose: names the random draw, None is greedy decoding.
        seeded: an unseeded draw is the same for all seeds.
        sampler: who draws.
        positions: where the members stand in their pack, if they are not all of it.
        budget: what may be sampled at once; trajectories get the random numbers that they would have without it.
        share: only of these examples of each cell, with the random numbers that they have among all of them.
        keeps_states: see `SamplingOptions`.
    """
    share = range(len(examples[0])) if share is None else share
    draws = [(*(purpose or ("greedy",)), member.cell.seed if seeded else "every seed") for member in members]
    prompts = [
        encode_prompts(policy, member, listed[share.start : share.stop])
        for member, listed in zip(members, examples, strict=True)
    ]
    cuts = [budget.sampling_slices([len(p) for p in listed], group_size, max_new_tokens) for listed in prompts]
    options = SamplingOptions(group_size, max_new_tokens, temperature, top_p, purpose is None, keeps_states)
    found: list[list[Rollout]] = [[] for _ in members]
    for part in range(max(map(len, cuts))):
        cells = [c for c, slices in enumerate(cuts) if part < len(slices)]
        starts = [share.start + cuts[c][part].start for c in cells]
        sampled = sampler(
            policy if len(cells) == len(members) else policy.select(cells),
            [prompts[c][cuts[c][part]] for c in cells],
            [
                UniformSlice(generator(*draws[c]), start * group_size, len(examples[c]) * group_size)
                for c, start in zip(cells, starts, strict=True)
            ],
            options,
            environment_of(
                [members[c] for c in cells],
                [examples[c][start:] for c, start in zip(cells, starts, strict=True)],
                group_size,
                [(positions or range(len(members)))[c] for c in cells],
            ),
        )
        for c, rollout in zip(cells, sampled, strict=True):
            found[c].append(rollout)
    return [Rollout.concatenate(parts) for parts in found]


def environment_of(
    members: Sequence[PackedCell], examples: Sequence[Sequence[Example]], group_size: int, positions: Sequence[int]
) -> Environment | None:
    """The tasks' answers to what the policies write; None where no task ever answers, which spares much asking."""
    if not any(getattr(member.task, "interactive", True) for member in members):
        return None

    def answer(cell: int, trajectory: int, transcript: str) -> str | None:
        example = examples[cell][trajectory // group_size]
        try:
            return members[cell].task.respond(example, transcript)
        except Exception as error:
            name = members[cell].task.name
            raise CellFailure(
                positions[cell],
                f"the environment of task {name!r} raised {type(error).__name__}: {error} "
                f"(prompt {example.prompt!r}, transcript {transcript!r})",
            ) from error

    listed = [i for i, member in enumerate(members) if scores_transcripts(member.task)]
    return TranscribingEnvironment(answer, frozenset(listed))
