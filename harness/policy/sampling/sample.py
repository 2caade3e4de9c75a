"""Sampling: draw trajectories of every cell of a policy, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import torch

from klab.grid.errors import UserError
from klab.harness.policy.policy import Policy
from klab.harness.policy.rollout import Rollout
from klab.harness.policy.sampling.categorical import UniformSlice, sample_tokens, uniform_numbers
from klab.harness.policy.sampling.trajectory_builder import Environment, TrajectoryBuilder

MAX_JOINT_LOGITS = 2**22
"""Logits of several cells are drawn from in one call as long as there are no more of them than this."""


def sample(
    policy: Policy,
    prompts: Sequence[Sequence[Sequence[int]]],
    *,
    group_size: int,
    max_new_tokens: int,
    generators: Sequence[torch.Generator | UniformSlice],
    temperature: float = 1.0,
    top_p: float = 1.0,
    greedy: bool = False,
    environment: Environment | None = None,
    plain: bool = False,
) -> list[Rollout]:
    """Sample `group_size` trajectories of every prompt of every cell.

    Each cell draws from its own generator, once per step for all of its trajectories, until all of them have ended.

    Args:
        prompts: token ids [C][P][length]; every cell has as many prompts as it likes, at least one, none of them empty.
        max_new_tokens: budget of own tokens per trajectory, its end tokens included.
        generators: one per cell, on the policy's device; not used with `greedy`.
        temperature: divides the logits.
        top_p: draw from the smallest set of most likely tokens that holds this much probability.
        environment: answers when the policy ends a turn; without it, the end token ends the trajectory.
        plain: the reference path: every trajectory on its own, its whole sequence forwarded anew for every token.

    Raises:
        UserError: an empty prompt.
        ValueError: lists of other lengths than the policy has cells.
    """
    if not policy.cells == len(prompts) == len(generators):
        raise ValueError(f"{len(prompts)} prompt lists and {len(generators)} generators for {policy.cells} cells")
    for listed in prompts:
        if not listed or not all(listed):
            raise UserError("a prompt is empty", key="task")
    drafts = [
        TrajectoryBuilder(policy, cell, [list(p) for p in prompts[cell]], group_size, max_new_tokens, environment)
        for cell in range(policy.cells)
    ]
    with torch.no_grad():
        decoding = policy.decoder([draft.prompts for draft in drafts], group_size, plain)
        active = list(range(policy.cells))
        logits = decoding.start()
        while active:
            together = sum(logits[cell].numel() for cell in active) <= MAX_JOINT_LOGITS
            for cells in [active] if together else [[cell] for cell in active]:
                rows = torch.cat([logits[cell] for cell in cells])
                numbers = [
                    uniform_numbers(generators[cell], len(logits[cell]), rows.device) for cell in cells if not greedy
                ]
                tempered = rows if temperature == 1.0 else rows / temperature
                chosen, logp = sample_tokens(tempered, torch.cat(numbers) if numbers else None, top_p)
                drawn = zip(chosen.tolist(), logp.tolist(), strict=True)
                for cell in cells:
                    drafts[cell].write(islice(drawn, len(logits[cell])))
            active = [cell for cell in active if not drafts[cell].finished]
            if active:
                newest = {cell: drafts[cell].newest for cell in active}
                logits = decoding.step(newest, {cell: drafts[cell].open for cell in active})
    return [Rollout.of(draft) for draft in drafts]
