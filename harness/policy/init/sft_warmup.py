"""Supervised warm-up: train on reference solutions until the accuracy suits reinforcement learning, neither 0 nor 1.

A tiny policy learns the solutions given their prompts; a small one the whole texts, as in pretraining.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from klab.grid.errors import UserError
from klab.harness.policy.rollout import Rollout
from klab.harness.policy.sampling.sample import sample
from klab.harness.policy.sampling.sampler import SamplingOptions, TranscribingEnvironment
from klab.harness.policy.scores import token_scores
from klab.harness.policy.stacked.policy import StackedPolicy
from klab.tasks.task import TURN_END, Example, Task, require_solutions, scores_transcripts

MIN_ACCURACY, MAX_ACCURACY = 0.2, 0.5
PATIENCE = 40


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a policy is warmed up.

    Attributes:
        batch_size: examples per update.
        learning_rate: Adam's, after `lr_warmup_updates` of linear warm-up.
        evaluate_every: updates between evaluations on `evaluation_examples` held-out examples.
        prompts_too: next-token prediction on prompts and solutions, rather than on solutions given prompts.
    """

    batch_size: int
    learning_rate: float
    lr_warmup_updates: int
    evaluate_every: int
    evaluation_examples: int
    prompts_too: bool


TINY = Recipe(128, 3e-3, 50, 10, 256, prompts_too=False)
SMALL = Recipe(24, 2e-3, 50, 20, 128, prompts_too=True)

Progress = Callable[[int, int, float], None]
"""`progress(update, updates_max, accuracy)`."""


def warm_up(
    policy: StackedPolicy,
    task: Task,
    target: float,
    updates_max: int,
    seed: int,
    progress: Progress | None = None,
    recipe: Recipe = TINY,
) -> dict[str, Any]:
    """Train a policy of one cell in place until its accuracy first reaches `target`.

    Adam on the mean log-likelihood of the tokens. Every few updates one sample (temperature 1) is drawn for each of
    some held-out examples. Where the accuracy exceeds the upper limit, the updates since the evaluation
    before are undone and repeated at a quarter of the learning rate. An accuracy inside 0.2..0.5 that has not improved
    for 40 evaluations is accepted.

    Returns:
        a record: updates, accuracy, number of training examples.

    Raises:
        UserError: no reference solutions, or an accuracy outside 0.2..0.5 after `updates_max` updates.
    """
    require_solutions(task)
    train, held_out = task.split("train"), task.split("held_out")
    chooser = random.Random(f"warm-up {seed}")
    examples = [held_out[i] for i in range(min(recipe.evaluation_examples, len(held_out)))]
    rate, update, accuracy = recipe.learning_rate, 0, 0.0
    optimizer = torch.optim.Adam(list(policy.parameters.values()), lr=rate, betas=(0.9, 0.99), fused=True)
    best, waited = 0.0, 0
    kept = _snapshot(policy)
    while accuracy < target and update < updates_max and not (waited >= PATIENCE and accuracy >= MIN_ACCURACY):
        for _ in range(min(recipe.evaluate_every, updates_max - update)):
            update += 1
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1.0, update / recipe.lr_warmup_updates)
            batch = [train[chooser.randrange(len(train))] for _ in range(recipe.batch_size)]
            optimizer.zero_grad()
            rollout = solution_rollout(policy, task, batch)
            if recipe.prompts_too:
                rollout = with_prompts(rollout)
            torch.autograd.backward(-token_scores(policy, [rollout])[0].logp.sum() / rollout.mask.sum())
            optimizer.step()
        accuracy = sampled_accuracy(policy, task, examples, seed)
        if progress is not None:
            progress(update, updates_max, accuracy)
        if accuracy > MAX_ACCURACY:
            _restore(policy, kept)
            accuracy, rate = 0.0, rate / 4
        else:
            kept = _snapshot(policy)
        best, waited = max(best, accuracy), 0 if accuracy > best else waited + 1
    if not MIN_ACCURACY <= accuracy <= MAX_ACCURACY:
        raise UserError(
            f"the warm-up ended at an accuracy of {accuracy:.2f} after {update} updates, "
            f"outside {MIN_ACCURACY}..{MAX_ACCURACY}",
            key="policy.warmup_updates_max",
            value=updates_max,
            hint="Allow more updates, enlarge the policy, or choose an easier task.",
        )
    return {"updates": update, "accuracy": accuracy, "examples": update * recipe.batch_size}


