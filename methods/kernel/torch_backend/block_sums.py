"""Sums over a tensor that do not depend on the tiles: in a fixed order within each block, then over the blocks.

A block is split into rows of 2^11 elements; the last row can be incomplete. The rows are added in order in the type of
the summands. The result is summed in float64, and so are the sums of the blocks. This takes half the time of float64
sums. Rounding errors in float32 are unbiased and independent, so their total in a block is about 2^-29 of the sum of
the absolute values. A tensor of up to 2^11 elements has none.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from ..spec import BLOCK
from .tile import Workspace

_COLUMNS = 1 << 11  # columns per block, which `partial` folds for all sums of a tile at once


def pairwise_fold(values: Tensor) -> Tensor:
    """Fold the last dimension of a tensor in place until one column remains.

    Each step adds the second half to the first half; the middle column of an odd number is left unchanged.
    """
    columns = values.shape[-1]
    while columns > 1:
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
    rows = torch.rand(2, BLOCK // _COLUMNS, _COLUMNS, dtype=dtype, generator=generator).sub_(0.5)
    in_order = rows[:, 0].clone()
    for row in range(1, rows.shape[1]):
        in_order.add_(rows[:, row])
    return torch.equal(torch.sum(rows, 1), in_order)


def column_sums(values: Tensor, height: int) -> list[Tensor]:
    """Add the rows of each block of `height` rows in order; returns one tensor of the columns' sums per block."""
    complete = len(values) // height
    result: list[Tensor] = []
    for blocks in (
        values[: complete * height].view(complete, height, values.shape[1]),
        values[complete * height :][None],
    ):
        if blocks.numel():
            sums = blocks[:, 0].clone()
            for row in range(1, blocks.shape[1]):
                sums.add_(blocks[:, row])
            result += sums.unbind()
    return result


class BlockSums:
    """Computes one float64 sum per block of a tile for each of several tensors.

    Args:
        sums: number of tensors.
        elements: number of elements in the tile.
        block: number of elements in a block; tiles start at a block boundary.
        workspace: memory for the partial sums of complete blocks: up to 2^11 float64 numbers per block and sum, and as
            many for each block.
        device: device of the tensors.
        line: elements of a row, whose strips are added, see `StripSum`; 0 if blocks are split regardless of rows.
    """

    def __init__(
        self, sums: int, elements: int, block: int, workspace: Workspace, device: torch.device, line: int = 0
    ) -> None:
        self._line = line
        complete, rest = divmod(elements, block)
        self._split = complete * block
        self._parts: list[tuple[Tensor, Tensor]] = []
        if complete:
            width = min(line or block, _COLUMNS)
            columns = workspace.take(sums * complete * width, torch.float64).view(sums, complete, width)
            self._parts.append((columns, workspace.take(complete * width, torch.float64)))
        if rest:
            columns = torch.empty((sums, 1, min(line or rest, _COLUMNS)), dtype=torch.float64, device=device)
            self._parts.append((columns, torch.empty(columns.shape[2], dtype=torch.float64, device=device)))
        self._at_once = device.type == "cpu" and block == BLOCK

    def add(self, number: int, values: Tensor) -> None:
        """Sum tensor `number`, which has the tile's size and is not modified."""
        flat = values.view(-1)
        parts = [part for part in (flat[: self._split], flat[self._split :]) if part.numel()]
        for part, (columns, memory) in zip(parts, self._parts, strict=True):
            blocks, width = columns.shape[1:]
            rows = memory.view(values.dtype)[: blocks * width].view(blocks, width)
            if self._line:
                self._add_strips(part.view(blocks, -1, self._line), rows)
            else:
                self._add_rows(part.view(blocks, -1), rows)
            columns[number].copy_(rows)

    @staticmethod
    def _add_strips(blocks: Tensor, rows: Tensor) -> None:
        """Add the strips of each row of each block in order."""
        rows.fill_(-0.0)
        for row in blocks.unbind(1):
            for strip in torch.split(row, _COLUMNS, 1):
                rows[:, : strip.shape[1]].add_(strip)

    def _add_rows(self, blocks: Tensor, rows: Tensor) -> None:
        """Add the rows of each block in order."""
        height, rest = divmod(blocks.shape[1], _COLUMNS)
        if height:
            lines = blocks[:, : height * _COLUMNS].view(len(blocks), height, _COLUMNS)
            if height == BLOCK // _COLUMNS and self._at_once and _sums_in_order(lines.dtype):
                torch.sum(lines, [1], out=rows)
            else:
                rows.copy_(lines[:, 0])
                for row in range(1, height):
                    rows.add_(lines[:, row])
            if rest:
                rows[:, :rest].add_(blocks[:, height * _COLUMNS :])
        else:
            rows.copy_(blocks)

    def partial(self) -> Tensor:
        """The sums as a new tensor of shape (sums, blocks) on the tensors' device."""
        return torch.cat([pairwise_fold(columns)[..., 0] for columns, _ in self._parts], 1)
