"""Maxima of blocks, and one number for each block."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..access import BlockRows, Shape, matrices


def block_maxima(out: Tensor, magnitudes: Tensor, blocks: BlockRows, shape: Shape, element: int) -> None:
    """Set each element of `out` to the largest magnitude of its block; NaN if the block has a NaN.

    Args:
        out: complete rows of blocks, of shape (rows, columns).
        magnitudes: magnitudes of the same shape.
        blocks: size of the blocks.
        shape: shape of the tensor.
        element: index of the first element.
    """
    columns = out.shape[1]
    complete = columns // blocks.columns * blocks.columns
    for begin, count, height in _rows_of_blocks(out, blocks, shape, element):
        rows = slice(begin, begin + count * height)
        of_columns = magnitudes[rows].view(count, height, columns).amax(1)
        parts = [of_columns[:, :complete].reshape(count, complete // blocks.columns, blocks.columns).amax(2)]
        if complete < columns:
            parts.append(of_columns[:, complete:].amax(1, keepdim=True))
        repeated = torch.cat(parts, 1).repeat_interleave(blocks.columns, 1)[:, None, :columns]
        out[rows].view(count, height, columns).copy_(repeated.expand(count, height, columns))


def one_per_block(values: Tensor, blocks: BlockRows, shape: Shape, element: int) -> Tensor:
    """The first element of each block as a flat tensor; arguments as for `block_maxima`."""
    rows = [
        begin + number * height
        for begin, count, height in _rows_of_blocks(values, blocks, shape, element)
        for number in range(count)
    ]
    return values[torch.tensor(rows, device=values.device), :: blocks.columns].reshape(-1)


def _rows_of_blocks(values: Tensor, blocks: BlockRows, shape: Shape, element: int) -> Iterator[tuple[int, int, int]]:
    """The first row, the number of rows of blocks, and the height of each, for parts in which this is the same."""
    rows, columns = values.shape
    _, height, _ = matrices(shape)
    begin, first = 0, element // columns % height
    while begin < rows:
        left = min(height - first, rows - begin)
        count = max(1, left // blocks.rows)
        size = min(blocks.rows, left)
        yield begin, count, size
        begin += count * size
        first = (first + count * size) % height
