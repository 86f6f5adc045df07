"""The difference of two matrices, in panels of rows that fit into memory, and its products with narrow matrices.

All products are sums over tiles of a fixed shape in a fixed order, and a tile's product is one call of the BLAS. So the
result depends neither on the number of rows in a panel, and with it on the budget, nor on the number of threads.
"""

from __future__ import annotations

import math
import queue
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from ....errors import CheckpointError
from ...execute.arena import take_memory
from ..diff.values import Floats
from .targets import MatrixJob
from .values import UNCHANGED, Compared, Matrix, ValueReader, Workspace, as_matrix, bytes_of_range, chunks_of

TILE_ROWS = 256
TILE_COLUMNS = 2048
TILE_BYTES = TILE_ROWS * TILE_COLUMNS * 8

T = TypeVar("T")
S = TypeVar("S")


@dataclass(slots=True)
class Workers:
    """Threads, each with a workspace.

    Args:
        pool: the threads.
        reader: reader of values.
        workspaces: workspaces that no thread uses.
        tiles: tiles of float64 that no thread uses.
        count_read: function that is called with the number of bytes of each chunk after it was read.
    """

    pool: ThreadPoolExecutor
    reader: ValueReader
    workspaces: queue.SimpleQueue[Workspace]
    tiles: queue.SimpleQueue[Floats]
    count_read: Callable[[int], None]

    def map(self, function: Callable[[S], T], items: Iterable[S]) -> list[T]:
        """Call a function for each item, in the threads. The first error cancels what has not begun."""
        futures = [self.pool.submit(function, item) for item in items]
        try:
            return [future.result() for future in futures]
        finally:
            for future in futures:
                future.cancel()


class Delta:
    """The difference model - base of one matrix, in float32.

    Args:
        job: the matrix.
        workers: threads that read and multiply.
        panel_rows: number of rows that are in memory at one time, a multiple of `TILE_ROWS` unless it is all of them.

    Attributes:
        squares: sum of the squares of all elements, after the first product.
        compared: whether anything has changed, and whether all values are finite, after the first product.
    """

    def __init__(self, job: MatrixJob, workers: Workers, panel_rows: int) -> None:
        self.rows, self.columns = job.rows, job.columns
        self.squares: float | None = None
        self.compared = UNCHANGED
        self._job = job
        self._workers = workers
        self._panel_rows = min(panel_rows, self.rows)
        self._memory = memoryview(take_memory(self._panel_rows * self.columns * 4))
        self._held: Matrix | None = None

    def load(self) -> Matrix:
        """Return all of the matrix, which must fit into one panel."""
        (_, matrix), *_ = self._panels()
        return matrix

    def times(self, right: Floats) -> Floats:
        """Return the product with a matrix of shape (columns, k), of shape (rows, k)."""
        result = np.zeros((self.rows, right.shape[1]))
        squares: list[float] = []

        for first, panel in self._panels():
            products = result[first : first + len(panel)]

            def multiply(row: int, panel: Matrix = panel, products: Floats = products) -> float:
                return self._row_product(panel, row, right, products[row : row + TILE_ROWS])

            squares += self._workers.map(multiply, range(0, len(panel), TILE_ROWS))
        if self.squares is None:
            self.squares = math.fsum(squares)
        return result

    def transposed_times(self, left: Floats) -> Floats:
        """Return the product of the transposed matrix with one of shape (rows, k), of shape (columns, k)."""
        result = np.zeros((self.columns, left.shape[1]))

        for first, panel in self._panels():
            rows = left[first : first + len(panel)]

            def multiply(column: int, panel: Matrix = panel, rows: Floats = rows) -> None:
                self._column_product(panel, column, rows, result[column : column + TILE_COLUMNS])

            self._workers.map(multiply, range(0, self.columns, TILE_COLUMNS))
        return result

    def _row_product(self, panel: Matrix, row: int, right: Floats, out: Floats) -> float:
        """Add the products of one row of tiles to `out`, and return the sum of the squares of its elements."""
        memory, squares = self._workers.tiles.get(), []
        try:
            for column in range(0, self.columns, TILE_COLUMNS):
                tile = _tile(memory, panel, row, column)
                out += tile @ right[column : column + TILE_COLUMNS]
                squares.append(float(np.dot(tile.ravel(), tile.ravel())))
        finally:
            self._workers.tiles.put(memory)
        return math.fsum(squares)

    def _column_product(self, panel: Matrix, column: int, left: Floats, out: Floats) -> None:
        """Add the products of one column of tiles to `out`."""
        memory = self._workers.tiles.get()
        try:
            for row in range(0, len(panel), TILE_ROWS):
                out += _tile(memory, panel, row, column).T @ left[row : row + TILE_ROWS]
        finally:
            self._workers.tiles.put(memory)

    def _panels(self) -> Iterator[tuple[int, Matrix]]:
        """Yield each panel with its first row; the next one overwrites it. A matrix that fits is read once."""
        if self._held is not None:
            yield 0, self._held
            return
        for first in range(0, self.rows, self._panel_rows):
            rows = min(self._panel_rows, self.rows - first)
            panel = as_matrix(self._memory, rows, self.columns)
            for compared in self._workers.map(self._load_chunk(panel, first), self._chunks(first, rows)):
                self.compared |= compared
            self._check_finite()
            if rows == self.rows:
                self._held = panel
            yield first, panel

    def _chunks(self, first: int, rows: int) -> Iterator[tuple[int, int]]:
        return chunks_of(self._job.pair, first * self.columns, (first + rows) * self.columns)

    def _load_chunk(self, panel: Matrix, row: int) -> Callable[[tuple[int, int]], Compared]:
        """Return a function that fills a panel, which starts at a row, with the difference of one chunk."""
        flat, offset = panel.reshape(-1), row * self.columns

        def load(chunk: tuple[int, int]) -> Compared:
            workers, work = self._workers, self._workers.workspaces.get()
            try:
                with np.errstate(all="ignore"):
                    compared, values, nbytes = workers.reader.compare(self._job.pair, *chunk, work)
                    start, end = max(chunk[0], offset), min(chunk[0] + chunk[1], offset + flat.size)
                    part = flat[start - offset : end - offset]
                    part[:] = values[start - chunk[0] : end - chunk[0]]
                    finite = compared.finite and bool(np.all(np.isfinite(part)))
            finally:
                workers.workspaces.put(work)
            workers.count_read(nbytes)
            return Compared(compared.changed, finite)

        return load

    def _check_finite(self) -> None:
        if not self.compared.finite:
            raise not_finite(self._job.pair.name)


def not_finite(name: str) -> CheckpointError:
    """The error for a tensor whose values or differences are not finite."""
    return CheckpointError(
        f"{name}: has NaN or infinite values in MODEL or BASE, or a difference that float32 can't hold: check the "
        f"models with `mergeloom diff`, or leave the tensor out with --exclude"
    )


def panel_bytes_read(job: MatrixJob, panel_rows: int) -> int:
    """Return the number of bytes that are read to load all panels once."""
    columns = job.columns
    return sum(
        bytes_of_range(job.pair, first * columns, min(first + panel_rows, job.rows) * columns)
        for first in range(0, job.rows, panel_rows)
    )


def _tile(memory: Floats, panel: Matrix, row: int, column: int) -> Floats:
    """Copy a tile of a panel to float64."""
    part = panel[row : row + TILE_ROWS, column : column + TILE_COLUMNS]
    tile = memory[: part.size].reshape(part.shape)
    np.copyto(tile, part)
    return tile
