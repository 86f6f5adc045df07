"""Executes the jobs of an extraction, one after another, in threads that share the memory of the plan."""

from __future__ import annotations

import math
import queue
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from typing import Any

import numpy as np

from ....io.reading import Reader
from ...execute.ledger import Ledger
from .adapter_files import tensors_of_job
from .decompose import decompose, is_exact, memory_bytes
from .deltas import TILE_BYTES, Delta, Workers, not_finite
from .memory import Memory
from .opening import OpenedModels
from .options import ExtractOptions
from .result import MatrixResult
from .targets import Difference, FullJob, Job, Layer, MatrixJob
from .values import UNCHANGED, Compared, ValueReader, Workspace, chunks_of

Append = Callable[[memoryview], None]
"""A function that appends bytes to the adapter's weights."""


class JobRunner:
    """Executes jobs.

    Args:
        models: the models.
        options: options of the extraction.
        memory: plan of the memory.
        workers: threads, with their workspaces.
        ledger: ledger that the memory of each matrix is reserved in.
    """

    def __init__(
        self, models: OpenedModels, options: ExtractOptions, memory: Memory, workers: Workers, ledger: Ledger
    ) -> None:
        self._models = models
        self._options = options
        self._memory = memory
        self._workers = workers
        self._ledger = ledger

    def run(self, job: Job, append: Append) -> dict[str, Any]:
        """Execute a job and append its tensors. Return the entries of its record; see `staging`.

        Raises:
            CheckpointError: values are not finite, or a file is truncated or was changed.
            EnvironmentFailure: reading or writing failed.
        """
        result = self._decompose(job, append) if isinstance(job, MatrixJob) else self._save(job, append)
        if result is None:
            return {"tensors": []}
        tensors = tensors_of_job(job, self._models.described.prefix)
        return {"tensors": [each.to_json() for each in tensors], **result}

    def _decompose(self, job: MatrixJob, append: Append) -> dict[str, Any] | None:
        """Decompose a matrix and append its factors. Return its result; None if it has not changed."""
        rows = self._memory.panel_rows(job)
        nbytes = memory_bytes(job.rows, job.columns, job.rank) + rows * job.columns * 4
        with self._ledger.reserve("matrix", nbytes):
            name = job.pair.name
            factors = decompose(Delta(job, self._workers, rows), job.rank, self._options.seed, name)
            if factors is None:
                return None
            a, b = factors.right, factors.left
            if job.layer in (Layer.EMBEDDING, Layer.TRANSPOSED):
                a, b = factors.left.T, factors.right.T
            padding = job.stored_rank - job.rank
            for factor, zeros in ((a, ((0, padding), (0, 0))), (b, ((0, 0), (0, padding)))):
                append(np.ascontiguousarray(np.pad(factor, zeros) if padding else factor).data.cast("B"))
        method = "exact" if is_exact(job.rows, job.columns) else "randomized"
        norm = math.sqrt(factors.squares)
        shape = job.pair.shape
        result = MatrixResult(name, shape, job.rank, method, norm, factors.retained_energy, factors.error)
        return {"matrix": asdict(result)}

    def _save(self, job: FullJob, append: Append) -> dict[str, Any] | None:
        """Append tensors in full, and compare them. Return their names; None if none has changed."""
        compared = UNCHANGED
        for pair in job.pairs:
            compared |= self._compare(pair, append)
        if not compared.finite:
            raise not_finite(job.pairs[0].name)
        return {"saved": [pair.name for pair in job.pairs]} if compared.changed else None

    def _compare(self, pair: Difference, append: Append | None) -> Compared:
        """Compare two tensors chunk by chunk, and append the model's, in order."""
        compared, work = UNCHANGED, self._workers.workspaces.get()
        try:
            with np.errstate(all="ignore"):
                for first, count in chunks_of(pair, 0, pair.elements):
                    found, _, nbytes = self._workers.reader.compare(pair, first, count, work)
                    compared |= found
                    if append is not None:
                        append(work.raw[: count * pair.model.dtype.bits // 8])
                    self._workers.count_read(nbytes)
        finally:
            self._workers.workspaces.put(work)
        return compared

    def left_out(self) -> Iterator[tuple[str, str]]:
        """Yield the tensors that have changed and are not in the adapter, with the reason of each."""
        for each in self._models.targets.left_out:
            if each.pair is None or self._compare(each.pair, None).changed:
                yield each.name, each.reason


@contextmanager
def start_workers(
    models: OpenedModels, memory: Memory, reader: Reader, ledger: Ledger, count_read: Callable[[int], None]
) -> Iterator[Workers]:
    """Start the threads of an extraction, with their memory, for the duration of a ``with`` block."""
    with ExitStack() as stack:
        stack.enter_context(ledger.reserve("threads", memory.threads * memory.of_thread))
        pool = ThreadPoolExecutor(memory.threads, "extract")
        stack.callback(pool.shutdown, cancel_futures=True)
        values = ValueReader(reader.read, models.pairing.computed)
        workers = Workers(pool, values, queue.SimpleQueue(), queue.SimpleQueue(), count_read)
        for _ in range(memory.threads):
            workers.workspaces.put(Workspace(memory.staging, memory.scratch))
            workers.tiles.put(np.empty(TILE_BYTES // 8))
        yield workers
