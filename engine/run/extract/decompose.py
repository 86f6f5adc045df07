"""Decomposes a matrix into factors of low rank: by an exact SVD if it is small, otherwise by a randomized one.

The randomized SVD is that of Halko, Martinsson and Tropp (2011, arXiv 0909.4061), algorithms 4.4 and 5.1: a sketch of
the range with more columns than the rank, power iterations with an orthogonal basis after each product, and an exact
SVD of the matrix in this basis. The sketch is a matrix of random signs. All arithmetic is float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_128_digest

from ..diff.values import Floats
from .deltas import TILE_COLUMNS, TILE_ROWS, Delta

EXACT_SIDE = 512
"""The longest shorter side of a matrix that is decomposed exactly."""
EXACT_ELEMENTS = 1 << 20
"""The largest number of elements of a matrix that is decomposed exactly."""
EXTRA_COLUMNS = 16
"""Columns of a sketch beyond the rank, at least; half of the rank if that is more."""
POWER_ITERATIONS = 3
_ROWS = 1024
"""Number of rows of signs that are made at a time."""
_FLOAT = 8
"""Size of a float64 in bytes."""


@dataclass(frozen=True, slots=True)
class Factors:
    """The factors of a matrix of shape (m, n), with the square root of each singular value in both.

    Args:
        left: left factor in float32, of shape (m, rank).
        right: right factor in float32, of shape (rank, n).
        squares: sum of the squares of the matrix's elements.
        retained: sum of the squares of the singular values that the factors keep.
    """

    left: NDArray[np.float32]
    right: NDArray[np.float32]
    squares: float
    retained: float

    @property
    def retained_energy(self) -> float:
        """Share of the sum of squares that the factors keep, from 0 to 1."""
        return min(1.0, self.retained / self.squares) if self.squares else 1.0

    @property
    def error(self) -> float:
        """Relative error ``||D - left right|| / ||D||`` in the Frobenius norm."""
        return math.sqrt(1.0 - self.retained_energy)


def is_exact(rows: int, columns: int) -> bool:
    """Whether a matrix of this shape is decomposed exactly."""
    return min(rows, columns) <= EXACT_SIDE and rows * columns <= EXACT_ELEMENTS


def sketch_columns(rows: int, columns: int, rank: int) -> int:
    """Number of columns of the sketch of a matrix."""
    return min(rows, columns, rank + max(EXTRA_COLUMNS, rank // 2))


def passes(rows: int, columns: int, rank: int) -> int:
    """How often the elements of a matrix are needed; those that don't fit into memory are read as often."""
    if is_exact(rows, columns):
        return 1
    return 2 + 2 * _iterations(rows, columns, rank)


def memory_bytes(rows: int, columns: int, rank: int) -> int:
    """Return the RAM that decomposing takes besides the matrix and the tiles, in bytes."""
    factors = 3 * (rows + columns) * rank * 4
    if is_exact(rows, columns):
        side = min(rows, columns)
        return factors + _FLOAT * (5 * rows * columns + 3 * side * (rows + columns) + 6 * side * side)
    width, longest = sketch_columns(rows, columns, rank), max(rows, columns)
    return factors + _FLOAT * width * (rows + columns + 4 * longest + 8 * width)


def product_bytes(rows: int, columns: int, rank: int) -> int:
    """Return the RAM of the product of one tile, in bytes."""
    height = max(TILE_ROWS, TILE_COLUMNS)
    return 0 if is_exact(rows, columns) else sketch_columns(rows, columns, rank) * height * _FLOAT


def decompose(delta: Delta, rank: int, seed: int, name: str) -> Factors | None:
    """Decompose a matrix; None if it is zero.

    Args:
        delta: the matrix.
        rank: rank of the factors, at most the shorter side.
        seed: seed of the sketch.
        name: name of the matrix, which makes its sketch differ from others.

    Raises:
        CheckpointError: an element is not finite, or reading failed.
    """
    if is_exact(delta.rows, delta.columns):
        return _exact(delta, rank)
    return _randomized(delta, rank, _signs(seed, name, delta.columns, sketch_columns(delta.rows, delta.columns, rank)))


def _exact(delta: Delta, rank: int) -> Factors | None:
    matrix = delta.load()
    if not delta.compared.changed:
        return None
    left, values, right = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
    return _factors(left[:, :rank], values[:rank], right[:rank], math.fsum(values * values))


def _randomized(delta: Delta, rank: int, sketch: Floats) -> Factors | None:
    basis = delta.times(sketch)
    del sketch
    if not delta.compared.changed:
        return None
    assert delta.squares is not None
    basis = _orthogonal(basis)
    for _ in range(_iterations(delta.rows, delta.columns, rank)):
        other = _orthogonal(delta.transposed_times(basis))
        del basis
        basis = _orthogonal(delta.times(other))
        del other
    # basis^T D = (other triangle)^T, with an orthogonal `other`
    other, triangle = np.linalg.qr(delta.transposed_times(basis))
    left, values, right = np.linalg.svd(triangle.T)
    left = basis @ left[:, :rank]
    del basis
    return _factors(left, values[:rank], right[:rank] @ other.T, delta.squares)


def _iterations(rows: int, columns: int, rank: int) -> int:
    """Number of power iterations: none for a sketch that spans the complete range."""
    return 0 if sketch_columns(rows, columns, rank) == min(rows, columns) else POWER_ITERATIONS


def _orthogonal(matrix: Floats) -> Floats:
    """Return an orthogonal basis of the columns."""
    basis: Floats = np.linalg.qr(matrix)[0]
    return basis


def _factors(left: Floats, values: Floats, right: Floats, squares: float) -> Factors:
    roots = np.sqrt(values)
    return Factors(
        (left * roots).astype(np.float32),
        (roots[:, None] * right).astype(np.float32),
        squares,
        math.fsum(values * values),
    )


def _signs(seed: int, name: str, rows: int, columns: int) -> Floats:
    """A matrix of random signs that depends on the seed and the name: numpy keeps the bits of its generators stable."""
    key = int.from_bytes(xxh3_128_digest(f"{seed} {name}".encode()), "little")
    generator = np.random.Philox(key=key)
    words = -(-columns // 64)
    signs = np.empty((rows, columns))
    for first in range(0, rows, _ROWS):
        count = min(_ROWS, rows - first)
        bits = np.unpackbits(generator.random_raw(count * words).astype("<u8").view(np.uint8)).reshape(count, -1)
        np.multiply(bits[:, :columns], 2.0, out=signs[first : first + count])
    signs -= 1.0
    return signs
