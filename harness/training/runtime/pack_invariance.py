"""Whether a cell of a pack has the bits that it has alone, on this processor, with this build of torch.

On CPUs a stack of cells is multiplied matrix by matrix (`layers.linear`), so its bits are those of a cell alone if the
library takes the same kernel for a matrix wherever it begins in memory and however many others are beside it. No
library promises that for every processor, so it is tried out. With several threads it does not hold: they share out the
matrices of a stack, but the rows and columns of a single matrix, and sums in pieces that depend on the stack's size.
"""

from __future__ import annotations

from functools import cache
from itertools import product

import torch
from torch import Tensor

_SHAPES = (
    *((2, 90, 8), (24, 17, 5), (64, 24, 5), (40, 12, 8), (90, 40, 2), (16, 48, 3), (5, 33, 65), (17, 64, 48)),
    *((90, 128, 384), (7, 128, 48), (32, 40, 96), (12, 384, 128)),
)
"""Products [M, K] × [K, N], among them those whose kernels were seen to depend on their place."""
_CELLS = 3


def pack_invariant() -> bool:
    """Whether products and sums over a pack are those of its cells alone, in this process on its processor."""
    return torch.get_num_threads() == 1 and _products_invariant()


@cache
def _products_invariant() -> bool:
    """Needs some 20 ms on one thread; MKL keeps its kernels for as long as a process lives."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for (rows, inner, columns), left, right in product(_SHAPES, (False, True), (False, True)):
            a = _random((_CELLS, rows, inner), left, generator)
            b = _random((_CELLS, inner, columns), right, generator)
            whole = torch.bmm(a, b)
            for cell in range(_CELLS):
                for offset in (0, 1):
                    mine, other = _moved(a[cell], offset), _moved(b[cell], offset)
                    if not torch.equal(torch.bmm(mine[None], other[None])[0], whole[cell]):
                        return False
                    if not torch.equal(torch.mm(mine, other), torch.mm(_moved(a[cell], 0), _moved(b[cell], 0))):
                        return False
                if not _sums_alike(whole, cell):
                    return False
    return True


def _random(shape: tuple[int, int, int], transposed: bool, generator: torch.Generator) -> Tensor:
    """Normal numbers; transposed ones lie in memory column by column."""
    cells, rows, columns = shape
    if transposed:
        return torch.randn(cells, columns, rows, generator=generator).transpose(1, 2)
    return torch.randn(cells, rows, columns, generator=generator)


def _moved(matrix: Tensor, offset: int) -> Tensor:
    """A copy of the same layout that begins `offset` numbers after an aligned address."""
    rows, columns = matrix.shape
    room = torch.empty(matrix.numel() + offset)[offset:]
    copy = room.view(rows, columns) if matrix.is_contiguous() else room.view(columns, rows).t()
    return copy.copy_(matrix)


def _sums_alike(stack: Tensor, cell: int) -> bool:
    """Whether the sums of one matrix of a stack are those of the matrix alone."""
    alone = stack[cell : cell + 1].clone()
    return all(torch.equal(alone.sum(axis)[0], stack.sum(axis)[cell]) for axis in (1, 2))
