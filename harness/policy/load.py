"""Load the policies of a pack from their checkpoint, with the engine that can run it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from klab.grid.errors import UserError
from klab.harness.policy.hf.policy import TransformersPolicy
from klab.harness.policy.hf.sharded import ShardedPolicy
from klab.harness.policy.policy import Policy
from klab.harness.policy.pretrained import checkpoint_config
from klab.harness.policy.stacked.architecture import Architecture
from klab.harness.policy.stacked.policy import StackedPolicy
from klab.harness.policy.stacked.rotary_embedding import RotaryEmbedding

Engine = Literal["stacked", "transformers"]


def load_policy(
    section: Any,
    start: str | Path,
    cells: int,
    device: torch.device | str,
    seeds: Sequence[int] | None = None,
    group: Any = None,
) -> Policy:
    """`cells` policies with the weights of one checkpoint.

    Args:
        section: the grid's policy section.
        start: the folder that `initial_policy` returned.
        seeds: of each cell's new adapters; 0, 1, … unless given.
        group: torch's process group in which a section with `sharding: full` shares out its weights; None: all
            processes of the job.

    Raises:
        UserError: the checkpoint cannot be read, or the engine that the section asks for cannot run it.
    """
    dtype, lora, seeds = getattr(torch, section.dtype), section.lora, list(seeds or range(cells))
    policy: StackedPolicy | TransformersPolicy | ShardedPolicy
    if is_sharded(section):
        whole = TransformersPolicy.from_pretrained(start, seeds, dtype, "cpu", lora, False, section.trust_remote_code)
        policy = ShardedPolicy.shared_out(
            whole, torch.device(device), group, section.offload, section.gradient_checkpointing
        )
    elif engine_of(section, start) == "transformers":
        policy = TransformersPolicy.from_pretrained(
            start, seeds, dtype, device, lora, section.gradient_checkpointing, section.trust_remote_code
        )
    else:
        policy = StackedPolicy.from_pretrained(start, cells=1 if lora else cells, dtype=dtype, device=device)
        policy = policy if lora is None else policy.with_lora(lora, seeds)
        policy.gradient_checkpointing = section.gradient_checkpointing
    local = section.name != "hf" or Path(section.model).expanduser().is_dir()
    policy.origin = str(Path(start).absolute()) if local else section.model
    policy.revision = None if local else section.revision
    return policy


def is_sharded(section: Any) -> bool:
    """Whether the processes of a job share out the weights of a policy section."""
    return bool(getattr(section, "sharding", "none") != "none")


def engine_of(section: Any, start: str | Path) -> Engine:
    """Which engine runs a checkpoint: the stacked one if it knows the architecture, unless the section says otherwise.

    Raises:
        UserError: no readable configuration, or the section insists on the stacked engine, which does not know the
            architecture.
    """
    return engine_for(section, checkpoint_config(start, getattr(section, "trust_remote_code", False)))


def engine_for(section: Any, config: Any) -> Engine:
    """`engine_of`, from the transformers configuration of a checkpoint."""
    asked = getattr(section, "engine", "stacked")
    if asked == "transformers" or is_sharded(section):
        return "transformers"
    try:
        RotaryEmbedding(config, Architecture.from_config(config).head_dim)
    except UserError:
        if asked == "stacked":
            raise
        return "transformers"
    return "stacked"
