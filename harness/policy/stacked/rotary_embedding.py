"""The rotary position embedding of the stacked engine (Su et al. 2021), with every scaling that is fixed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from klab.grid.errors import UserError


class RotaryEmbedding:
    """Factors of the rotary position embedding, in float32 as in transformers, for every scaling that is fixed.

    Attributes:
        inv_freq: [head_dim / 2], inverse frequencies.
        attention_scaling: factor of cosines and sines.
        tables: by dtype and device, cosines and sines [positions, head_dim]; replaced by longer ones on demand.

    Raises:
        UserError: a scaling whose frequencies depend on the length of the input (`dynamic`, `longrope`).
    """

    def __init__(self, config: Any, head_dim: int) -> None:
        parameters = config.rope_parameters
        kind = parameters.get("rope_type", "default")
        self.attention_scaling = 1.0
        if kind == "default":
            base = parameters["rope_theta"]
            self.inv_freq = 1.0 / (base ** (torch.arange(0, head_dim, 2, dtype=torch.float) / head_dim))
        elif kind in ("linear", "llama3", "yarn"):
            from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

            self.inv_freq, self.attention_scaling = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
        else:
            raise UserError(
                "unsupported rotary scaling",
                key="rope_parameters.rope_type",
                value=kind,
                allowed=("default", "linear", "llama3", "yarn"),
            )
        self.tables: dict[tuple[torch.dtype, torch.device], tuple[Tensor, Tensor]] = {}

    def __call__(self, positions: Tensor, dtype: torch.dtype, position_limit: int) -> tuple[Tensor, Tensor]:
        """Cosines (repeated for both halves) and sines (negated in the first half) [..., head_dim] at positions [...].

        With swap(x) the vector with its halves exchanged, the embedding of x is x · cosines + swap(x) · sines.

        Args:
            position_limit: larger than every position.
        """
        cosines, sines = self.table(dtype, positions.device, position_limit)
        flat = positions.reshape(-1)
        shape = (*positions.shape, cosines.shape[-1])
        return cosines.index_select(0, flat).view(shape), sines.index_select(0, flat).view(shape)

    def table(self, dtype: torch.dtype, device: torch.device, position_limit: int) -> tuple[Tensor, Tensor]:
        """Those factors [positions, head_dim] of all positions below the limit, and of some more."""
        key = (dtype, device)
        cosines, sines = self.tables.get(key, (None, None))
        if cosines is None or sines is None or len(cosines) < position_limit:
            angles = torch.arange(max(position_limit, 64)).float()[:, None] * self.inv_freq[None, :]
            cosine, sine = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
            cosines = torch.cat((cosine, cosine), -1).to(device, dtype)
            sines = torch.cat((-sine, sine), -1).to(device, dtype)
            self.tables[key] = (cosines, sines)
        return cosines, sines
