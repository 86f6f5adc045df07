"""Sums over a tensor that come out the same for any tiles: in a fixed order inside a block, and then over the blocks.

A whole block is seen as rows of 2^11 elements. The rows are added up in the work dtype, one after the other, and what
that gives, and the sums of the blocks, in float64. That takes half as long. Roundings to float32 are unbiased and
independent, so over a block they come to some 2^-29 of the sum of the sizes; a tensor of up to 2^11 elements has none.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

from .contract import BLOCK
from .lazy import numpy as np
from .lazy import on_cpu, scripts, torch

if TYPE_CHECKING:
    from torch import Tensor

    from .tile import Workspace

_JOINT = 1 << 11  # columns that are left of a block until all the sums of a tile are folded at once
_MOST_ROWS = 64  # of a block that are added in the work dtype


def fold(values: Tensor, width: int = 1) -> Tensor:
    """Pairwise sums along the last dimension of a tensor, in place, until at most `width` columns are left: the first
    half plus the second, where the middle one of an odd number stays as it is."""
    return scripts.fold(values, width)


def total(sums: Iterable[float]) -> float:
    """The exact sum, rounded once; NaN where one of them is NaN, or infinities cancel."""
    try:
        return math.fsum(sums)
    except (OverflowError, ValueError):
        return math.nan


def add_rows(values: Tensor, out: Tensor) -> Tensor:
    """The sum over the second dimension, added one after the other: of shape (a, b, c) into `out` of shape (a, c)."""
    if on_cpu(values):
        np.add.reduce(values.numpy(), axis=1, out=out.numpy())  # in one pass over the values
        return out
    torch.add(values[:, 0], values[:, 1], out=out)
    for row in range(2, values.shape[1]):
        out.add_(values[:, row])
    return out


class BlockSums:
    """Collects, for each block of a tile, one float64 sum of each of several tensors.

    Args:
        sums: how many tensors are summed.
        elements: of the tile.
        block: elements of a block; the tile begins at a multiple of it.
        workspace: where the collected columns of whole blocks lie; `size` tells how much they take.
    """

    def __init__(self, sums: int, elements: int, block: int, workspace: Workspace) -> None:
        whole, rest = divmod(elements, block)
        self._added = 0
        self._parts: list[tuple[slice, tuple[int, ...], Tensor]] = []
        if whole:
            by_rows = block % _JOINT == 0 and 1 < block // _JOINT <= _MOST_ROWS
            shape = (whole, block // _JOINT, _JOINT) if by_rows else (whole, block)
            buffer = workspace.take(sums * whole * (_JOINT if by_rows else _folded_width(block)), torch.float64)
            self._parts.append((slice(whole * block), shape, buffer.view(sums, whole, -1)))
            if by_rows:
                self._rows = workspace.take(whole * _JOINT).view(whole, _JOINT)
        if rest:
            like = workspace.take(0, torch.float64)
            self._parts.append(
                (slice(whole * block, elements), (1, rest), like.new_empty(sums, 1, _folded_width(rest)))
            )

    def add(self, values: Tensor) -> None:
        """The next tensor, of the tile's elements and the work dtype; it stays as it is."""
        flat = values.view(-1)
        for part, shape, sums in self._parts:
            view = flat[part].view(shape)
            if len(shape) == 3:
                sums[self._added] = add_rows(view, self._rows)
            else:
                sums[self._added] = fold(view.clone(), _JOINT)
        self._added += 1

    def partial(self) -> Tensor:
        """The sums, in a tensor of their own on the CPU: shape (sums, blocks)."""
        columns = [fold(sums)[..., 0] for _, _, sums in self._parts]
        return torch.cat(columns, 1).cpu() if columns else torch.zeros(0, 0, dtype=torch.float64)

    @staticmethod
    def size(sums: int) -> float:
        """Workspace that it takes, in the units of `Kernel.buffers`."""
        return (2 * sums + 1) * _JOINT / BLOCK


def _folded_width(columns: int) -> int:
    """How many columns `fold` leaves at `_JOINT`."""
    while columns > _JOINT:
        columns -= columns // 2
    return columns
