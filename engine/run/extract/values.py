"""Reads the values of tensors of both models chunk by chunk, in several threads with a workspace each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ....io.tensors.assembled import read_tensor
from ....io.tensors.refs import TensorRef
from ....methods.kernel.spec import BLOCK
from ...execute.arena import take_memory
from ...graph.extents import extent
from ..diff.computed import ComputedTensor, ComputedTensors, Read
from ..diff.values import Floats, decode
from .targets import Difference

CHUNK = 8 * BLOCK
"""Number of elements that are read and decoded at a time: 512 KiB in bfloat16."""
_WIDEST = 8
"""Size of the widest element in bytes."""

Matrix = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Compared:
    """What two tensors, or parts of them, have in common.

    Args:
        changed: whether any value differs.
        finite: whether all values and differences are finite numbers.
    """

    changed: bool
    finite: bool

    def __or__(self, other: Compared) -> Compared:
        """Both parts together."""
        return Compared(self.changed or other.changed, self.finite and other.finite)


UNCHANGED = Compared(changed=False, finite=True)


class Workspace:
    """The memory of one thread that reads.

    Args:
        staging: size of the largest chunk of parts that are decoded, in bytes.
        scratch: memory of the decoding loops in bytes.
    """

    def __init__(self, staging: int, scratch: int) -> None:
        self.raw = memoryview(bytearray(CHUNK * _WIDEST))
        self.values: tuple[Floats, Floats] = np.empty(CHUNK), np.empty(CHUNK)
        self.bits: NDArray[np.uint32] = np.empty(CHUNK, np.uint32)
        self.staging = memoryview(bytearray(staging))
        self.scratch = memoryview(take_memory(scratch)) if scratch else self.staging[:0]

    @staticmethod
    def nbytes(staging: int, scratch: int) -> int:
        """Return the size of a workspace in bytes."""
        return CHUNK * (_WIDEST + 2 * 8 + 4 + 3) + staging + scratch  # three masks of a byte while chunks are compared


class ValueReader:
    """Reads ranges of tensors. Thread-safe with one workspace for each thread.

    Args:
        read: function that reads from a file.
        computed: tensors that are not stored as they are.
    """

    def __init__(self, read: Read, computed: ComputedTensors) -> None:
        self._read = read
        self._computed = computed

    def compare(self, pair: Difference, first: int, count: int, work: Workspace) -> tuple[Compared, Floats, int]:
        """Read a range of both tensors and subtract: the bytes of the model's tensor stay in ``work.raw``.

        Args:
            pair: the tensors.
            first: index of the first element; a multiple of `BLOCK` unless both are stored as they are.
            count: number of elements, at most `CHUNK`.
            work: the thread's workspace.

        Returns:
            What the ranges have in common, their difference in float64 (``work.values[0]``), and the bytes read.
        """
        base, values = (each[:count] for each in work.values)
        nbytes = self.load(pair.base, first, base, work) + self.load(pair.model, first, values, work)
        changed = bool(np.any(np.not_equal(base, values)))
        np.subtract(values, base, out=base)
        return Compared(changed, bool(np.all(np.isfinite(base)))), base, nbytes

    def load(self, tensor: TensorRef | ComputedTensor, first: int, out: Floats, work: Workspace) -> int:
        """Read a range of a tensor as float64; its bytes stay in ``work.raw``. Return the number of bytes read."""
        width = tensor.dtype.bits // 8
        raw = work.raw[: len(out) * width]
        if isinstance(tensor, TensorRef):
            read_tensor(self._read, tensor, first * width, raw)
            nbytes = len(raw)
        else:
            nbytes = self._computed.load(tensor, first, raw, work.staging, work.scratch, self._read)
        decode(raw, tensor.dtype, out, work.bits)
        return nbytes


def chunks_of(pair: Difference, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield the chunks (first element, count) that cover a range of elements, and perhaps some before and after it."""
    if not _stored(pair):  # decoding starts and ends at blocks
        start = start // BLOCK * BLOCK
        end = min(-(-end // BLOCK) * BLOCK, pair.elements)
    for first in range(start, end, CHUNK):
        yield first, min(CHUNK, end - first)


def bytes_of_range(pair: Difference, start: int, end: int) -> int:
    """Return the number of bytes that are read for a range of elements of both tensors."""
    total = 0
    for tensor in (pair.base, pair.model):
        if isinstance(tensor, TensorRef):
            total += sum(count for _, count in _bounds(pair, start, end)) * tensor.dtype.bits // 8
        elif start == 0 and end == pair.elements:
            total += tensor.bytes_read(CHUNK)
        else:
            total += sum(_bytes_of_chunk(tensor, *chunk) for chunk in chunks_of(pair, start, end))
    return total


def staging_of(pair: Difference) -> int:
    """Return the size of the buffer that chunks of computed tensors are staged in, in bytes."""
    return max(0 if isinstance(each, TensorRef) else each.staging(CHUNK)[-1] for each in (pair.base, pair.model))


def _stored(pair: Difference) -> bool:
    return isinstance(pair.base, TensorRef) and isinstance(pair.model, TensorRef)


def _bounds(pair: Difference, start: int, end: int) -> list[tuple[int, int]]:
    """One range that covers all chunks of a range."""
    if _stored(pair):
        return [(start, end - start)]
    start = start // BLOCK * BLOCK
    return [(start, min(-(-end // BLOCK) * BLOCK, pair.elements) - start)]


def _bytes_of_chunk(tensor: ComputedTensor, first: int, count: int) -> int:
    ranges: list[tuple[int, int]] = []
    for place in range(len(tensor.tensor.parts)):
        ranges += extent(tensor.graph, tensor.node, place, first, count)
    return sum(nbytes for offset, nbytes in ranges if offset >= 0)


def as_matrix(memory: memoryview, rows: int, columns: int) -> Matrix:
    """Return the beginning of a buffer as a matrix of float32."""
    found: NDArray[Any] = np.frombuffer(memory, np.float32, rows * columns).reshape(rows, columns)
    return found
