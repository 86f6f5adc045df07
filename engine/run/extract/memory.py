"""Divides the memory budget of an extraction among the panel of a matrix, its decomposition, and the threads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ....errors import BudgetError
from ....io.sizes import format_size
from ...schedule.budget import Budget
from .decompose import memory_bytes, passes, product_bytes
from .deltas import TILE_BYTES, TILE_ROWS, panel_bytes_read
from .targets import Job, LeftOut, MatrixJob
from .values import Workspace, bytes_of_range, staging_of

BLAS_BYTES = 24 << 20
"""RAM that the BLAS takes for each thread that calls it, in bytes."""
_DELTA = 4
"""Size of an element of a panel in bytes."""


@dataclass(frozen=True, slots=True)
class Memory:
    """The memory of an extraction, in bytes.

    Args:
        threads: number of threads.
        of_thread: memory of each thread: its workspace, its tile, a product, and the BLAS's buffers.
        room: memory for a matrix and its decomposition.
        baseline: memory of the process without these.
        peak: planned peak of the process.
        staging: size of each workspace's staging buffer.
        scratch: memory that each thread's decoding loops take.
    """

    threads: int
    of_thread: int
    room: int
    baseline: int
    peak: int
    staging: int
    scratch: int

    def panel_rows(self, job: MatrixJob) -> int:
        """Number of rows of the matrix's panels: all of them if they fit, otherwise a multiple of `TILE_ROWS`."""
        room = self.room - memory_bytes(job.rows, job.columns, job.rank)
        rows = room // (job.columns * _DELTA)
        return job.rows if rows >= job.rows else rows // TILE_ROWS * TILE_ROWS

    def bytes_read(self, job: Job | LeftOut) -> int:
        """Size of what is read for a job, in bytes."""
        if isinstance(job, MatrixJob):
            rows = self.panel_rows(job)
            count = 1 if rows == job.rows else passes(job.rows, job.columns, job.rank)
            return count * panel_bytes_read(job, rows)
        pairs = job.pairs if not isinstance(job, LeftOut) else () if job.pair is None else (job.pair,)
        return sum(bytes_of_range(pair, 0, pair.elements) for pair in pairs)


def divide_memory(
    jobs: Sequence[Job], left_out: Iterable[LeftOut], budget: Budget, threads: int, decoding: tuple[int, int]
) -> Memory:
    """Divide a budget among at most `threads` threads and the largest matrix.

    Args:
        jobs: all jobs.
        left_out: tensors that are compared only.
        budget: the budget.
        threads: maximum number of threads.
        decoding: scratch memory of each thread that decodes, and what it allocates besides.

    Raises:
        BudgetError: if the budget is too small, with the smallest one that works.
    """
    matrices = [job for job in jobs if isinstance(job, MatrixJob)]
    pairs = [pair for job in jobs for pair in job.pairs] + [each.pair for each in left_out if each.pair is not None]
    staging = max((staging_of(pair) for pair in pairs), default=0)
    product = max((product_bytes(job.rows, job.columns, job.rank) for job in matrices), default=0)
    of_thread = Workspace.nbytes(staging, decoding[0]) + decoding[1] + TILE_BYTES + product + BLAS_BYTES
    smallest = max(map(_smallest, matrices), default=0)
    largest = max(map(_largest, matrices), default=0)
    minimum = max(budget.baseline + of_thread + smallest, budget.held)
    if budget.ram < minimum:
        size = format_size(minimum, up=True)
        raise BudgetError(
            f"the extraction does not fit {format_size(budget.ram)} of RAM: the smallest budget that works is {size} "
            f"({format_size(budget.baseline)} for the program itself); use --max-ram {size} or more"
        )
    free = budget.ram - budget.baseline
    threads = max(1, min(threads, free // 2 // of_thread, (free - smallest) // of_thread))
    room = min(largest, free - threads * of_thread)
    peak = budget.baseline + threads * of_thread + room
    return Memory(threads, of_thread, room, budget.baseline, peak, staging, decoding[0])


def _smallest(job: MatrixJob) -> int:
    """The least memory that a matrix can be decomposed in, in bytes. An exact SVD needs all of the matrix."""
    exact = passes(job.rows, job.columns, job.rank) == 1
    rows = job.rows if exact else min(TILE_ROWS, job.rows)
    return memory_bytes(job.rows, job.columns, job.rank) + rows * job.columns * _DELTA


def _largest(job: MatrixJob) -> int:
    return memory_bytes(job.rows, job.columns, job.rank) + job.rows * job.columns * _DELTA
