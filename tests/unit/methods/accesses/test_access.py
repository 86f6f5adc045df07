"""Accesses: the ranges of a part that any range of a value's elements needs, compared with arrays of indices."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np
import pytest

from mergeloom.methods.kernel.access import (
    ALIGNED,
    Access,
    BlockRows,
    GatheredRows,
    Nibbles,
    SameRows,
    Slice,
    Span,
    TransposedSlice,
    Whole,
)
from mergeloom.methods.kernel.spec import InputSpec

Shape = tuple[int, ...]
SHAPES: tuple[Shape, ...] = (
    *((5, 7), (7, 3), (2, 3, 4), (3, 1, 5), (2, 4, 1), (2, 2, 2, 3)),
    *((1, 9), (6, 1), (8,), (1,), ()),
)


def stack_of(shape: Shape) -> tuple[int, int, int]:
    rows, columns = ((1, 1, *shape))[-2:]
    return math.prod(shape[:-2]), rows, columns


def ranges(shape: Shape) -> Iterator[tuple[int, int]]:
    """Every range of at least one element: its first element and its number of elements."""
    size = math.prod(shape)
    return ((first, end - first) for first, end in itertools.combinations(range(size + 1), 2))


def staged(access: Access, shape: Shape, part: Shape, first: int, count: int) -> list[int]:
    """The index in the part of each staged element, in order; -1 for zeros."""
    assert access.part_shape_fits(shape, part)
    spans = access.spans(shape, part, first, count)
    assert all(span.length > 0 for span in spans)
    for before, after in itertools.pairwise(spans):
        assert before.start + before.length != after.start
    limit = math.prod(part)
    result = []
    for span in spans:
        assert span.start >= -1
        assert span.start + span.length <= limit
        result += [-1] * span.length if span.start < 0 else list(range(span.start, span.start + span.length))
    assert len(result) <= access.most(shape, part, count)
    return result


def rows_of(shape: Shape, first: int, count: int) -> list[int]:
    """The rows of a range of elements, numbered across the stack."""
    columns = stack_of(shape)[2]
    return sorted({element // columns for element in range(first, first + count)})


def slices(shape: Shape) -> list[tuple[Slice, Shape]]:
    """Slices of larger parts: next to other columns, other rows and other matrices, or interleaved with these."""
    stack, rows, columns = stack_of(shape)
    return [
        (Slice(0, columns, rows * columns), (stack, rows, columns)),
        (Slice(2, columns + 3, rows * (columns + 3)), (stack * rows, columns + 3)),
        (Slice((rows + 1) * columns, columns, 3 * (rows + 1) * columns), (3 * stack, rows + 1, columns)),
        (Slice(1, 2 * columns + 1, rows * (2 * columns + 1) + 5), (stack * (rows * (2 * columns + 1) + 5) + 1,)),
    ]


def transposed_slices(shape: Shape) -> list[tuple[TransposedSlice, Shape]]:
    """As `slices`, of parts whose columns are the value's rows."""
    stack, rows, columns = stack_of(shape)
    return [
        (TransposedSlice(0, rows, 1, rows * columns), (stack, columns, rows)),
        (TransposedSlice(2, rows + 3, 1, columns * (rows + 3)), (stack, columns, rows + 3)),
        (TransposedSlice(1, 2 * rows, 2, columns * 2 * rows), (stack, columns, 2 * rows)),
        (TransposedSlice(4, 3 * rows + 2, 3, 2 * columns * (3 * rows + 2)), (2 * stack, columns, 3 * rows + 2)),
        *(
            (
                TransposedSlice(0, -(-rows // group), 1, -(-rows // group) * columns, group),
                (stack, columns, -(-rows // group)),
            )
            for group in (2, 3, 32)
        ),
    ]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_aligned_elements_are_staged_in_their_order(shape: Shape) -> None:
    for first, count in ranges(shape):
        assert ALIGNED.spans(shape, shape, first, count) == [Span(first, count)]


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape], ids=str)
def test_gathered_rows_are_staged_in_the_values_order(shape: Shape) -> None:
    stack, rows, columns = stack_of(shape)
    generator = np.random.default_rng(1)
    for index in (range(stack * rows), generator.integers(-1, 5, stack * rows), [-1] * (stack * rows)):
        access = GatheredRows.of(tuple(int(row) for row in index))
        part = np.concatenate([np.arange(99 * columns).reshape(99, columns), np.full((1, columns), -1)])
        wanted = part[list(access.index)].reshape(-1)
        for first, count in ranges(shape):
            assert staged(access, shape, (99, columns), first, count) == wanted[first : first + count].tolist()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_slices_are_staged_in_the_values_order(shape: Shape) -> None:
    matrix, row, column = np.indices(stack_of(shape)).reshape(3, -1)
    for access, part in slices(shape):
        wanted = access.offset + matrix * access.matrix_stride + row * access.stride + column
        for first, count in ranges(shape):
            assert staged(access, shape, part, first, count) == wanted[first : first + count].tolist()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_of_blocks_the_rows_are_staged_that_the_range_touches(shape: Shape) -> None:
    stack, rows, columns = stack_of(shape)
    matrix, row, column = np.indices((stack, rows, columns)).reshape(3, -1)
    for height, width in itertools.product((1, 2, 3, 128), (1, 2, 5, 128)):
        access = BlockRows(height, width)
        blocks = (stack, math.ceil(rows / height), math.ceil(columns / width))
        part = (blocks[0] * blocks[1], blocks[2])
        of_element = np.arange(math.prod(blocks)).reshape(blocks)[matrix, row // height, column // width]
        for first, count in ranges(shape):
            needed = of_element[first : first + count] // blocks[2]
            wanted = np.arange(min(needed) * blocks[2], (max(needed) + 1) * blocks[2])
            assert staged(access, shape, part, first, count) == wanted.tolist()


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape], ids=str)
@pytest.mark.parametrize("more", [0, 1, 2])
def test_of_half_bytes_the_bytes_are_staged_that_the_range_touches(shape: Shape, more: int) -> None:
    width = -(-shape[-1] // 2) + more
    bytes_of = np.arange(math.prod(shape[:-1]) * width).reshape(-1, width).repeat(2, axis=1)[:, : shape[-1]].reshape(-1)
    for first, count in ranges(shape):
        wanted = bytes_of[first : first + count]
        found = staged(Nibbles("U4"), shape, (*shape[:-1], width), first, count)
        assert found == list(range(wanted[0], wanted[-1] + 1))


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape], ids=str)
@pytest.mark.parametrize("rank", [1, 4])
def test_of_the_same_rows_all_columns_are_staged(shape: Shape, rank: int) -> None:
    part = (*shape[:-1], rank)
    lines = np.arange(math.prod(part)).reshape(-1, rank)
    for first, count in ranges(shape):
        wanted = lines[rows_of(shape, first, count)].reshape(-1)
        assert staged(SameRows(), shape, part, first, count) == wanted.tolist()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_of_a_part_that_is_a_unit_all_is_staged(shape: Shape) -> None:
    for first, count in ranges(shape):
        assert staged(Whole(), shape, (3, 4), first, count) == list(range(12))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_of_transposed_slices_the_rows_of_each_column_are_staged(shape: Shape) -> None:
    rows, columns = stack_of(shape)[1:]
    for access, part in transposed_slices(shape):
        for first, count in ranges(shape):
            wanted: list[int] = []
            for matrix, lines in itertools.groupby(rows_of(shape, first, count), lambda row: row // rows):
                touched = [line % rows for line in lines]
                for column in range(columns):
                    start = access.offset + matrix * access.matrix_stride + column * access.stride
                    begin, end = (touched[place] // access.group * access.step for place in (0, -1))
                    wanted += range(start + begin, start + end + 1)
            assert staged(access, shape, part, first, count) == wanted


MISFITS: list[tuple[Access, Shape, Shape]] = [
    (ALIGNED, (3, 4), (4, 3)),
    (BlockRows(2, 2), (3, 4), (2, 3)),
    (BlockRows(2, 2), (3, 4), (4, 1)),
    (Nibbles("U4"), (3, 5), (3, 2)),
    (Nibbles("U4"), (3, 4), (4, 2)),
    (SameRows(), (3, 4), (4, 2)),
    (SameRows(), (), ()),
    (GatheredRows.of((0, 3)), (2, 4), (3, 4)),
    (GatheredRows.of((0,)), (2, 4), (3, 4)),
    (GatheredRows.of((0, 1)), (2, 4), (3, 5)),
    (Slice(5, 4), (2, 4), (3, 4)),
    (Slice(0, 3), (2, 4), (3, 4)),
    (TransposedSlice(1, 2), (2, 4), (4, 2)),
    (TransposedSlice(0, 2, 2), (2, 4), (4, 2)),
]


@pytest.mark.parametrize(("access", "shape", "part"), MISFITS, ids=str)
def test_a_part_that_does_not_fit_is_refused(access: Access, shape: Shape, part: Shape) -> None:
    assert not access.part_shape_fits(shape, part)
    with pytest.raises(ValueError, match=r"a part of shape .* does not fit"):
        InputSpec(1, None, shape, (access,), (part,))


def test_each_input_has_an_access_and_a_part() -> None:
    with pytest.raises(ValueError, match="2 inputs have 1 accesses and 0 parts"):
        InputSpec(2, None, (3, 4), (ALIGNED,))


@pytest.mark.parametrize("shape", [(64, 48), (3, 20, 10), (1, 700)], ids=str)
def test_the_inputs_of_another_shape_fit_it(shape: Shape) -> None:
    spec = InputSpec(
        6,
        0,
        (6, 8),
        (ALIGNED, BlockRows(4, 3), SameRows(), Whole(), TransposedSlice(3, 20, 2), Slice(1, 9)),
        ((6, 8), (2, 3), (6, 5), (5, 8), (8, 20), (99,)),
    )
    resized = spec.resized(shape)
    assert (resized.count, resized.base, resized.shape) == (6, 0, shape)
    assert [type(access) for access in resized.accesses[1:5]] == [BlockRows, SameRows, Whole, TransposedSlice]
    assert resized.part(2) == (*shape[:-1], 5)
    assert resized.part(3) == (5, shape[-1])
    size = math.prod(shape)
    assert resized.staged(1, 0, size) == stack_of(shape)[0] * math.ceil(shape[-2] / 4) * math.ceil(shape[-1] / 3)
    assert resized.staged(4, 0, size) == stack_of(shape)[0] * shape[-1] * (2 * shape[-2] - 1)
    assert resized.staged(5, 0, size) == size
