"""Memory at fixed addresses for decoding: keys and values of every row, and what a block of steps reads and writes.

Row r of cell c is number r·C + c, so that fewer rows are the first ones of the same memory, and shorter rows its first
slots: steps of every size are recorded over one buffer.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from klab.harness.policy.stacked.model import StackedModel

BLOCK = 32
"""Most steps between two copies of drawn tokens to the host."""


def bucket(count: int, least: int) -> int:
    """The smallest of 1, 2, 3, 4, 6, 8, 12, 16, … that is at least both numbers."""
    most = max(count, least, 1)
    power = 1 << (most - 1).bit_length()
    return power * 3 // 4 if power >= 4 and power * 3 // 4 >= most else power


def halvings(most: int, least: int) -> list[int]:
    """`most`, and its halves as long as they are whole and at least `least`; ascending."""
    sizes = [most]
    while sizes[-1] % 2 == 0 and sizes[-1] // 2 >= least:
        sizes.append(sizes[-1] // 2)
    return sizes[::-1]


class DecodingMemory:
    """Room for C·R rows of L slots.

    Attributes:
        rows, length: R, L.
        kv: [C·R, num_layers, 2, num_kv_heads, L, head_dim].
        hidden: final hidden states [R, C, hidden_size].
        integers: [3 + BLOCK, C·R], of each row: the token that is to be forwarded, its position, whether it goes on,
            and the tokens that it must take in the steps of the block, -1 for those that are drawn.
        uniforms: float64 [BLOCK, C·R].
        step: [1], of the block.
        drawn: float64 [2, BLOCK, C·R], tokens and their log-probabilities.
        ends_turn: [vocab_size], which tokens end a turn.
    """

    def __init__(self, model: StackedModel, rows: int, length: int, eos_token_ids: Iterable[int]) -> None:
        a, device = model.architecture, model.device
        self.rows, self.length = rows, length
        places = rows * model.cells
        self.kv = torch.zeros(
            (places, a.num_layers, 2, a.num_kv_heads, length, a.head_dim), dtype=model.dtype, device=device
        )
        self.hidden = torch.zeros((rows, model.cells, a.hidden_size), dtype=model.dtype, device=device)
        self.integers = torch.zeros((3 + BLOCK, places), dtype=torch.long, device=device)
        self.uniforms = torch.zeros((BLOCK, places), dtype=torch.float64, device=device)
        self.step = torch.zeros(1, dtype=torch.long, device=device)
        self.drawn = torch.zeros((2, BLOCK, places), dtype=torch.float64, device=device)
        ends = torch.zeros(a.vocab_size, dtype=torch.bool)
        ends[list(eos_token_ids)] = True
        self.ends_turn = ends.to(device)

    @property
    def size(self) -> int:
        """Bytes."""
        held = (self.kv, self.hidden, self.integers, self.uniforms, self.drawn)
        return sum(each.numel() * each.element_size() for each in held)

    def keys_values(self, layer: int, places: int, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the first slots of the first places, [num_kv_heads, places, length, head_dim]."""
        keys, values = self.kv[:places, layer, :, :, :length].transpose(0, 2).unbind(1)
        return keys, values

    def move(self, source: Tensor, target: Tensor, length: int) -> None:
        """Copy the first slots of some places to others, layer by layer."""
        for layer in range(self.kv.shape[1]):
            each = self.kv[:, layer, :, :, :length]
            each.index_copy_(0, target, each.index_select(0, source))
