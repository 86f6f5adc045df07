"""The ways in which adapters store the factors of low-rank products: accesses to them, and the shapes of the parts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from mergeloom.methods.kernel.access import Access, ColumnFactor, RowFactor, SameRows, Whole

Shape = tuple[int, ...]
Factors = tuple[tuple[Access, Shape], tuple[Access, Shape]]
"""The left factor and the right one."""


def stack_of(shape: Shape) -> tuple[int, int, int]:
    """The matrices of a stack, and the rows and columns of each."""
    rows, columns = ((1, 1, *shape))[-2:]
    return math.prod(shape[:-2]), rows, columns


def plain(shape: Shape, rank: int) -> Factors:
    """B of shape (rows, rank), and A of shape (rank, columns), which all matrices of a stack share."""
    return (SameRows(), (*shape[:-1], rank)), (Whole(), (rank, shape[-1]))


def transposed(shape: Shape, rank: int) -> Factors:
    """The factors of a matrix that is stored transposed: A of shape (rank, rows), and B of shape (columns, rank)."""
    stack, rows, columns = stack_of(shape)
    left, right = RowFactor(rank, 1, rows, rank * rows), ColumnFactor(rank, rank, 1, rank * columns)
    return (left, (stack * rank, rows)), (right, (stack * columns, rank))


def left_transposed(shape: Shape, rank: int) -> Factors:
    """A row factor of shape (rank, rows), and one for the columns as usual."""
    stack, _, columns = stack_of(shape)
    right = ColumnFactor(rank, 1, columns, rank * columns)
    return transposed(shape, rank)[0], (right, (stack * rank, columns))


def right_transposed(shape: Shape, rank: int) -> Factors:
    """A row factor as usual, and one for the columns of shape (columns, rank)."""
    stack, rows, _ = stack_of(shape)
    return (RowFactor(rank, rank, 1, rows * rank), (stack * rows, rank)), transposed(shape, rank)[1]


def experts(shape: Shape, rank: int, others: int = 0, first: int = 0) -> Factors:
    """PEFT's factors of a stack of shape (experts, out, in): B of shape (out, rank * experts), whose columns are those
    of rank 0 of all experts first; and A of shape (experts * rank, in).

    Args:
        shape: shape of the value.
        rank: rank.
        others: experts in the adapter besides those of the value.
        first: the first expert of the value.
    """
    stack, rows, columns = stack_of(shape)
    total = stack + others
    left = RowFactor(rank, rank * total, total, 1, first)
    right = ColumnFactor(rank, 1, columns, rank * columns, first * rank * columns)
    return (left, (rows, rank * total)), (right, (total * rank, columns))


def turned_experts(shape: Shape, rank: int, others: int = 0, first: int = 0) -> Factors:
    """The same of a stack of shape (experts, in, out): A has the rows' factors, and B those of the columns."""
    stack, rows, columns = stack_of(shape)
    total = stack + others
    left = RowFactor(rank, 1, rows, rank * rows, first * rank * rows)
    right = ColumnFactor(rank, rank * total, total, 1, first)
    return (left, (total * rank, rows)), (right, (columns, rank * total))


LAYOUTS: Mapping[str, Callable[[Shape, int], Factors]] = {
    "plain": plain,
    "transposed": transposed,
    "left transposed": left_transposed,
    "right transposed": right_transposed,
    "experts": experts,
    "turned experts": turned_experts,
    "some experts": lambda shape, rank: experts(shape, rank, 3, 2),
    "some turned experts": lambda shape, rank: turned_experts(shape, rank, 2, 1),
}
