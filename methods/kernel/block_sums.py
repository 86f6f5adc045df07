"""Sums over a tensor that do not depend on the tiles: in a fixed order within each block, then over the blocks.

A complete block is split into rows of 2^11 elements. The rows are added in order in the work dtype. The result is
summed in float64, and so are the sums of the blocks. This takes half the time of float64 sums. Rounding errors in
float32 are unbiased and independent, so their total in a block is about 2^-29 of the sum of the absolute values. A
tensor of up to 2^11 elements has none.
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

_JOINT = 1 << 11  # columns per block that remain until `partial` folds all sums of a tile at once
_MAX_ROWS = 64  # rows of a block that can be added in the work dtype


def pairwise_fold(values: Tensor, width: int = 1) -> Tensor:
    """Fold the last dimension of a tensor in place until at most `width` columns remain.

    Each step adds the second half to the first half; the middle column of an odd number is left unchanged.
    """
    return ops.pairwise_fold(values, width)


def total(sums: Iterable[float]) -> float:
    """The exact sum, rounded once; NaN if a summand is NaN or if infinities cancel."""
    try:
        return math.fsum(sums)
    except (OverflowError, ValueError):
        return math.nan


@cache
def _sums_in_order(dtype: torch.dtype) -> bool:
    """Whether `torch.sum` adds the rows of a block in order on the CPU, which takes half the time of single additions.

    torch releases up to now do so for up to 16 rows, but its documentation does not guarantee it.
    """
    generator = torch.Generator().manual_seed(0)
    rows = torch.rand(2, BLOCK // _JOINT, _JOINT, dtype=dtype, generator=generator).sub_(0.5)
    in_order = rows[:, 0].clone()
    for row in range(1, rows.shape[1]):
        in_order.add_(rows[:, row])
    return torch.equal(torch.sum(rows, 1), in_order)


class BlockSums:
    """Computes one float64 sum per block of a tile for each of several tensors.

    Args:
        sums: number of tensors.
        elements: number of elements in the tile.
        block: number of elements in a block; tiles start at a block boundary.
        workspace: memory for the partial sums of complete blocks; see `size`.

    Attributes:
        buffers: buffers of the sums, for functions in `ops` that sum several tensors.
    """

    def __init__(self, sums: int, elements: int, block: int, workspace: Workspace) -> None:
        complete, rest = divmod(elements, block)
        parts: list[Tensor] = []
        spans: list[list[int]] = []
        rows = workspace.take(0)
        height = block // _JOINT if block % _JOINT == 0 and _JOINT < block <= _MAX_ROWS * _JOINT else 0
        if complete:
            width = _JOINT if height else _folded_width(block)
            parts.append(workspace.take(sums * complete * width, torch.float64).view(sums, complete, width))
            spans.append([0, complete * block, height])
            if height:
                rows = workspace.take(complete * _JOINT).view(complete, _JOINT)
        if rest:
            parts.append(rows.new_empty((sums, 1, _folded_width(rest)), dtype=torch.float64))
            spans.append([complete * block, elements, 0])
        at_once = on_cpu(rows) and block == BLOCK and _sums_in_order(rows.dtype)
        self.buffers = ops.BlockSumBuffers(parts, spans, rows, at_once)
        self._added = 0

    def add(self, values: Tensor) -> None:
        """Sum the next tensor, which has the tile's size and the work dtype and is not modified."""
        ops.block_sums(values, self._added, self.buffers)
        self._added += 1

    def partial(self) -> Tensor:
        """The sums as a new CPU tensor of shape (sums, blocks)."""
        columns = [pairwise_fold(sums)[..., 0] for sums in self.buffers.sums]
        return torch.cat(columns, 1).cpu() if columns else torch.zeros(0, 0, dtype=torch.float64)

    @staticmethod
    def size(sums: int) -> float:
        """The required workspace, in the units of `Kernel.workspace_per_element`."""
        return (2 * sums + 1) * _JOINT / BLOCK


def _folded_width(columns: int) -> int:
    """The number of columns that `pairwise_fold` leaves for a width of `_JOINT`."""
    while columns > _JOINT:
        columns -= columns // 2
    return columns
