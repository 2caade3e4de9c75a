"""The policies of a pack, from the checkpoint that they start from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from harness.policy.decoder import Decoder
from harness.policy.policy import Policy


def load_policy(section: Any, start: str | Path, cells: int, device: torch.device | str) -> Policy:
    """`cells` policies that begin as the checkpoint says.

    Args:
        section: the grid's policy section, `tiny` or `hf`.
        start: the folder that `starting_policy` gave.

    Raises:
        Mistake: the checkpoint cannot be read, or the engine that the section asks for cannot run it.
    """
    return Decoder.from_pretrained(start, cells=cells, dtype=getattr(torch, section.dtype), device=device)
