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
    """Pairs that share a stored tensor, which is read once for all of them; most units have one pair.

    Args:
        tensors: the stored tensors, all of one shape.
        pairs: the pairs.
    """

    tensors: tuple[TensorRef, ...]
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
    def nbytes(self) -> int:
        """Size of all tensors in bytes."""
        return sum(tensor.nbytes for tensor in self.tensors)

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

    def chunk_blocks(self, buffer: int) -> int:
        """Number of blocks of a chunk that fits into a buffer of this size, at least 1."""
        return max(1, min(self.blocks, buffer // self.layout(1)[-1]))


def make_units(pairs: Sequence[Pair]) -> tuple[Unit, ...]:
    """Group the pairs with elements into units, in the order of A's files."""
    members: dict[TensorRef, list[int]] = {}
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
    """

    threads: int
    buffer: int
    sums: int
    baseline: int

    @property
    def of_thread(self) -> int:
        """The memory of one thread."""
        return self.buffer + WORKSPACE_BYTES + self.sums

    @property
    def peak(self) -> int:
        """The planned peak of the process."""
        return self.baseline + self.threads * self.of_thread


def divide_memory(units: Sequence[Unit], budget: Budget, threads: int) -> Memory:
    """Divide a budget among at most `threads` threads.

    Raises:
        BudgetError: if it is too small, with the smallest budget that works.
    """
    sums = max((unit.sums_bytes for unit in units), default=0)
    smallest = max((unit.layout(1)[-1] for unit in units), default=0)
    minimum = max(budget.baseline + smallest + WORKSPACE_BYTES + sums, budget.held)
    if budget.ram < minimum:
        size = format_size(minimum, up=True)
        raise BudgetError(
            f"the comparison does not fit {format_size(budget.ram)} of RAM: the smallest budget that works is {size} "
            f"({format_size(budget.baseline)} for the program itself); use --max-ram {size} or more"
        )
    room = budget.ram - budget.baseline
    threads = max(1, min(threads, len(units), room // (smallest + WORKSPACE_BYTES + sums)))
    largest = max((unit.layout(unit.blocks)[-1] for unit in units), default=0)
    buffer = min(BUFFER_BYTES, largest, room // threads - WORKSPACE_BYTES - sums)
    return Memory(threads, max(smallest, buffer), sums, budget.baseline)
