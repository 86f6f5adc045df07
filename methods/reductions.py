"""Sums over a tensor that come out the same for any tiles: by a fixed tree inside each block, and then over the blocks.

The first four levels of a whole block's tree are added in the work dtype, the others, and the sum over the blocks, in
float64. Roundings to float32 are unbiased and independent, so over 2^15 elements they cancel to some 2^-30 of the sum of the sizes;
a tensor of up to 2^11 elements has none. That halves the time of a pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

from .contract import BLOCK
from .lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from .tile import Workspace

_JOINT = 1 << 11  # a tree's levels below this width are dispatched for all the sums of a tile at once


def fold(values: Tensor, width: int = 1) -> Tensor:
    """Pairwise sums along the last dimension, in place, until at most `width` columns are left: the first half plus
    the second, where the middle one of an odd number stays as it is."""
    while (columns := values.shape[-1]) > width:
        if columns % 2:
            first = values.narrow(-1, 0, columns // 2)
            first.add_(values.narrow(-1, columns - columns // 2, columns // 2))
            values = values.narrow(-1, 0, columns - columns // 2)
        else:
            values, second = values.chunk(2, -1)
            values.add_(second)
    return values


def total(sums: Iterable[float]) -> float:
    """The exact sum, rounded once; NaN where one of them is NaN, or infinities cancel."""
    try:
        return math.fsum(sums)
    except (OverflowError, ValueError):
        return math.nan


def in_blocks(values: Tensor, block: int) -> list[Tensor]:
    """A flat tensor as one view of its whole blocks (blocks, `block`) and one of what is left (1, rest)."""
    whole = values.numel() // block * block
    parts = [values[:whole].view(-1, block), values[whole:].view(1, -1)]
    return [part for part in parts if part.numel()]


class BlockSums:
    """Collects, for each block of a tile, one float64 sum of each of several float64 tensors.

    Args:
        sums: how many tensors are summed.
        elements: of the tile.
        block: elements of a block; the tile begins at a multiple of it.
        workspace: where the collected columns lie; `size` tells how much they take.
    """

    def __init__(self, sums: int, elements: int, block: int, workspace: Workspace) -> None:
        self._block = block
        self._added = 0
        widths = []
        if whole := elements // block:
            widths.append((whole, _folded_width(block)))
        if rest := elements % block:
            widths.append((1, _folded_width(rest)))
        self._parts = [
            workspace.take(sums * blocks * width, torch.float64).view(sums, blocks, width) for blocks, width in widths
        ]

    def add(self, values: Tensor) -> None:
        """The next tensor, of the tile's elements; it is folded in place, and thereby used up."""
        for part, view in zip(self._parts, in_blocks(values.view(-1), self._block), strict=True):
            part[self._added].copy_(fold(view, _JOINT))
        self._added += 1

    def partial(self) -> Tensor:
        """The sums, in a tensor of their own on the CPU: shape (sums, blocks)."""
        columns = [fold(part)[..., 0] for part in self._parts]
        return torch.cat(columns, 1).cpu() if columns else torch.zeros(0, 0, dtype=torch.float64)

    @staticmethod
    def size(sums: int) -> float:
        """Workspace that it takes, in the units of `Kernel.buffers`."""
        return 4 * sums * _JOINT / BLOCK


def _folded_width(columns: int) -> int:
    """How many columns `fold` leaves at `_JOINT`."""
    while columns > _JOINT:
        columns -= columns // 2
    return columns
