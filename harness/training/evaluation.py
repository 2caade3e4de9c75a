"""Evaluation on held-out prompts, the same for every cell: accuracy, reward, pass@k, and exact KL to the start.

The prompts are the same for all cells of a run, whatever their seed. Completions are drawn at temperature 1 without
top-p, and both divergences are exact at every own position (over the whole vocabulary), summed over a trajectory's
own tokens and averaged over trajectories: the reverse one on fresh samples of the current policy, the forward one
on samples of the reference policy. That reference is the policy that a cell started from, whatever its KL term is
compared with: one yardstick for all cells. KL to a reference that moves is a number of its own. All draws have
generators of their own, so evaluating never changes training.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from klab.harness.policy.policy import Policy
from klab.harness.policy.rollout import Rollout
from klab.harness.policy.sampling.sampler import SampleFunction
from klab.harness.policy.scores import token_scores
from klab.harness.training.data.generate import generate
from klab.harness.training.data.samplers import sample_function, sampling_budget
from klab.harness.training.data.scoring import score_completions
from klab.harness.training.distributed.gathering import gathered
from klab.harness.training.distributed.messages import message_type
from klab.harness.training.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from klab.harness.training.equal_cells import EqualCells
from klab.harness.training.metrics import Row, finite
from klab.harness.training.microbatch import UNLIMITED, MemoryBudget, is_padding, pack_micro_batches
from klab.harness.training.pack_settings import PackSettings
from klab.harness.training.packed_cell import PackedCell
from klab.harness.training.runtime.rng import sample_indices
from klab.tasks.task import Example, Score

SAMPLES = 4
"""Completions shown in a row."""

_LOGITS = 2**22
"""Logits held at once: rows are taken in chunks, so that a large vocabulary fits in memory."""


@dataclass(frozen=True, slots=True)
class EvalSet:
    """What all evaluations of one cell share: its prompts, and the reference policy's completions of this process's
    part of them."""

    examples: list[Example]
    reference: Rollout | None


@message_type
@dataclass(frozen=True, slots=True)
class EvalOutputs:
    """What evaluating some of a cell's prompts gave; M = prompts × completions per prompt.

    Attributes:
        best: the score of each prompt's greedy completion.
        scores, texts: of the M samples.
        tokens: float64 [M], own tokens of each sample.
        reverse, entropy: float64 [M], see `sequence_divergence`.
        moving: as `reverse`, to a reference policy that moves; none where it stays.
        forward: float64 [prompts × `evaluation_samples`], on samples of the reference.
    """

    best: list[Score]
    scores: list[Score]
    texts: list[str]
    tokens: Tensor
    reverse: Tensor
    forward: Tensor
    entropy: Tensor
    moving: Tensor

    @classmethod
    def joined(cls, parts: Sequence[EvalOutputs]) -> EvalOutputs:
        """Concatenate the outputs for several parts of a cell's prompts."""
        tensors = ("tokens", "reverse", "forward", "entropy", "moving")
        return cls(
            [score for part in parts for score in part.best],
            [score for part in parts for score in part.scores],
            [text for part in parts for text in part.texts],
            *(torch.cat([getattr(part, name) for part in parts]) for name in tensors),
        )


def prepare_eval_sets(
    settings: PackSettings,
    members: Sequence[PackedCell],
    reference: Policy,
    budget: MemoryBudget = UNLIMITED,
    process_group: ProcessGroup = SINGLE_PROCESS,
) -> list[EvalSet]:
    """The held-out prompts of each cell, and the reference policy's completions of them."""
    examples = [held_out(member) for member in members]
    samples, share = settings.evaluation_samples, process_group.shard(len(examples[0]))
    purpose = ("evaluation of the reference",)
    with gathered(process_group, reference):
        if not share:
            return [EvalSet(listed, None) for listed in examples]
        equal = EqualCells.with_equal_starts(settings, members, examples, reference, by_seed=False)
        drawn = generate(
            reference.select(equal.chosen),
            equal.some(members),
            equal.some(examples),
            samples,
            purpose,
            settings.max_new_tokens,
            seeded=False,
            budget=budget,
            share=share,
        )
    return [EvalSet(*pair) for pair in zip(examples, equal.all(drawn), strict=True)]


