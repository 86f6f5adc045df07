"""Sums over a tensor that come out the same for any tiles: in a fixed order inside a block, and then over the blocks.

A whole block is seen as rows of 2^11 elements. The rows are added up in the work dtype, one after the other, and what
that gives, and the sums of the blocks, in float64. That takes half as long. Roundings to float32 are unbiased and
independent, so over a block they come to some 2^-29 of the sum of the sizes; a tensor of up to 2^11 elements has none.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING

from .contract import BLOCK
from .lazy import on_cpu, torch
from .lazy_ops import ops

if TYPE_CHECKING:
    from torch import Tensor

    from .tile import Workspace

_JOINT = 1 << 11  # columns that are left of a block until all the sums of a tile are folded at once
_MOST_ROWS = 64  # of a block that are added in the work dtype


def pairwise_fold(values: Tensor, width: int = 1) -> Tensor:
    """Pairwise sums along the last dimension of a tensor, in place, until at most `width` columns are left: the first
    half plus the second, where the middle one of an odd number stays as it is."""
    return ops.pairwise_fold(values, width)


def total(sums: Iterable[float]) -> float:
    """The exact sum, rounded once; NaN where one of them is NaN, or infinities cancel."""
    try:
        return math.fsum(sums)
    except (OverflowError, ValueError):
        return math.nan


@cache
def _sums_in_order(dtype: torch.dtype) -> bool:
    """Whether, on the CPU, `torch.sum` adds the rows of a block one after the other, in half the time of additions.

    It adds up to 16 rows like that, in the releases that were tried, but doesn't promise to.
    """
    generator = torch.Generator().manual_seed(0)
    rows = torch.rand(2, BLOCK // _JOINT, _JOINT, dtype=dtype, generator=generator).sub_(0.5)
    one_by_one = rows[:, 0].clone()
    for row in range(1, rows.shape[1]):
        one_by_one.add_(rows[:, row])
    return torch.equal(torch.sum(rows, 1), one_by_one)


class BlockSums:
    """Collects, for each block of a tile, one float64 sum of each of several tensors.

    Args:
        sums: how many tensors are summed.
        elements: of the tile.
        block: elements of a block; the tile begins at a multiple of it.
        workspace: where the collected columns of whole blocks lie; `size` tells how much they take.

    Attributes:
        places: where the sums of each tensor go; for scripts that add up several.
    """

    def __init__(self, sums: int, elements: int, block: int, workspace: Workspace) -> None:
        whole, rest = divmod(elements, block)
        parts: list[Tensor] = []
        spans: list[list[int]] = []
        rows = workspace.take(0)
        height = block // _JOINT if block % _JOINT == 0 and _JOINT < block <= _MOST_ROWS * _JOINT else 0
        if whole:
            width = _JOINT if height else _folded_width(block)
            parts.append(workspace.take(sums * whole * width, torch.float64).view(sums, whole, width))
            spans.append([0, whole * block, height])
            if height:
                rows = workspace.take(whole * _JOINT).view(whole, _JOINT)
        if rest:
            parts.append(rows.new_empty((sums, 1, _folded_width(rest)), dtype=torch.float64))
            spans.append([whole * block, elements, 0])
        at_once = on_cpu(rows) and block == BLOCK and _sums_in_order(rows.dtype)
        self.places = ops.Places(parts, spans, rows, at_once)
        self._added = 0

    def add(self, values: Tensor) -> None:
        """The next tensor, of the tile's elements and the work dtype; it stays as it is."""
        ops.block_sums(values, self._added, self.places)
        self._added += 1

    def partial(self) -> Tensor:
        """The sums, in a tensor of their own on the CPU: shape (sums, blocks)."""
        columns = [pairwise_fold(sums)[..., 0] for sums in self.places.sums]
        return torch.cat(columns, 1).cpu() if columns else torch.zeros(0, 0, dtype=torch.float64)

    @staticmethod
    def size(sums: int) -> float:
        """Workspace that it takes, in the units of `Kernel.buffers`."""
        return (2 * sums + 1) * _JOINT / BLOCK


def _folded_width(columns: int) -> int:
    """How many columns `pairwise_fold` leaves at `_JOINT`."""
    while columns > _JOINT:
        columns -= columns // 2
    return columns
