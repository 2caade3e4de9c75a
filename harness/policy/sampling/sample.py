"""klab's own sampler: trajectories of every cell of a policy, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import torch

from klab.grid.errors import UserError
from klab.harness.policy.categorical import Draw, UniformSlice, UniformTable, uniform_numbers
from klab.harness.policy.policy import BlockDecoder, IncrementalDecoder, Policy
from klab.harness.policy.rollout import Rollout
from klab.harness.policy.sampling.sampler import Environment, SamplingOptions
from klab.harness.policy.sampling.trajectory_builder import TrajectoryBuilder

MAX_JOINT_LOGITS = 2**22
"""Tokens of several cells are drawn in one call as long as that takes no more logits than this."""


def sample(
    policy: Policy,
    prompts: Sequence[Sequence[Sequence[int]]],
    generators: Sequence[torch.Generator | UniformSlice],
    options: SamplingOptions,
    environment: Environment | None = None,
    plain: bool = False,
) -> list[Rollout]:
    """Sample trajectories; see `SampleFunction` for arguments and result.

    In every step, each cell draws one random number per trajectory from its own generator, until all of its
    trajectories have ended, so that its rollout does not depend on the cells beside it.

    Args:
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
    builders = [TrajectoryBuilder(policy, cell, listed, options, environment) for cell, listed in enumerate(prompts)]
    draw = Draw(options.temperature, options.top_p, options.greedy)
    with torch.no_grad():
        given = prompts, options.group_size
        blocks = None if plain else policy.block_decoder(*given, options.max_new_tokens, draw)
        if blocks is not None:
            _sample_in_blocks(blocks, builders, generators, draw)
        else:
            decoder = policy.decoder(*given, plain, options.max_new_tokens if options.keeps_states else 0)
            cells = list(range(len(builders)))
            for together in [[cell] for cell in cells] if decoder.one_by_one else [cells]:
                _sample_by_steps(decoder, together, builders, generators, draw)
            rollouts = [builder.build() for builder in builders]
            for cell, rollout in enumerate(rollouts):
                rollout.known_states = decoder.known_states(cell)
            return rollouts
    return [builder.build() for builder in builders]


def _sample_by_steps(
    decoder: IncrementalDecoder,
    active: list[int],
    builders: Sequence[TrajectoryBuilder],
    generators: Sequence[torch.Generator | UniformSlice],
    draw: Draw,
) -> None:
    """Draw some cells' trajectories token by token; the host knows each token before the next step."""
    logits = decoder.start(active)
    while active:
        joint = sum(logits[cell].numel() for cell in active) <= MAX_JOINT_LOGITS
        for cells in [active] if joint else [[cell] for cell in active]:
            rows = torch.cat([logits[cell] for cell in cells])
            uniforms = None
            if not draw.greedy:
                drawn = [uniform_numbers(generators[cell], len(logits[cell]), rows.device) for cell in cells]
                uniforms = torch.cat(drawn)
            tokens, logp = draw(rows, uniforms)
            if rows.device.type != "cpu":  # one copy, which waits for the device
                copied, logp = torch.stack((tokens.double(), logp.double())).cpu().unbind(0)
                tokens = copied.long()
            sampled = zip(tokens.tolist(), logp.tolist(), strict=True)
            for cell in cells:
                builders[cell].add_tokens(islice(sampled, len(logits[cell])))
        active = [cell for cell in active if not builders[cell].finished]
        if active:
            last_tokens = {cell: builders[cell].last_tokens for cell in active}
            logits = decoder.step(last_tokens, {cell: builders[cell].unfinished for cell in active})


def _sample_in_blocks(
    decoder: BlockDecoder,
    builders: Sequence[TrajectoryBuilder],
    generators: Sequence[torch.Generator | UniformSlice],
    draw: Draw,
) -> None:
    """Draw block by block; a trajectory uses the same random numbers as token by token."""
    tables: list[UniformTable | None] = [None] * len(builders)
    if not draw.greedy:
        pairs = zip(generators, builders, strict=True)
        tables = [UniformTable(generator, len(builder.unfinished)) for generator, builder in pairs]
    active = list(range(len(builders)))
    while active:
        going = {cell: builders[cell].continuation(tables[cell], decoder.max_steps) for cell in active}
        for cell, block in decoder.draw(going).items():
            builders[cell].add_block(block)
        active = [cell for cell in active if not builders[cell].finished]
    decoder.close()