def solution_rollout(policy: StackedPolicy, task: Task, examples: Sequence[Example]) -> Rollout:
    """The reference solutions as trajectories, one per example: turns of the policy, each with an end-of-sequence token
    and part of the mask, and between them the environment's answers, which are not."""
    tokenizer = policy.tokenizer
    prompts = tokenizer([e.prompt for e in examples], add_special_tokens=False)["input_ids"]
    turns = [_turns(task, example) for example in examples]
    pieces = iter(tokenizer([text for row in turns for text in row], add_special_tokens=False)["input_ids"])
    rows: list[list[int]] = []
    own: list[list[bool]] = []
    for row in turns:
        rows.append([])
        own.append([])
        for number in range(len(row)):
            piece = [*next(pieces), *([] if number % 2 else [tokenizer.eos_token_id])]
            rows[-1] += piece
            own[-1] += [number % 2 == 0] * len(piece)
    T = max(len(row) for row in rows)
    device = policy.device
    return Rollout(
        prompts=[list(prompt) for prompt in prompts],
        group_size=1,
        tokens=torch.tensor([[*row, *[0] * (T - len(row))] for row in rows], device=device),
        mask=torch.tensor([[*row, *[False] * (T - len(row))] for row in own], device=device),
        present=torch.tensor([[i < len(row) for i in range(T)] for row in rows], device=device),
        logp=torch.zeros(len(rows), T, device=device),
        truncated=torch.zeros(len(rows), dtype=torch.bool, device=device),
        texts=[e.solution.replace(TURN_END, "") for e in examples],
    )


def with_prompts(rollout: Rollout) -> Rollout:
    """The same texts, scored whole: of each prompt only its first token is given, the others belong to the mask."""
    moved = [torch.tensor(prompt[1:], dtype=torch.long) for prompt in rollout.prompts]
    width = max(len(each) for each in moved) + rollout.tokens.shape[1]
    count, device = len(moved), rollout.tokens.device
    tokens = torch.zeros(count, width, dtype=torch.long, device=device)
    mask, present = (torch.zeros(count, width, dtype=torch.bool, device=device) for _ in range(2))
    for row, each in enumerate(moved):
        own = slice(len(each), len(each) + rollout.tokens.shape[1])
        tokens[row, : len(each)], tokens[row, own] = each, rollout.tokens[row]
        mask[row, : len(each)], mask[row, own] = True, rollout.mask[row]
        present[row, : len(each)], present[row, own] = True, rollout.present[row]
    first = [prompt[:1] for prompt in rollout.prompts]
    logp = torch.zeros(count, width, device=device)
    return replace(rollout, prompts=first, tokens=tokens, mask=mask, present=present, logp=logp)


def _turns(task: Task, example: Example) -> list[str]:
    """A reference solution: turns of the policy at even indices, the environment's answers between them."""
    first, *later = example.solution.split(TURN_END)
    turns = [first]
    for turn in later:
        turns += [task.respond(example, "".join(turns)) or "", turn]
    return turns


def sampled_accuracy(policy: StackedPolicy, task: Task, examples: Sequence[Example], seed: int) -> float:
    """Fraction of correct completions, one sampled per example at temperature 1."""
    prompts = policy.tokenizer([e.prompt for e in examples], add_special_tokens=False)["input_ids"]
    generator = torch.Generator(policy.device).manual_seed(seed)

    def environment(cell: int, trajectory: int, transcript: str) -> str | None:
        return task.respond(examples[trajectory], transcript)

    rollout = sample(
        policy,
        [prompts],
        [generator],
        SamplingOptions(group_size=1, max_new_tokens=task.max_new_tokens),
        TranscribingEnvironment(environment, frozenset([0] if scores_transcripts(task) else []))
        if getattr(task, "interactive", True)
        else None,
    )[0]
    return sum(task.score(e, text).correct for e, text in zip(examples, rollout.texts, strict=True)) / len(examples)


def _snapshot(policy: StackedPolicy) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in policy.parameters.items()}


@torch.no_grad()
def _restore(policy: StackedPolicy, snapshot: dict[str, Tensor]) -> None:
    for name, value in snapshot.items():
        policy.parameters[name].copy_(value)
