"""Sums over the elements of two tensors, in fixed blocks and a fixed order: chunks and threads don't change them.

The elements of a block of 2^15 are decoded to float64 and added pairwise, by halves. The sums of the blocks are then
added exactly and rounded once. numpy's own sums and dot products are not used, since their order is not specified.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ....io.tensors.dtypes import DType
from ....methods.kernel.spec import BLOCK
from .values import Floats, decode, decode_exactly, is_wide

SUMS = 4
"""The sums of a block: squares of A, squares of B, products of A and B, squares of the differences."""

WORKSPACE_BYTES = BLOCK * ((SUMS + 2) * 8 + 4 + 3)
"""Size of the memory of a `BlockSummer` in bytes."""

Stored = tuple[memoryview, DType]
"""The bytes of some elements, and their dtype."""


class BlockSummer:
    """Sums blocks of two tensors, one at a time.

    Args:
        memory: buffer of `WORKSPACE_BYTES`.
    """

    def __init__(self, memory: memoryview) -> None:
        floats = (SUMS + 2) * 8 * BLOCK
        numbers = np.frombuffer(memory[:floats], np.float64).reshape(SUMS + 2, BLOCK)
        self._a, self._b, self._terms = numbers[0], numbers[1], numbers[2:]
        self._scratch = np.frombuffer(memory[floats : floats + 4 * BLOCK], np.uint32)
        self._flags = np.frombuffer(memory[floats + 4 * BLOCK :], np.bool_).reshape(3, BLOCK)

    def add(self, a: Stored, b: Stored, sums: Floats) -> tuple[int, int]:
        """Sum one block.

        Elements that are NaN or infinite in A or B are counted and left out of the sums.

        Args:
            a: elements of A, at most `BLOCK`.
            b: elements of B, equally many.
            sums: array of shape (SUMS,) that receives the sums.

        Returns:
            The number of elements with equal values, among them pairs of NaN and of equal infinities, and the number of
            elements that are NaN or infinite in A or B.
        """
        size = len(a[0]) * 8 // a[1].bits
        x, y, terms = self._a[:size], self._b[:size], self._terms[:, :size]
        self._decode(a, b, size)
        same = self._flags[0, :size]
        np.equal(terms[3], 0.0, out=same)
        equal, nonfinite = int(np.count_nonzero(same)), 0
        self._sum(x, y, terms, sums)
        if not np.isfinite(sums).all():
            self._decode(a, b, size)
            found, nonfinite = self._clear_nonfinite(x, y, terms[3])
            equal += found
            self._sum(x, y, terms, sums)
        return equal, nonfinite

    def _decode(self, a: Stored, b: Stored, size: int) -> None:
        """Decode a block of both tensors, and subtract B from A; the difference is rounded once."""
        x, y, terms = self._a[:size], self._b[:size], self._terms[:, :size]
        if not is_wide(a[1]) and not is_wide(b[1]):
            decode(*a, x, self._scratch)
            decode(*b, y, self._scratch)
            np.subtract(x, y, out=terms[3])
            return
        decode_exactly(*a, x, terms[0], (self._scratch, terms[3]))
        decode_exactly(*b, y, terms[1], (self._scratch, terms[3]))
        np.subtract(x, y, out=terms[3])
        np.subtract(terms[0], terms[1], out=terms[2])
        np.add(terms[3], terms[2], out=terms[3])
        np.add(x, terms[0], out=x)
        np.add(y, terms[1], out=y)

    def _clear_nonfinite(self, x: Floats, y: Floats, difference: Floats) -> tuple[int, int]:
        """Set elements to zero that are NaN or infinite in A or B. Return the number of equal ones, and of all."""
        first, second, third = self._flags[:, : x.size]
        np.isnan(x, out=first)
        np.isnan(y, out=second)
        np.logical_and(first, second, out=first)
        np.equal(x, y, out=second)
        np.logical_or(first, second, out=first)  # equal, finite or not
        np.isfinite(x, out=second)
        np.isfinite(y, out=third)
        np.logical_and(second, third, out=second)
        np.logical_not(second, out=second)  # not finite
        np.logical_and(first, second, out=first)
        for values in (x, y, difference):
            np.copyto(values, 0.0, where=second)
        return int(np.count_nonzero(first)), int(np.count_nonzero(second))

    def _sum(self, x: Floats, y: Floats, terms: Floats, sums: Floats) -> None:
        np.multiply(x, x, out=terms[0])
        np.multiply(y, y, out=terms[1])
        np.multiply(x, y, out=terms[2])
        np.multiply(terms[3], terms[3], out=terms[3])
        fold(terms)
        np.copyto(sums, terms[:, 0])


def fold(values: NDArray[np.float64]) -> None:
    """Add the columns of an array in place: the second half to the first, until the first column holds the sums."""
    width = values.shape[1]
    while width > 1:
        half = width // 2
        np.add(values[:, :half], values[:, width - half : width], out=values[:, :half])
        width -= half
