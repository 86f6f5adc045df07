"""Compares two models chunk by chunk, within a memory budget. Every byte that is a value is read once."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from ....errors import CheckpointError
from ....io.counters import IoCounters
from ....io.hub.repository import HubFile
from ....io.reading import Reader, stat_fingerprints
from ....io.sizes import Limit
from ....io.task_group import TaskGroup
from ....io.tensors.assembled import files_of, read_tensor
from ....io.tensors.refs import TensorRef
from ....io.units import plural
from ....methods.kernel.reduction.reductions import total
from ....methods.kernel.spec import BLOCK
from ...cost.machine import CACHED_SHARE, available_ram, make_budget, memory_remark, process_memory, usable_cores
from ...cost.process_size import size_key
from ...execute.arena import take_memory
from ...execute.ledger import Ledger, Reservation
from ...execute.measurements import Progress
from ...model.experts.mapping import NamedCheckpoint, in_layout_of
from ...model.open import is_remote, open_adapters, open_named
from .pairs import Opened, Pair, pair_tensors
from .parts import with_names_of
from .result import Diff, Similarity, TensorDiff
from .sums import SUMS, WORKSPACE_BYTES, BlockSummer
from .units import Unit, divide_memory, make_units
from .values import Floats

RESULT_BYTES = 1024
"""RAM of the result for each tensor, and of the report about it, in bytes."""
JSON_BYTES = 4096
"""`RESULT_BYTES` if the result is printed as JSON."""

Notify = Callable[[Progress], None]


@dataclass(slots=True, eq=False)
class _OpenUnit:
    """The sums of a unit whose chunks are being compared.

    Args:
        unit: the unit.
        sums: array of shape (pairs, SUMS, blocks).
        counts: for each pair, numbers of equal elements and of those that are NaN or infinite.
        left: number of blocks that are not compared yet.
        reservation: memory of `sums`.
    """

    unit: Unit
    sums: Floats
    counts: list[tuple[int, int]]
    left: int
    reservation: Reservation


_Chunk = tuple[_OpenUnit, int, int]
"""A unit, and the first block and the number of blocks of a chunk."""


class Comparison:
    """One comparison of two models. Creating it opens the models, pairs their tensors and plans the memory.

    Args:
        a: first model: a directory, a .safetensors file, an index, or a Hub repository.
        b: second model.
        max_ram: limit of the process's resident memory in bytes or as a share of the machine's memory; a share by
            default.
        threads: maximum number of threads; by default the cores that the process may use.
        result_bytes: RAM of the result for each tensor in bytes.

    Attributes:
        bytes_to_read: size of what is to be read of the tensors, in bytes.
        downloads: files of Hub models that `run` needs and the cache does not have.

    Raises:
        UsageError: a name is not valid.
        CheckpointError: a model is missing, damaged, quantized in an unknown format or an adapter, or they have no
            tensor name in common.
        BudgetError: the comparison exceeds the budget.
    """

    def __init__(
        self,
        a: str | os.PathLike[str],
        b: str | os.PathLike[str],
        *,
        max_ram: Limit | None = None,
        threads: int | None = None,
        result_bytes: int = RESULT_BYTES,
    ) -> None:
        named = [open_named(os.fspath(model)) for model in (a, b)]
        named[1] = named[1][0], with_names_of(named[1][1], named[0][1])
        self._a, self._b = (
            Opened(reference.text, checkpoint, open_adapters(reference)) for reference, checkpoint in named
        )
        self._layout_remark = ""
        try:
            mapped = in_layout_of(*(NamedCheckpoint(each.name, each.checkpoint) for each in (self._a, self._b)))
        except CheckpointError as error:  # all other tensors can be compared
            self._layout_remark = f"experts are not compared: {error}"
        else:
            self._b = replace(self._b, checkpoint=mapped.checkpoint)
        self._pairing = pair_tensors(self._a, self._b)
        pairs = self._pairing.pairs
        self._units = make_units(pairs)
        self.downloads = tuple(file for file in self._needed_files() if not file.present)
        computed = self._pairing.computed
        compiling = computed.prepare()
        key = size_key("diff", self._a.name, self._b.name)
        budget = make_budget(max_ram, (), computed.decodes, key=key, compiling=compiling)
        budget = replace(budget, baseline=budget.baseline + len(pairs) * result_bytes)
        decoding = computed.scratch + computed.allocated
        self._memory = divide_memory(self._units, budget, threads or usable_cores(), decoding)
        self.bytes_to_read = sum(unit.bytes_read(self._memory.buffer) for unit in self._units)
        self._max_ram = budget.ram
        self._remark = memory_remark(max_ram, None)
        self._lock = threading.Lock()
        self._counters = IoCounters()
        self._notify: Notify = lambda progress: None
        self._ledger = Ledger()
        self._results: list[Similarity] = [Similarity(0, 0, 0, 0.0, 0.0, 0.0, 0.0)] * len(pairs)
        self._chunks = self._all_chunks()

    def run(self, notify: Notify | None = None) -> Diff:
        """Read and compare all tensors. To be called once.

        Args:
            notify: function that is called with the bytes read so far, from any thread.

        Raises:
            CheckpointError: a file is missing, truncated or was changed.
            EnvironmentFailure: reading failed.
        """
        self._notify = notify or self._notify
        memory = self._memory
        reader = Reader(keep_cached=self.bytes_to_read < CACHED_SHARE * available_ram())
        try:
            with self._ledger.allow(memory.peak - memory.baseline), TaskGroup("diff") as group:
                for _ in range(memory.threads):
                    group.spawn(self._work, reader, group)
                group.join()  # inside the block, so an interrupt cancels the threads
        finally:
            reader.close()
        self._check_unchanged()
        return self._diff()

    # --- threads -----------------------------------------------------------------------------------------------

    def _all_chunks(self) -> Iterator[_Chunk]:
        """Yield all chunks in file order; the sums of a unit are allocated when its first chunk is taken."""
        for unit in self._units:
            reservation = self._ledger.reserve("sums of blocks", unit.sums_bytes)
            sums = np.zeros((len(unit.pairs), SUMS, unit.blocks))
            opened = _OpenUnit(unit, sums, [(0, 0)] * len(unit.pairs), unit.blocks, reservation)
            step = unit.chunk_blocks(self._memory.buffer)
            for first in range(0, unit.blocks, step):
                yield opened, first, min(step, unit.blocks - first)

    def _work(self, reader: Reader, group: TaskGroup) -> None:
        """Compare chunks until none is left or the group is cancelled."""
        nbytes = self._memory.buffer + WORKSPACE_BYTES
        with self._ledger.reserve("diff buffers", nbytes + self._memory.decoding), np.errstate(all="ignore"):
            memory = memoryview(bytearray(nbytes))
            summer = BlockSummer(memory[:WORKSPACE_BYTES])
            scratch = memoryview(take_memory(self._pairing.computed.scratch)) if self._memory.decoding else memory[:0]
            while not group.cancelled:
                with self._lock:
                    chunk = next(self._chunks, None)
                if chunk is None:
                    return
                self._compare(reader, chunk, memory[WORKSPACE_BYTES:], summer, scratch)

    def _compare(
        self, reader: Reader, chunk: _Chunk, buffer: memoryview, summer: BlockSummer, scratch: memoryview
    ) -> None:
        """Read a chunk of all tensors of a unit, and sum its blocks."""
        opened, first, count = chunk
        unit = opened.unit
        start, end = first * BLOCK, min(unit.elements, (first + count) * BLOCK)
        *offsets, staging = unit.layout(count)
        parts, nbytes = [], 0
        for tensor, offset in zip(unit.tensors, offsets, strict=True):
            width = tensor.dtype.bits // 8
            parts.append(buffer[offset : offset + (end - start) * width])
            if isinstance(tensor, TensorRef):
                read_tensor(reader.read, tensor, start * width, parts[-1])
                nbytes += len(parts[-1])
            else:
                load = self._pairing.computed.load
                nbytes += load(tensor, start, parts[-1], buffer[staging:], scratch, reader.read)
        self._counters.add(read=nbytes)
        with self._lock:  # one call at a time, and its numbers only grow
            self._notify(Progress(self._counters.bytes_read))
        sums = np.empty(SUMS)
        counted = [(0, 0)] * len(unit.pairs)
        for number, pair in enumerate(unit.pairs):
            a, b = unit.tensors[pair.a].dtype, unit.tensors[pair.b].dtype
            for block in range(count):
                ours = _block(parts[pair.a], block, a.bits // 8), a
                theirs = _block(parts[pair.b], block, b.bits // 8), b
                counted[number] = _added(counted[number], summer.add(ours, theirs, sums))
                opened.sums[number, :, first + block] = sums
        with self._lock:
            opened.counts = [_added(old, new) for old, new in zip(opened.counts, counted, strict=True)]
            opened.left -= count
            done = opened.left == 0
        if done:
            self._finish(opened)

    def _finish(self, opened: _OpenUnit) -> None:
        """Add the sums of all blocks of a unit."""
        for pair, sums, counts in zip(opened.unit.pairs, opened.sums, opened.counts, strict=True):
            totals = [total(row) for row in sums]
            self._results[pair.pair] = Similarity(opened.unit.elements, *counts, *totals)
        opened.sums = np.empty(0)
        opened.reservation.release()

    # --- files and result --------------------------------------------------------------------------------------

    def _needed_files(self) -> list[HubFile]:
        """The files of Hub models that hold the tensors to read."""
        remote = [source for model in (self._a, self._b) for source in model.sources if is_remote(source)]
        if not remote:
            return []
        from ....io.hub.checkpoint import needed_files

        used = [ref for unit in self._units for ref in unit.refs]
        files = {file.path: file for checkpoint in remote for file in needed_files(checkpoint, used)}
        return list(files.values())

    def _check_unchanged(self) -> None:
        """Check that no source file has changed since its header was read."""
        read = {file for unit in self._units for ref in unit.refs for file in files_of(ref)}
        sources = (*self._a.sources, *self._b.sources)
        stamps = {file: stamp for source in sources for file, stamp in source.stamps.items()}
        for file, stamp in stat_fingerprints(read & stamps.keys()).items():
            if stamp != stamps[file]:
                raise CheckpointError(f"{file} was changed during the comparison: run the same command again")

    def _diff(self) -> Diff:
        pairing = self._pairing
        tensors = tuple(map(_tensor_diff, pairing.pairs, self._results))
        return Diff(
            self._a.name,
            self._b.name,
            tensors,
            pairing.only_in_a,
            pairing.only_in_b,
            pairing.not_compared,
            tuple(self._warnings()),
            self._counters.bytes_read,
            self._max_ram,
            self._memory.peak,
            process_memory().peak,
        )

    def _warnings(self) -> Iterator[str]:
        for model in {opened.name: opened for opened in (self._a, self._b)}.values():
            yield from (f"{model.name}: {remark}" for remark in model.checkpoint.remarks)
            yield from filter(None, (each.remark(model.base, model.checkpoint) for each in model.adapters))
        yield from (remark for remark in (self._layout_remark, self._remark) if remark)
        found = [
            (pair.name, result.nonfinite)
            for pair, result in zip(self._pairing.pairs, self._results, strict=True)
            if result.nonfinite
        ]
        if found:
            count = sum(nonfinite for _, nonfinite in found)
            yield (
                f"NaN or infinite in A or B, and left out of distances and cosines: {plural(count, 'element')} of "
                f"{plural(len(found), 'tensor')}, first in {found[0][0]}"
            )


def _tensor_diff(pair: Pair, result: Similarity) -> TensorDiff:
    tensors = [each if isinstance(each, TensorRef) else each.tensor for each in (pair.a, pair.b)]
    a, b = (tensor.dtype.name for tensor in tensors)
    formats = tuple("" if isinstance(tensor, TensorRef) else tensor.format for tensor in tensors)
    return TensorDiff(pair.name, pair.stack, pair.layer, pair.a.shape, (a, b), result, pair.tied_to, formats)


def _block(data: memoryview, block: int, width: int) -> memoryview:
    """The bytes of one block of elements that are `width` bytes wide."""
    return data[block * BLOCK * width : (block + 1) * BLOCK * width]


def _added(counts: tuple[int, int], more: tuple[int, int]) -> tuple[int, int]:
    return counts[0] + more[0], counts[1] + more[1]
