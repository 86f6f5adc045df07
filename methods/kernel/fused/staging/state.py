"""What a fill reads: the values of which node it computes, and where the staged elements of these are."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np

from ...access import BlockRows, FactorAccess, Nibbles, TransposedSlice, matrices, row_range
from ...expression import Node
from ...spec import InputSpec

_FAR = 1 << 62
_FIELDS = 27
_PANEL = 1 << 17
"""Elements of a panel, unless it has more than 4 rows."""
_PRODUCTS = 1 << 18
"""Elements of a panel of low-rank products, unless it has more than 16 rows."""
PRODUCT_ROWS, PRODUCT_COLUMNS = 4, 32
"""Rows and columns of a low-rank product that are computed at a time, in registers and from the first-level cache."""
PADDING = 16
"""Elements after each row of a panel: the rows of a power of 2 columns would share a few lines of the cache."""


class Fill(NamedTuple):
    """The values of a node that are computed from staged elements.

    Args:
        kind: ``blocks``, ``nibbles``, ``transposed`` or ``low_rank``.
        inputs: number of each input that it reads.
        numbers: what the input is, if its dtype does not say so.
        group: rows that share an element.
    """

    kind: str
    inputs: tuple[int, ...]
    numbers: str = ""
    group: int = 1

    def function(self, dtypes: Sequence[str], work: str) -> str:
        """The name of the function that fills the buffer.

        Args:
            dtypes: dtype of each input of the kernel.
            work: LLVM type of the values.
        """
        read = (self.numbers,) if self.numbers else tuple(dtypes[index] for index in self.inputs)
        shared = (str(self.group),) if self.group > 1 else ()
        return ".".join(("fill", self.kind, *read, *shared, work))


class Field(IntEnum):
    """The state of every fill."""

    ROWS = 0  # rows of a matrix
    COLUMNS = 1  # columns of a matrix
    START = 2  # index of the chunk's first element
    GATHERED = 3  # whether the chunk's elements are those of INDICES, and not consecutive
    INDICES = 4  # address of the index of each element of the chunk
    RUNS = 5  # address of the number of consecutive elements from each element of the chunk on
    FAR = 6  # a number that is larger than any number of elements
    DATA = 7  # address of the staged elements
    ORIGIN = 8  # row of the part, or matrix, that the staged elements start with


class BlockField(IntEnum):
    """The further state of a fill with an element for each block."""

    BLOCK_ROWS = 9
    BLOCK_COLUMNS = 10
    MATRIX_ROWS = 11  # rows of blocks in a matrix
    WIDTH = 12  # blocks in a row


class NibbleField(IntEnum):
    """The further state of a fill with two elements in each byte. ORIGIN is the first staged byte."""

    WIDTH = 9  # bytes in a row


class TransposedField(IntEnum):
    """The further state of a fill from a transposed slice. Lengths are numbers of staged elements of one column."""

    STEP = 9  # distance of two rows
    LOW = 10  # first staged row, or group of rows, of the first matrix
    FIRST = 11  # length in the first matrix
    MIDDLE = 12  # length in the matrices between the first and the last one
    LAST = 13  # length in the last matrix
    LAST_MATRIX = 14  # number of the last matrix, counted from the first one
    PANEL = 15  # address of the panel: the values of some rows, in the output's order
    HEIGHT = 16  # rows of the panel, at most
    BEGIN = 17  # first row in the panel
    END = 18  # the row after the last one in the panel
    HIGH = 19  # the row after the last staged row of the last matrix


class LowRankField(IntEnum):
    """The further state of a low-rank product."""

    RANK = 9
    RIGHT = 10  # address of the staged elements of the right factor
    LEFT_ORIGIN = 11  # for each factor: see `Strides`
    LEFT_MATRIX = 12
    LEFT_LINE = 13
    LEFT_RANK = 14
    RIGHT_ORIGIN = 15
    RIGHT_MATRIX = 16
    RIGHT_LINE = 17
    RIGHT_RANK = 18
    PANEL = 19  # address of the panel: the products of some rows, then the packed factors
    HEIGHT = 20  # rows of the panel, at most
    BEGIN = 21  # first row in the panel
    END = 22  # the row after the last one in the panel
    AFTER = 23  # the row after the last one that has elements of the chunk
    COLUMN = 24  # first column in the panel
    WIDTH = 25  # columns in the panel
    PITCH = 26  # distance of two rows of the panel


def fill_of(node: Node, inputs: InputSpec) -> Fill | None:
    """How the value of a node is filled; None if a loop computes it."""
    if node.op == "low_rank":
        return Fill("low_rank", node.value)
    if node.op != "load" or inputs.access(node.value).aligned:
        return None
    access = inputs.access(node.value)
    if isinstance(access, Nibbles):
        return Fill("nibbles", (node.value,), access.numbers)
    if isinstance(access, TransposedSlice):
        return Fill("transposed", (node.value,), access.numbers, access.group)
    return Fill("blocks", (node.value,))


def state_of(
    fill: Fill,
    inputs: InputSpec,
    addresses: Sequence[int],
    panel: int,
    chunk: tuple[int, int],
    staged: Sequence[tuple[int, int]],
) -> Any:
    """The state of a fill as an array of int64.

    Args:
        fill: fill.
        inputs: inputs of the kernel.
        addresses: address of the staged elements of each input.
        panel: address of a panel; 0 for fills that need none.
        chunk: first element and number of elements of the chunk.
        staged: for each input, first element and number of elements of the range that it is staged for.
    """
    state = np.zeros(_FIELDS, np.int64)
    index = fill.inputs[0]
    access = inputs.access(index)
    begin, end = row_range(inputs.shape, *staged[index])
    _, rows, columns = matrices(inputs.shape)
    state[Field.ROWS], state[Field.COLUMNS] = rows, columns
    state[Field.START], state[Field.FAR], state[Field.DATA] = chunk[0], _FAR, addresses[index]
    if isinstance(access, BlockRows):
        state[Field.ORIGIN] = access.block_row(inputs.shape, begin)
        state[BlockField.BLOCK_ROWS], state[BlockField.BLOCK_COLUMNS] = access.rows, access.columns
        state[BlockField.MATRIX_ROWS] = access.block_rows(rows)
        state[BlockField.WIDTH] = -(-columns // access.columns)
    elif isinstance(access, Nibbles):
        state[Field.ORIGIN] = access.byte(inputs.shape, inputs.part(index), staged[index][0])
        state[NibbleField.WIDTH] = inputs.part(index)[-1]
    elif isinstance(access, TransposedSlice):
        first, last = begin // rows, (end - 1) // rows
        low, high = begin - first * rows, end - last * rows
        bounds = [(low, rows), (0, rows), (0, high)] if first < last else [(low, high)] * 3
        state[Field.ORIGIN], state[TransposedField.LAST_MATRIX] = first, last - first
        state[TransposedField.STEP], state[TransposedField.LOW] = access.step, low // access.group
        state[TransposedField.HIGH] = high
        for field, bound in zip((11, 12, 13), bounds, strict=True):
            state[field] = access.staged_rows(*bound)
        state[TransposedField.PANEL], state[TransposedField.HEIGHT] = panel, panel_height(columns)
    elif isinstance(access, FactorAccess):
        state[LowRankField.RIGHT], state[LowRankField.PANEL] = addresses[fill.inputs[1]], panel
        _set_product(state, fill, inputs, chunk, staged)
    else:
        raise TypeError(f"kernels cannot read an input with {access}")
    return state


def _set_product(
    state: Any, fill: Fill, inputs: InputSpec, chunk: tuple[int, int], staged: Sequence[tuple[int, int]]
) -> None:
    """Set the state of a low-rank product, apart from addresses."""
    state[LowRankField.RANK] = _rank(fill, inputs)
    for field, index in zip((LowRankField.LEFT_ORIGIN, LowRankField.RIGHT_ORIGIN), fill.inputs, strict=True):
        access = inputs.access(index)
        assert isinstance(access, FactorAccess)
        state[field : field + 4] = access.strides(inputs.shape, inputs.part(index), *staged[index])
    begin, end = row_range(inputs.shape, *chunk)
    columns = int(state[Field.COLUMNS])
    state[LowRankField.AFTER], state[LowRankField.HEIGHT] = end, product_height(inputs)
    one_row = end - begin == 1
    state[LowRankField.COLUMN] = chunk[0] % columns if one_row else 0
    state[LowRankField.WIDTH] = chunk[1] if one_row else columns
    state[LowRankField.PITCH] = _pitch(columns)


def _rank(fill: Fill, inputs: InputSpec) -> int:
    access = inputs.access(fill.inputs[0])
    assert isinstance(access, FactorAccess)
    return access.size(inputs.shape, inputs.part(fill.inputs[0]))[1]


def _pitch(columns: int) -> int:
    """The distance of two rows of products."""
    return -(-columns // PRODUCT_COLUMNS) * PRODUCT_COLUMNS + PADDING


def product_height(inputs: InputSpec) -> int:
    """The rows of products that are computed at a time: then the right factor is read once for all of them."""
    _, rows, columns = matrices(inputs.shape)
    height = min(max(16, min(32, _PRODUCTS // columns)), rows)
    return -(-height // PRODUCT_ROWS) * PRODUCT_ROWS


def panel_height(columns: int) -> int:
    """The rows of a panel: a column of that many is about a line of the cache, which is then loaded once."""
    return max(4, min(32, _PANEL // columns))


def panel_elements(fill: Fill, inputs: InputSpec) -> int:
    """The elements of a panel; with those of low-rank products are the numbers of the factors."""
    columns = matrices(inputs.shape)[2]
    if fill.kind == "transposed":
        return panel_height(columns) * (columns + PADDING)
    height = product_height(inputs)
    return height * _pitch(columns) + _rank(fill, inputs) * (height + PRODUCT_COLUMNS)


def gather(state: Any, indices: Any, runs: Any) -> None:
    """Make a fill take the elements with certain indices.

    Args:
        state: state of the fill.
        indices: index of each element, int64.
        runs: number of consecutive elements from each one on, int64; see `run_lengths`.
    """
    state[Field.GATHERED] = 1
    state[Field.INDICES], state[Field.RUNS] = indices.ctypes.data, runs.ctypes.data


def run_lengths(indices: Any) -> Any:
    """For each of several ascending indices, the number of consecutive ones from it on."""
    ends = np.append(np.flatnonzero(np.diff(indices) != 1) + 1, len(indices))
    places = np.arange(len(indices))
    return ends[np.searchsorted(ends, places, side="right")] - places