def held_out(member: PackedCell) -> list[Example]:
    """The prompts of every evaluation: they depend on the task and on their number alone, not on the seed."""
    split = member.split("held_out")
    count = min(len(split), member.cell.training.evaluation_prompts)
    return [split[index] for index in sample_indices(len(split), count, "held out")]


def evaluate(
    policy: Policy,
    reference: Policy,
    settings: PackSettings,
    members: Sequence[PackedCell],
    eval_sets: Sequence[EvalSet],
    update: int,
    budget: MemoryBudget = UNLIMITED,
    process_group: ProcessGroup = SINGLE_PROCESS,
    moving: Policy | None = None,
) -> list[Row]:
    """One row of evaluations.jsonl per cell, after `update` updates. The processes of the group share the
    prompts.

    Args:
        reference: the policies that the cells started from.
        budget: what may go through the policies at once.
        moving: the references of their KL terms, where these move.

    Raises:
        CellFailure: where a cell's reward raises.
    """
    samples, k = settings.completions_after(update), settings.evaluation_samples
    examples = [eval_set.examples for eval_set in eval_sets]
    sampler = sample_function(settings.sampler, policy, members, process_group)

    def answered() -> list[EvalOutputs]:
        share = process_group.shard(len(examples[0]))
        if not share:
            return []
        return _eval_outputs(policy, reference, moving, settings, members, eval_sets, update, budget, share, sampler)

    with gathered(process_group, policy, reference):
        parts = [part for part in process_group.all_gather_object("answers", answered, policy.device) if part]
    rows = []
    for c in range(len(members)):
        found = EvalOutputs.joined([part[c] for part in parts])
        scores = found.scores
        solved = [sum(s.correct for s in scores[g : g + samples]) for g in range(0, len(scores), samples)]
        rows.append(
            {
                "update": update,
                "accuracy": _mean([float(s.correct) for s in found.best]),
                "reward": finite(_mean([s.reward for s in scores])),
                "reward_se": sampling_error([s.reward for s in scores], samples),
                "completions": len(scores),
                "pass_at_k": _mean([pass_at_k(samples, count, k) for count in solved]),
                "k": k,
                "reverse_kl": finite(float(found.reverse.mean())),
                "forward_kl": finite(float(found.forward.mean())),
                **({} if moving is None else {"moving_kl": finite(float(found.moving.mean()))}),
                "entropy": finite(float(found.entropy.sum() / found.tokens.sum().clamp(min=1))),
                "length": float(found.tokens.mean()),
                "parts": _parts(scores),
                **_timeouts(members[c], [*found.best, *scores]),
                "samples": [
                    {
                        "prompt": examples[c][row // samples].prompt,
                        "completion": found.texts[row],
                        "reward": finite(scores[row].reward),
                    }
                    for row in range(0, min(len(scores), SAMPLES * samples), samples)
                ],
            }
        )
    return rows


def _eval_outputs(
    policy: Policy,
    reference: Policy,
    moving: Policy | None,
    settings: PackSettings,
    members: Sequence[PackedCell],
    eval_sets: Sequence[EvalSet],
    update: int,
    budget: MemoryBudget,
    share: range,
    sampler: SampleFunction,
) -> list[EvalOutputs]:
    """Evaluate a part of every cell's prompts, with completions from whoever draws the rollouts."""
    examples = [eval_set.examples for eval_set in eval_sets]
    samples = settings.completions_after(update)
    equal = EqualCells.all_different(len(members))
    if update == 0 and moving is None:
        equal = EqualCells.with_equal_starts(settings, members, examples, policy, by_seed=True)
        policy, reference = policy.select(equal.chosen), reference.select(equal.chosen)
    chosen = equal.some(members), equal.some(examples)
    drawing = partial(generate, policy, *chosen, sampler=sampler, budget=sampling_budget(settings.sampler, budget))
    greedy = drawing(1, None, settings.max_new_tokens, share=share)
    fresh = drawing(samples, ("evaluation", update), settings.max_new_tokens, share=share)
    kept = [each.reference for each in equal.some(eval_sets) if each.reference is not None]
    reverse, entropy = sequence_divergence(policy, reference, fresh, settings.max_new_tokens, budget)
    followed = [each[:0] for each in reverse]
    if moving is not None:
        followed, _ = sequence_divergence(policy, moving, fresh, settings.max_new_tokens, budget)
    forward, _ = sequence_divergence(reference, policy, kept, settings.max_new_tokens, budget)
    own = [listed[share.start : share.stop] for listed in examples]
    return [
        EvalOutputs(
            best=score_completions(members, c, own[c], greedy[place]),
            scores=score_completions(members, c, own[c], fresh[place]),
            texts=fresh[place].texts,
            tokens=fresh[place].mask.sum(1).double(),
            reverse=reverse[place],
            forward=forward[place],
            entropy=entropy[place],
            moving=followed[place],
        )
        for c, place in enumerate(equal.place)
    ]


@torch.no_grad()
def sequence_divergence(
    policy: Policy,
    other: Policy,
    rollouts: Sequence[Rollout],
    max_new_tokens: int,
    budget: MemoryBudget = UNLIMITED,
) -> tuple[list[Tensor], list[Tensor]]:
    """Per cell: KL(policy ‖ other) and the policy's entropy, each summed over a trajectory's own tokens, float64 [N].

    Both are exact at each position: Σ_v p(v)·(log p(v) − log q(v)) and −Σ_v p(v)·log p(v).
    """
    rows = max(1, _LOGITS // (max_new_tokens * policy.vocab_size))
    budget = replace(budget, rows=min(budget.rows or rows, rows))
    kl: list[list[Tensor]] = [[] for _ in rollouts]
    entropy: list[list[Tensor]] = [[] for _ in rollouts]
    for micro_batch in pack_micro_batches(rollouts, budget):
        pieces = [piece for piece, _ in micro_batch]
        mine, theirs = (token_scores(each, pieces, logits=True) for each in (policy, other))
        for c, piece in enumerate(pieces):
            if is_padding(micro_batch[c]):
                continue
            p, q = _log_softmax(mine[c].logits), _log_softmax(theirs[c].logits)
            mass = p.exp()
            # 0·log 0 = 0, also where a logit is −∞; NaN stays NaN
            terms = torch.where(mass == 0, 0.0, mass * (p - q)).sum(-1)
            surprise = torch.where(mass == 0, 0.0, -mass * p).sum(-1)
            kl[c].append(terms.masked_fill(~piece.mask, 0.0).double().sum(1))
            entropy[c].append(surprise.masked_fill(~piece.mask, 0.0).double().sum(1))
    return [torch.cat(values) for values in kl], [torch.cat(values) for values in entropy]


def _log_softmax(logits: Tensor | None) -> Tensor:
    assert logits is not None
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def pass_at_k(n: int, correct: int, k: int) -> float:
    """The probability that k of n samples drawn without replacement hold a correct one: 1 − C(n−c, k)/C(n, k).

    Unbiased for pass@k with n samples (Chen et al. 2021, eq. 1).
    """
    if not 1 <= k <= n:
        raise ValueError(f"k = {k} is not between 1 and n = {n}")
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def sampling_error(values: Sequence[float], samples: int) -> float | None:
    """The standard error of the mean of values that were sampled `samples` times for each of several fixed prompts:
    √(Σ_prompts s²/samples) / prompts. None for single samples, and where it is not finite."""
    if samples < 2:
        return None
    table = torch.tensor(values, dtype=torch.float64).reshape(-1, samples)
    return finite(float((table.var(dim=1).sum() / samples).sqrt()) / len(table))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _parts(scores: Sequence[Score]) -> dict[str, float | None]:
    """Each part's mean over the scores that have it."""
    names = sorted({name for s in scores for name in s.parts})
    return {name: finite(_mean([float(s.parts[name]) for s in scores if name in s.parts])) for name in names}


def _timeouts(member: PackedCell, scores: Sequence[Score]) -> dict[str, int]:
    """How many rewards of an evaluation a limit of time decided, where the task has such limits."""
    if not getattr(member.task, "has_reward_timeouts", False):
        return {}
    return {"reward_timeouts": sum(score.timeouts for score in scores)}
