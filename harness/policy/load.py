"""The policies of a pack, from the checkpoint that they start from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from harness.policy.decoder import Decoder
from harness.policy.policy import Policy


def load_policy(
    section: Any, start: str | Path, cells: int, device: torch.device | str, seeds: Sequence[int] | None = None
) -> Policy:
    """`cells` policies that begin as the checkpoint says.

    Args:
        section: the grid's policy section, `tiny` or `hf`.
        start: the folder that `starting_policy` gave.
        seeds: of each cell's adapters; 0, 1, … unless given.

    Raises:
        Mistake: the checkpoint cannot be read, or the engine that the section asks for cannot run it.
    """
    dtype = getattr(torch, section.dtype)
    if section.lora is None:
        policy = Decoder.from_pretrained(start, cells=cells, dtype=dtype, device=device)
    else:
        base = Decoder.from_pretrained(start, dtype=dtype, device=device)
        policy = base.adapted(section.lora, list(seeds or range(cells)))
        local = section.name == "tiny" or Path(section.model).expanduser().is_dir()
        policy.origin = str(Path(start).absolute()) if local else section.model
    policy.gradient_checkpointing = section.gradient_checkpointing
    return policy
