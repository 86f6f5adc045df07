"""Accesses to the factors of low-rank products: staged are the elements that a range needs, where kernels find them."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from mergeloom.methods.kernel.access import Access, ColumnFactor, FactorAccess, RowFactor, Span
from mergeloom.methods.kernel.spec import InputSpec
from tests.support.methods.factors import LAYOUTS, Shape, experts, stack_of, turned_experts
from tests.support.methods.oracle_accesses import factor

SHAPES: tuple[Shape, ...] = ((5, 7), (7, 3), (2, 3, 4), (3, 1, 5), (2, 4, 1), (2, 2, 2, 3), (1, 9), (6, 1), (8,), (1,))


def staged(access: Access, shape: Shape, part: Shape, first: int, count: int) -> np.ndarray:
    """The index in the part of each staged element, in order."""
    spans = access.spans(shape, part, first, count)
    for before, after in itertools.pairwise(spans):
        assert before.start + before.length != after.start
    found = np.concatenate([np.arange(span.start, span.start + span.length) for span in spans])
    assert found.min() >= 0
    assert found.max() < math.prod(part)
    assert len(found) <= access.most(shape, part, count)
    return found


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_elements_of_a_range_are_staged_where_kernels_find_them(shape: Shape, layout: str, rank: int) -> None:
    _, rows, columns = stack_of(shape)
    for side, (access, part) in enumerate(LAYOUTS[layout](shape, rank)):
        assert isinstance(access, FactorAccess)
        assert access.part_shape_fits(shape, part)
        assert access.size(shape, part) == ((rows, columns)[side], rank)
        assert access.by_row == (side == 0)
        stored = factor(np.arange(math.prod(part)).reshape(part), access, shape)
        complete = staged(access, shape, part, 0, math.prod(shape))
        for first, end in itertools.combinations(range(math.prod(shape) + 1), 2):
            found = staged(access, shape, part, first, end - first)
            if access.whole(shape, part):
                assert found.tolist() == complete.tolist()
            strides = access.strides(shape, part, first, end - first)
            for element in {*range(first, end, columns), end - 1}:
                matrix, row = divmod(element // columns, rows)
                for line, k in itertools.product((row,) if side == 0 else range(columns), range(rank)):
                    place = strides.origin + matrix * strides.matrix + line * strides.line + k * strides.rank
                    assert place >= 0
                    assert found[place] == stored[matrix if len(stored) > 1 else 0, line, k]


def test_of_a_large_transposed_factor_only_the_rows_of_the_range_are_staged() -> None:
    """An adapter of an embedding: a few tokens need a range of each stored line."""
    vocabulary, width, rank = 128_000, 4096, 8
    (left, part), (right, other) = LAYOUTS["transposed"]((vocabulary, width), rank)
    spans = left.spans((vocabulary, width), part, 500 * width + 7, 2 * width)
    assert spans == [Span(k * vocabulary + 500, 3) for k in range(rank)]
    assert right.whole((vocabulary, width), other)
    assert not left.whole((vocabulary, width), part)


def test_of_a_stack_only_the_matrices_of_the_range_are_staged() -> None:
    shape, rank = (256, 64, 96), 4
    _, (right, part) = experts(shape, rank)
    assert right.spans(shape, part, 5 * 64 * 96 + 9, 64 * 96) == [Span(5 * rank * 96, 2 * rank * 96)]
    (left, part), _ = turned_experts(shape, rank)
    assert left.spans(shape, part, 7 * 64 * 96 + 200, 96) == [Span(7 * rank * 64 + k * 64 + 2, 2) for k in range(rank)]
    assert not right.whole(shape, part)
    assert not left.whole(shape, part)


@pytest.mark.parametrize("turned", [False, True])
def test_the_factors_of_experts_are_those_of_peft(turned: bool) -> None:
    """PEFT's delta of each expert of a fused tensor, and the same from slices of the adapter."""
    count, rank, width, height = 3, 2, 5, 4
    random = np.random.default_rng(1)
    a, b = random.standard_normal((count * rank, width)), random.standard_normal((height, rank * count))
    delta = np.einsum("o r e, e r i -> e o i", b.reshape(height, rank, count), a.reshape(count, rank, width))
    wanted = delta.transpose(0, 2, 1) if turned else delta
    made, parts = (turned_experts, (a, b)) if turned else (experts, (b, a))
    for first, others, shape in ((0, 0, wanted.shape), *((e, count - 1, wanted.shape[1:]) for e in range(count))):
        accesses = made(shape, rank, others, first)
        assert [part for _, part in accesses] == [each.shape for each in parts]
        left, right = (factor(part, access, shape) for part, (access, _) in zip(parts, accesses, strict=True))
        found = np.einsum("m r k, m c k -> m r c", left, right)
        assert np.allclose(found, wanted if len(shape) == 3 else wanted[first : first + 1], atol=1e-12)


@pytest.mark.parametrize(
    ("access", "shape", "part"),
    [
        (RowFactor(2, 1, 3), (3, 4), (5,)),
        (RowFactor(2, 1, 3, offset=1), (3, 4), (2, 3)),
        (RowFactor(0, 1, 3), (3, 4), (2, 3)),
        (RowFactor(2, 1, 3, matrix_stride=6), (2, 3, 4), (11,)),
        (ColumnFactor(2, 2, 1), (3, 4), (7,)),
        (ColumnFactor(2, 2, -1), (3, 4), (8,)),
        (ColumnFactor(2, 1, 4, offset=-1), (3, 4), (8,)),
    ],
    ids=str,
)
def test_a_factor_that_does_not_fit_is_refused(access: Access, shape: Shape, part: Shape) -> None:
    with pytest.raises(ValueError, match=r"a part of shape .* does not fit"):
        InputSpec(1, None, shape, (access,), (part,))


@pytest.mark.parametrize("other", [(64, 48), (3, 20, 10), (1, 700)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_factors_of_another_shape_fit_it(layout: str, other: Shape) -> None:
    rank = 3
    accesses, parts = zip(*LAYOUTS[layout]((4, 6, 8), rank), strict=True)
    resized = InputSpec(2, None, (4, 6, 8), accesses, parts).resized(other)
    stack, rows, columns = stack_of(other)
    sizes = (stack * rows * rank, (1 if layout == "plain" else stack) * columns * rank)
    assert [resized.staged(index, 0, math.prod(other)) for index in (0, 1)] == list(sizes)
