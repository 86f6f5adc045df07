"""Computes the values of inputs that are staged in another order than the output's elements, by index arithmetic."""

from __future__ import annotations

import torch
from torch import Tensor

from ..access import BlockRows, FactorAccess, Nibbles, TransposedSlice, matrices, row_range
from ..spec import InputSpec
from .tile import Tile

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""The numbers of the OCP format E2M1 by their bits."""


def loaded(values: Tensor) -> Tensor:
    """Stored numbers in a dtype that torch converts exactly."""
    if values.dtype is not torch.float8_e8m0fnu:
        return values
    exponents = values.view(torch.uint8).to(torch.int32)
    bits = torch.where(exponents == 0, 1 << 22, exponents << 23)  # the smallest power of 2 is subnormal
    return torch.where(exponents == 255, 0x7FC0_0000, bits).view(torch.float32)


def staged_values(tile: Tile, index: int, spec: InputSpec) -> Tensor:
    """The stored number of an input for each element of a tile, of shape (elements,)."""
    rows, columns = _places(tile, spec)
    access, staged = spec.access(index), tile.staged[index]
    values = tile.inputs[index]
    if isinstance(access, Nibbles):
        part = spec.part(index)
        first = access.byte(spec.shape, part, staged[0])
        places = columns.div(2, rounding_mode="floor").add_(rows * part[-1]).sub_(first)
        return _halves(values, places, columns % 2, access.numbers)
    if isinstance(access, BlockRows):
        places = _in_blocks(access, spec, rows, columns, staged[0])
    elif isinstance(access, TransposedSlice):
        places = _in_columns(access, spec, rows, columns, staged)
        if access.numbers:
            return _halves(values, places, rows % matrices(spec.shape)[1] % 2, access.numbers)
    else:
        raise TypeError(f"kernels cannot read an input with {access}")
    return loaded(_selected(values, places))


def _halves(values: Tensor, places: Tensor, odd: Tensor, numbers: str) -> Tensor:
    """Numbers of four bits: the low bits of a byte, or the high ones where `odd` is 1."""
    bits = (values.index_select(0, places) >> (odd * 4).to(torch.uint8)) & 15
    if numbers == "U4":
        return bits
    return torch.tensor(_E2M1, device=values.device).index_select(0, bits.to(torch.int64))


def add_ranks(out: Tensor, tile: Tile, factors: tuple[int, int], spec: InputSpec) -> None:
    """Compute a low-rank product into `out`, rank by rank.

    Args:
        out: buffer of shape (elements,) in the work dtype.
        tile: tile.
        factors: numbers of the two inputs.
        spec: inputs of the kernel.
    """
    rows, columns = _places(tile, spec)
    height = matrices(spec.shape)[1]
    stack = rows.div(height, rounding_mode="floor")
    rows -= stack * height
    sides, rank = [], 0
    for index, lines in zip(factors, (rows, columns), strict=True):
        access = spec.access(index)
        assert isinstance(access, FactorAccess)
        _, rank = access.size(spec.shape, spec.part(index))
        found = access.strides(spec.shape, spec.part(index), *tile.staged[index])
        places = lines.mul_(found.line).add_(stack * found.matrix).add_(found.origin)
        sides.append((tile.inputs[index].view(-1), places, found.rank))
    out.zero_()
    for _ in range(rank):
        # converted after the selection, so the memory depends on the tile alone
        lefts, rights = (loaded(_selected(values, places)).to(out.dtype) for values, places, _ in sides)
        out.add_(lefts.mul_(rights))
        for _, places, step in sides:
            places += step


def _places(tile: Tile, spec: InputSpec) -> tuple[Tensor, Tensor]:
    """The row and the column of each element of a tile, as int64."""
    elements = tile.indices
    if elements is None:
        elements = torch.arange(tile.element, tile.element + tile.elements, device=tile.inputs[0].device)
    rows = elements.div(spec.columns, rounding_mode="floor")
    return rows, elements - rows * spec.columns


def _in_blocks(access: BlockRows, spec: InputSpec, rows: Tensor, columns: Tensor, first: int) -> Tensor:
    _, height, width = matrices(spec.shape)
    origin = access.block_row(spec.shape, row_range(spec.shape, first, 1)[0])
    stack = rows.div(height, rounding_mode="floor")
    lines = (rows - stack * height).div_(access.rows, rounding_mode="floor").add_(stack * access.block_rows(height))
    blocks = columns.div(access.columns, rounding_mode="floor")
    return lines.sub_(origin).mul_(-(-width // access.columns)).add_(blocks)


def _in_columns(
    access: TransposedSlice, spec: InputSpec, rows: Tensor, columns: Tensor, staged: tuple[int, int]
) -> Tensor:
    _, height, width = matrices(spec.shape)
    begin, end = row_range(spec.shape, *staged)
    stack = rows.div(height, rounding_mode="floor")
    low = (begin - stack * height).clamp_(min=0)  # first staged row of the matrix
    low = low.div_(access.group, rounding_mode="floor")
    high = (end - stack * height).clamp_(max=height) - 1
    length = (high.div_(access.group, rounding_mode="floor") - low) * access.step + 1
    first = begin // height
    first_length = access.staged_rows(begin - first * height, min(end - first * height, height))
    between = (stack - first - 1) * access.staged_rows(0, height)
    before = torch.where(stack == first, 0, (first_length + between) * width)
    within = (rows - stack * height).div_(access.group, rounding_mode="floor")
    return before + columns * length + (within - low) * access.step


def _selected(values: Tensor, places: Tensor) -> Tensor:
    """The values at some places; torch does not select numbers of 8 bits by index, so their bytes are selected."""
    if values.dtype.itemsize > 1:
        return values.index_select(0, places)
    return values.view(torch.uint8).index_select(0, places).view(values.dtype)
