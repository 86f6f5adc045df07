"""Groups pairs of tensors into units that are read together, and divides the memory budget among threads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ....errors import BudgetError
from ....io.sizes import format_size
from ....io.tensors.refs import TensorRef
from ....methods.kernel.spec import BLOCK
from ...schedule.budget import Budget
from .computed import ComputedTensor
from .pairs import Pair
from .sums import SUMS, WORKSPACE_BYTES

BUFFER_BYTES = 8 << 20
"""Preferred size of a thread's read buffer in bytes."""
_ALIGNMENT = 8


class PairIndex(NamedTuple):
    """A pair of a unit: its number among all pairs, and the numbers of its tensors among the unit's tensors."""

    pair: int
    a: int
    b: int


@dataclass(frozen=True, slots=True)
class Unit:
    """Pairs that share a tensor, which is read once for all of them; most units have one pair.

    Args:
        tensors: the tensors, all of one shape.
        pairs: the pairs.
    """

    tensors: tuple[TensorRef | ComputedTensor, ...]
    pairs: tuple[PairIndex, ...]

    @property
    def elements(self) -> int:
        """Number of elements of each tensor."""
        return self.tensors[0].elements

    @property
    def blocks(self) -> int:
        """Number of blocks of each tensor."""
        return -(-self.elements // BLOCK)

    @property
    def refs(self) -> list[TensorRef]:
        """The stored tensors that are read."""
        found = [(tensor,) if isinstance(tensor, TensorRef) else tensor.refs for tensor in self.tensors]
        return [ref for refs in found for ref in refs]

    def bytes_read(self, buffer: int) -> int:
        """Size of what is read in chunks that fit into a buffer of `buffer` bytes, in bytes."""
        chunk = self.chunk_blocks(buffer) * BLOCK
        return sum(
            tensor.nbytes if isinstance(tensor, TensorRef) else tensor.bytes_read(chunk) for tensor in self.tensors
        )

    @property
    def sums_bytes(self) -> int:
        """Size of the sums of all blocks in bytes."""
        return len(self.pairs) * SUMS * 8 * self.blocks

    def layout(self, blocks: int) -> list[int]:
        """Offset of each tensor's part in the buffer for a chunk of this many blocks, and the end of the last part."""
        offsets = [0]
        for tensor in self.tensors:
            size = min(self.elements, blocks * BLOCK) * tensor.dtype.bits // 8
            offsets.append(offsets[-1] + -(-size // _ALIGNMENT) * _ALIGNMENT)
        return offsets

    def size(self, blocks: int) -> int:
        """Size of the buffer for a chunk of this many blocks: the tensors, then what one of them is staged in."""
        return self.layout(blocks)[-1] + max(
            0 if isinstance(tensor, TensorRef) else tensor.staging(blocks * BLOCK)[-1] for tensor in self.tensors
        )

    def chunk_blocks(self, buffer: int) -> int:
        """Number of blocks of a chunk that fits into a buffer of this size, at least 1."""
        low = max(1, min(self.blocks, buffer // self.size(1)))
        high = self.blocks if any(isinstance(tensor, ComputedTensor) for tensor in self.tensors) else low
        while low < high:  # a part can be staged completely for a chunk of any size
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.size(middle) <= buffer else (low, middle - 1)
        return low


def make_units(pairs: Sequence[Pair]) -> tuple[Unit, ...]:
    """Group the pairs with elements into units, in the order of A's files."""
    members: dict[TensorRef | ComputedTensor, list[int]] = {}
    for number, pair in enumerate(pairs):
        if pair.a.elements == 0:
            continue
        group, other = members.get(pair.a, []), members.get(pair.b, [])
        if other is not group:
            group, other = sorted((group, other), key=len, reverse=True)
            group.extend(other)
            members |= {ref: group for member in other for ref in (pairs[member].a, pairs[member].b)}
        group.append(number)
        members[pair.a] = members[pair.b] = group
    units = []
    for numbers in {id(group): group for group in members.values()}.values():
        refs = tuple(dict.fromkeys(ref for n in numbers for ref in (pairs[n].a, pairs[n].b)))
        index = {ref: place for place, ref in enumerate(refs)}
        units.append(Unit(refs, tuple(PairIndex(n, index[pairs[n].a], index[pairs[n].b]) for n in numbers)))
    return tuple(sorted(units, key=lambda unit: (unit.tensors[0].file, unit.tensors[0].offset)))


@dataclass(frozen=True, slots=True)
class Memory:
    """The memory of a comparison, in bytes.

    Args:
        threads: number of threads.
        buffer: size of each thread's read buffer.
        sums: memory for each thread's sums of blocks.
        baseline: memory of the process without these.
        decoding: memory that each thread decodes with.
    """

    threads: int
    buffer: int
    sums: int
    baseline: int
    decoding: int = 0

    @property
    def of_thread(self) -> int:
        """The memory of one thread."""
        return self.buffer + WORKSPACE_BYTES + self.sums + self.decoding

    @property
    def peak(self) -> int:
        """The planned peak of the process."""
        return self.baseline + self.threads * self.of_thread


def divide_memory(units: Sequence[Unit], budget: Budget, threads: int, decoding: int = 0) -> Memory:
    """Divide a budget among at most `threads` threads, each of which decodes with `decoding` bytes.

    Raises:
        BudgetError: if it is too small, with the smallest budget that works.
    """
    sums = max((unit.sums_bytes for unit in units), default=0)
    smallest = max((unit.size(1) for unit in units), default=0)
    fixed = WORKSPACE_BYTES + sums + decoding
    minimum = max(budget.baseline + smallest + fixed, budget.held)
    if budget.ram < minimum:
        size = format_size(minimum, up=True)
        raise BudgetError(
            f"the comparison does not fit {format_size(budget.ram)} of RAM: the smallest budget that works is {size} "
            f"({format_size(budget.baseline)} for the program itself); use --max-ram {size} or more"
        )
    room = budget.ram - budget.baseline
    threads = max(1, min(threads, len(units), room // (smallest + fixed)))
    largest = max((unit.size(unit.blocks) for unit in units), default=0)
    buffer = min(BUFFER_BYTES, largest, room // threads - fixed)
    return Memory(threads, max(smallest, buffer), sums, budget.baseline, decoding)
