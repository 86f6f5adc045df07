"""The oracle's view of stored parts: complete parts as arrays of the value's shape, without spans or staging."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from mergeloom.methods.kernel.access import (
    Access,
    Aligned,
    BlockRows,
    ColumnFactor,
    GatheredRows,
    Nibbles,
    RowFactor,
    Slice,
    TransposedSlice,
    Whole,
)
from tests.support.methods.oracle_numbers import Numbers


def expanded(part: Numbers, access: Access, shape: tuple[int, ...]) -> Numbers:
    """The element of a part for each element of a value of a shape with at least one dimension."""
    if 0 in shape:
        return np.zeros(shape, part.dtype)
    return _EXPANDED[type(access)](part, access, shape)


def factor(part: Numbers, access: Access, shape: tuple[int, ...]) -> Numbers:
    """A factor of a low-rank product for each matrix of a value: of shape (stack, lines, rank), or (1, lines, rank)."""
    stack, rows, columns = (math.prod(shape[:-2]), *((1, *shape))[-2:])
    if isinstance(access, RowFactor | ColumnFactor):
        matrix, line, k = np.indices((stack, rows if isinstance(access, RowFactor) else columns, access.rank))
        index = access.offset + matrix * access.matrix_stride + line * access.stride + k * access.rank_stride
        strided: Numbers = part.reshape(-1)[index]
        return strided
    if isinstance(access, Whole):
        return part.T[np.newaxis]
    return part.reshape(stack, rows, part.shape[-1])


def low_rank_product(left: Numbers, right: Numbers) -> Numbers:
    """The sum over the ranks of the products of factors, see `factor`; each product and each sum is rounded."""
    total: Numbers = np.zeros((len(left), left.shape[1], right.shape[1]), dtype=left.dtype)
    for rank in range(left.shape[-1]):
        total = total + left[:, :, rank, np.newaxis] * right[:, np.newaxis, :, rank]
    return total


def _blocks(part: Numbers, access: BlockRows, shape: tuple[int, ...]) -> Numbers:
    rows, columns = shape[-2] if len(shape) > 1 else 1, shape[-1]
    blocks = part.reshape(math.prod(shape[:-2]), math.ceil(rows / access.rows), math.ceil(columns / access.columns))
    tall = np.repeat(blocks, access.rows, axis=1)[:, :rows]
    return np.repeat(tall, access.columns, axis=2)[:, :, :columns].reshape(shape)


def _gathered(part: Numbers, access: GatheredRows, shape: tuple[int, ...]) -> Numbers:
    with_zeros = np.concatenate([part.reshape(-1, shape[-1]), np.zeros((1, shape[-1]), part.dtype)])
    return with_zeros[list(access.index)].reshape(shape)


def _nibbles(part: Numbers, access: Nibbles, shape: tuple[int, ...]) -> Numbers:
    bits = part.astype(np.uint8)
    both = np.stack([bits % 16, bits // 16], axis=-1).reshape(*bits.shape[:-1], 2 * bits.shape[-1])[..., : shape[-1]]
    return _numbers(both, access.numbers, part.dtype)


def _strided(part: Numbers, access: Any, shape: tuple[int, ...], row: int, column: int) -> Numbers:
    """A stack of matrices whose rows and columns have certain distances in the part."""
    size = part.itemsize
    stack = (math.prod(shape[:-2]), shape[-2] if len(shape) > 1 else 1, shape[-1])
    if 0 in stack:
        return np.zeros(shape, part.dtype)
    strides = (access.matrix_stride * size, row * size, column * size)
    return np.lib.stride_tricks.as_strided(part.reshape(-1)[access.offset :], stack, strides).reshape(shape)


def _transposed(part: Numbers, access: TransposedSlice, shape: tuple[int, ...]) -> Numbers:
    matrix, row, column = np.indices((math.prod(shape[:-2]), shape[-2] if len(shape) > 1 else 1, shape[-1]))
    index = access.offset + matrix * access.matrix_stride + column * access.stride + row // access.group * access.step
    found: Numbers = part.reshape(-1)[index]
    if access.numbers:
        found = _numbers(found.astype(np.uint8) >> (4 * (row % 2)).astype(np.uint8), access.numbers, part.dtype)
    return found.reshape(shape)


def _numbers(bits: Any, numbers: str, dtype: Any) -> Numbers:
    """What the lowest four bits are."""
    code = bits % 16
    if numbers == "U4":
        found: Numbers = code.astype(dtype)
        return found
    sizes = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype)
    return np.where(code >= 8, -sizes[code % 8], sizes[code % 8])


_EXPANDED: Mapping[type[Access], Callable[..., Numbers]] = {
    Aligned: lambda part, access, shape: part.reshape(shape),
    BlockRows: _blocks,
    GatheredRows: _gathered,
    Nibbles: _nibbles,
    Slice: lambda part, access, shape: _strided(part, access, shape, access.stride, 1),
    TransposedSlice: _transposed,
}
