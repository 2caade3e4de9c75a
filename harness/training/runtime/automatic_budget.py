"""The token budget of cells on a GPU that set none: what the memory beside weights and moments has room for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from klab.grid.schema.sections import PolicySection, Sampler
from klab.harness.policy.footprint import Footprint
from klab.harness.policy.load import engine_for
from klab.harness.policy.policy import Policy
from klab.harness.policy.stacked.recorded_steps import KEPT_SHARE
from klab.harness.training.distributed.process_group import ProcessGroup
from klab.harness.training.microbatch import MemoryBudget

USABLE = 0.85
"""Share of a GPU's memory that is planned with: the rest is for CUDA itself, for temporaries, and for gaps."""


def automatic_budget(
    budget: MemoryBudget,
    policy: Policy,
    section: PolicySection,
    sampler: Sampler | None,
    cells: int,
    process_group: ProcessGroup,
) -> MemoryBudget:
    """The budget with a number of tokens where the cells of a pack set neither that nor a number of trajectories.

    The memory that the GPU has decides, not what is free of it: a cell that is resumed gets the same budget. Processes
    that train together take that of the smallest GPU. Elsewhere than on GPUs the budget stays as it is.

    Args:
        policy: in training, with everything in place but gradients.
        section: the grid's, of all cells.
        sampler: what draws beside the trainer, of all cells.
    """
    if policy.device.type != "cuda" or budget.rows is not None or budget.tokens is not None:
        return budget
    sizes = Footprint.of(section, policy.config, engine_for(section, policy.config))
    if sizes is None:
        return budget

    def fits() -> int:
        memory = torch.cuda.get_device_properties(policy.device).total_memory
        held = torch.cuda.memory_allocated(policy.device) + _size(policy.parameters.values())
        share = 0.0 if sampler is None else sampler.share_while_training
        return tokens_that_fit(sizes, int((1 - share) * memory) - held, cells, memory)

    found: list[int] = process_group.all_gather_object("token budgets", fits, policy.device)
    return replace(budget, tokens=min(found))


def tokens_that_fit(sizes: Footprint, free: int, cells: int, memory: int) -> int:
    """Tokens of each of some cells for whose activations there is room beside a chunk of logits and the keys and values
    that the stacked engine keeps between rollouts; at least 1.

    Args:
        free: bytes that weights, moments and gradients leave.
        memory: bytes of the whole device.
    """
    kept = KEPT_SHARE if sizes.engine == "stacked" else 0.0
    room = free - (1 - USABLE + kept) * memory - sizes.logits(memory, "cuda")
    return sizes.tokens_within(int(room / cells))


def _size(tensors: Iterable[Tensor]) -> int:
    """Bytes that this process holds; of tensors that are shared out, its part."""
    own = [value.to_local() if hasattr(value, "to_local") else value for value in tensors]
    return sum(value.numel() * value.itemsize for value in own)
