"""Sums over a tensor that do not depend on the tiles: in a fixed order within each block, then over the blocks.

A complete block is split into rows of 2^11 elements. The rows are added in order in the work dtype. The result is
summed in float64, and so are the sums of the blocks. This takes half the time of float64 sums. Rounding errors in
float32 are unbiased and independent, so their total in a block is about 2^-29 of the sum of the absolute values. A
tensor of up to 2^11 elements has none.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from ..spec import BLOCK
from .tile import Workspace

_JOINT = 1 << 11  # columns per block that remain until `partial` folds all sums of a tile at once
_MAX_ROWS = 64  # rows of a block that can be added in the work dtype


def pairwise_fold(values: Tensor, width: int = 1) -> Tensor:
    """Fold the last dimension of a tensor in place until at most `width` columns remain.

    Each step adds the second half to the first half; the middle column of an odd number is left unchanged.
    """
    columns = values.shape[-1]
    while columns > width:
        half = columns // 2
        values[..., :half].add_(values[..., columns - half : columns])
        columns -= half
    return values[..., :columns]


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
        workspace: memory for the partial sums of complete blocks: up to 2^11 float64 numbers per block and sum, and as
            many for each block.
        device: device of the tensors.
    """

    def __init__(self, sums: int, elements: int, block: int, workspace: Workspace, device: torch.device) -> None:
        complete, rest = divmod(elements, block)
        self._height = block // _JOINT if block % _JOINT == 0 and _JOINT < block <= _MAX_ROWS * _JOINT else 0
        self._split = complete * block
        self._sums: list[Tensor] = []
        self._rows = workspace.take(0, torch.float64)
        if complete:
            width = _JOINT if self._height else _folded_width(block)
            self._sums.append(workspace.take(sums * complete * width, torch.float64).view(sums, complete, width))
            if self._height:
                self._rows = workspace.take(complete * _JOINT, torch.float64)
        if rest:
            self._sums.append(torch.empty((sums, 1, _folded_width(rest)), dtype=torch.float64, device=device))
        self._at_once = device.type == "cpu" and block == BLOCK
        self._blocks = complete

    def add(self, number: int, values: Tensor) -> None:
        """Sum tensor `number`, which has the tile's size and is not modified."""
        flat = values.view(-1)
        parts = iter(self._sums)
        if self._blocks:
            into = next(parts)[number]
            within = flat[: self._split].view(self._blocks, -1)
            if self._height:
                rows = self._rows.view(values.dtype)[: self._blocks * _JOINT].view(self._blocks, _JOINT)
                self._add_rows(within.view(self._blocks, self._height, _JOINT), rows)
                into.copy_(rows)
            else:
                into.copy_(pairwise_fold(within.clone(), into.shape[1]))
        if flat.numel() > self._split:
            into = next(parts)[number]
            into.copy_(pairwise_fold(flat[self._split :].clone().view(1, -1), into.shape[1]))

    def _add_rows(self, lines: Tensor, rows: Tensor) -> None:
        if self._at_once and _sums_in_order(lines.dtype):
            torch.sum(lines, [1], out=rows)
            return
        torch.add(lines[:, 0], lines[:, 1], out=rows)
        for row in range(2, lines.shape[1]):
            rows.add_(lines[:, row])

    def partial(self) -> Tensor:
        """The sums as a new tensor of shape (sums, blocks) on the tensors' device."""
        columns = [pairwise_fold(sums)[..., 0] for sums in self._sums]
        return torch.cat(columns, 1)


def _folded_width(columns: int) -> int:
    """The number of columns that `pairwise_fold` leaves for a width of `_JOINT`."""
    while columns > _JOINT:
        columns -= columns // 2
    return columns
