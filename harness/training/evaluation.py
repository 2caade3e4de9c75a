"""Evaluation on held-out prompts, measured one way for every cell.

The prompts are the same for all cells of a run, whatever their seed. Completions are drawn at temperature 1 without
top-p, and both divergences are exact at every own position (over the whole vocabulary), summed over a trajectory's
own tokens and averaged over trajectories: the reverse one on fresh samples of the current policy, the forward one
on samples of the reference policy. All draws have generators of their own, so evaluating never changes training.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from harness.policy.logprobs import token_scores
from harness.policy.policy import Policy
from harness.policy.rollout import Rollout
from harness.training.member import Member
from harness.training.metrics import Row, finite
from harness.training.randomness import choose
from harness.training.rollouts import draw, score
from tasks.task import Example, Score

SAMPLES = 4
"""Completions shown in a row."""

_LOGITS = 2**22
"""Logits held at once: prompts are taken in chunks, so that a large vocabulary fits in memory."""


@dataclass(frozen=True, slots=True)
class Examination:
    """What stays the same between the evaluations of one cell: its prompts, and completions of the reference
    policy."""

    examples: list[Example]
    reference: Rollout


def prepare(members: Sequence[Member], reference: Policy) -> list[Examination]:
    """The held-out prompts of each cell, and the reference policy's completions of them."""
    examples = [held_out(member) for member in members]
    samples = members[0].cell.training.evaluation_samples
    drawn = draw(reference, members, examples, samples, ("evaluation of the reference",), seeded=False)
    return [Examination(*pair) for pair in zip(examples, drawn, strict=True)]


def held_out(member: Member) -> list[Example]:
    """The prompts of every evaluation: they depend on the task and on their number alone, not on the seed."""
    split = member.split("held_out")
    count = min(len(split), member.cell.training.evaluation_prompts)
    return [split[index] for index in choose(len(split), count, "held out")]


def evaluate(
    policy: Policy, reference: Policy, members: Sequence[Member], examinations: Sequence[Examination], update: int
) -> list[Row]:
    """One row of evaluations.jsonl per cell, after `update` updates.

    Raises:
        CellFailure: where a cell's reward raises.
    """
    samples = members[0].cell.training.evaluation_samples
    examples = [examination.examples for examination in examinations]
    greedy = draw(policy, members, examples, 1, None)
    fresh = draw(policy, members, examples, samples, ("evaluation", update))
    reverse, entropy = divergence(policy, reference, members, fresh)
    forward, _ = divergence(reference, policy, members, [examination.reference for examination in examinations])
    rows = []
    for c in range(len(members)):
        best = score(members, c, examples[c], greedy[c])
        scores = score(members, c, examples[c], fresh[c])
        solved = [sum(s.correct for s in scores[g : g + samples]) for g in range(0, len(scores), samples)]
        tokens = fresh[c].mask.sum(1).double()
        rows.append(
            {
                "update": update,
                "accuracy": _mean([float(s.correct) for s in best]),
                "reward": finite(_mean([s.reward for s in scores])),
                "pass_at_k": _mean([pass_at(samples, count, samples) for count in solved]),
                "k": samples,
                "reverse_kl": finite(float(reverse[c].mean())),
                "forward_kl": finite(float(forward[c].mean())),
                "entropy": finite(float(entropy[c].sum() / tokens.sum().clamp(min=1))),
                "length": float(tokens.mean()),
                "parts": _parts(scores),
                "samples": [
                    {
                        "prompt": examples[c][row // samples].prompt,
                        "completion": fresh[c].texts[row],
                        "reward": finite(scores[row].reward),
                    }
                    for row in range(0, min(len(scores), SAMPLES * samples), samples)
                ],
            }
        )
    return rows


@torch.no_grad()
def divergence(
    policy: Policy, other: Policy, members: Sequence[Member], rollouts: Sequence[Rollout]
) -> tuple[list[Tensor], list[Tensor]]:
    """Per cell: KL(policy ‖ other) and the policy's entropy, each summed over a trajectory's own tokens, float64 [N].

    Both are exact at each position: Σ_v p(v)·(log p(v) − log q(v)) and −Σ_v p(v)·log p(v).
    """
    groups, size = len(rollouts[0].prompts), rollouts[0].group_size
    row = size * members[0].max_new_tokens * policy.vocabulary
    chunk = max(1, _LOGITS // row)  # from shapes that a pack shares, so a cell is cut alike alone and packed
    kl: list[list[Tensor]] = [[] for _ in rollouts]
    entropy: list[list[Tensor]] = [[] for _ in rollouts]
    for start in range(0, groups, chunk):
        part = range(start, min(groups, start + chunk))
        pieces = [rollout if len(part) == groups else rollout.rows(list(part)) for rollout in rollouts]
        mine, theirs = (token_scores(each, pieces, logits=True) for each in (policy, other))
        for c, piece in enumerate(pieces):
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


def pass_at(n: int, correct: int, k: int) -> float:
    """The probability that k of n samples drawn without replacement hold a correct one: 1 − C(n−c, k)/C(n, k).

    Unbiased for pass@k with n samples (Chen et al. 2021, eq. 1).
    """
    if not 1 <= k <= n:
        raise ValueError(f"k = {k} is not between 1 and n = {n}")
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _parts(scores: Sequence[Score]) -> dict[str, float | None]:
    names = sorted({name for s in scores for name in s.parts})
    return {name: finite(_mean([float(s.parts.get(name, 0.0)) for s in scores])) for name in names}
