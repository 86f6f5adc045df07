"""The steps of a schedule in flat arrays: a merge of 100,000 tensors has a million steps, which count in its budget."""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, islice
from typing import overload

from .tiling import ChunkedRead


@dataclass(frozen=True, slots=True)
class CachedRange:
    """The chunks of one read that are cached: [0, vram) on its device, [low, high) in RAM."""

    vram: int = 0
    low: int = 0
    high: int = 0

    @property
    def ram(self) -> int:
        """Number of chunks in RAM."""
        return self.high - self.low


NOTHING = CachedRange()


@dataclass(frozen=True, slots=True)
class Step:
    """One pass of one node.

    Args:
        node: number of the node.
        index: number of the pass, from 0; the last one makes the output.
        first: number of the first chunk; more than 0 if an earlier run wrote the chunks before it.
        device: number of the device that computes.
        places: place among the node's sources of each distinct one.
        keep: for each source, the chunks that stay cached after the step.
        drop: sources that lose cached chunks before the step, with the chunks that stay cached.
        bytes_read: for each source, tensor bytes read from files during the step.
        uploaded: bytes copied to the device.
        ram: peak number of slots held in RAM during the step if its chunks run one after another.
        vram: peak number of slots held on the device, likewise.
    """

    node: int
    index: int
    first: int
    device: int
    places: tuple[int, ...]
    keep: tuple[CachedRange, ...]
    drop: tuple[tuple[ChunkedRead, CachedRange], ...]
    bytes_read: tuple[int, ...]
    uploaded: int
    ram: int
    vram: int


def step_list_bytes(steps: int, sources: int, *, separate: bool) -> int:
    """Return the memory of a `StepList` in bytes, without the sources that are dropped for lack of RAM.

    Args:
        steps: number of steps.
        sources: number of sources of all steps.
        separate: whether a device with its own memory computes.
    """
    for_step, for_source = (40, 20) if separate else (24, 12)
    return steps * for_step + sources * for_source


class Column:
    """Integers of 64 bits that are 0 or more. As long as all of them are 0, they take no memory.

    Args:
        typecode: type of the integers, as for `array`.
    """

    __slots__ = ("_values", "_zeros")

    def __init__(self, typecode: str = "I") -> None:
        self._values = array(typecode)
        self._zeros = 0  # number of the integers while all are 0

    def append(self, value: int) -> None:
        """Append an integer. Raises OverflowError if its type can't hold it."""
        if self._values:
            self._values.append(value)
        elif value:
            self._values.frombytes(bytes(self._values.itemsize * self._zeros))
            self._values.append(value)
        else:
            self._zeros += 1

    def append_zeros(self, count: int) -> None:
        """Append `count` zeros."""
        if self._values:
            self._values.extend([0] * count)
        else:
            self._zeros += count

    def extend(self, values: Sequence[int]) -> None:
        """Append integers, as `append` does."""
        if any(values):
            if not self._values:
                self._values.frombytes(bytes(self._values.itemsize * self._zeros))
            self._values.extend(values)
        else:
            self.append_zeros(len(values))

    def first_highest(self) -> int:
        """The position of the first of the highest integers; -1 if all are 0."""
        return self._values.index(max(self._values)) if self._values else -1

    def __getitem__(self, index: int) -> int:
        return self._values[index] if self._values else 0

    def __len__(self) -> int:
        return len(self._values) or self._zeros

    def __iter__(self) -> Iterator[int]:
        return (self[index] for index in range(len(self)))

    @property
    def nbytes(self) -> int:
        """Memory of the integers in bytes."""
        return len(self._values) * self._values.itemsize


class _Ranges:
    """Cached ranges in three columns. Without a GPU, only that of `CachedRange.high` takes memory."""

    __slots__ = ("high", "low", "vram")

    def __init__(self) -> None:
        self.vram, self.low, self.high = Column(), Column(), Column()

    def extend(self, ranges: Sequence[CachedRange]) -> None:
        """Append cached ranges."""
        self.vram.extend([held.vram for held in ranges])
        self.low.extend([held.low for held in ranges])
        self.high.extend([held.high for held in ranges])

    def append_nothing(self, count: int) -> None:
        """Append `count` ranges without chunks."""
        for column in (self.vram, self.low, self.high):
            column.append_zeros(count)

    def __getitem__(self, index: int) -> CachedRange:
        high, vram = self.high[index], self.vram[index]
        return CachedRange(vram, self.low[index], high) if high or vram else NOTHING

    @property
    def nbytes(self) -> int:
        return self.vram.nbytes + self.low.nbytes + self.high.nbytes


class StepList(Sequence[Step]):
    """The steps of a schedule, in the order in which they are dispatched.

    A step is stored as a few integers, about 50 bytes for three sources. Indexing and iteration make one `Step` at a
    time, which the caller should not keep.

    Args:
        places: function that returns the place of each distinct source of a node.
    """

    __slots__ = (
        "_device", "_drop_access", "_drop_held", "_drop_length", "_drop_read", "_drop_step", "_end", "_first", "_index",
        "_keep", "_node", "_places", "_read", "_uploaded", "ram", "vram",
    )  # fmt: skip

    def __init__(self, places: Callable[[int], tuple[int, ...]]) -> None:
        self._places = places
        self._node = array("I")
        self._index, self._first, self._device = Column(), Column(), Column()
        self._uploaded = Column("Q")
        self.ram, self.vram = Column(), Column()
        """For each step, `Step.ram` and `Step.vram`."""
        # one entry for each source of a step; those of step n are before _end[n]
        self._end = array("Q")
        self._read, self._keep = array("Q"), _Ranges()
        # one entry for each source that a step drops, with the number of the step
        self._drop_step, self._drop_read, self._drop_length = array("Q"), array("I"), array("Q")
        self._drop_access = Column()
        self._drop_held = _Ranges()

    def append(self, step: Step) -> None:
        """Append a step."""
        self.append_pass(
            step.node, step.index, step.first, step.device, step.keep, step.drop, step.bytes_read, step.uploaded,
            step.ram, step.vram,
        )  # fmt: skip

    def append_pass(
        self,
        node: int,
        index: int,
        first: int,
        device: int,
        keep: Sequence[CachedRange],
        drop: Sequence[tuple[ChunkedRead, CachedRange]],
        bytes_read: Sequence[int],
        uploaded: int,
        ram: int,
        vram: int,
    ) -> None:
        """Append a step with these attributes (see `Step`)."""
        for source, held in drop:
            self._drop_step.append(len(self._node))
            self._drop_read.append(source.read)
            self._drop_length.append(source.chunk_length)
            self._drop_access.append(source.access)
            self._drop_held.extend([held])
        self._node.append(node)
        self._index.append(index)
        self._first.append(first)
        self._device.append(device)
        self._uploaded.append(uploaded)
        self.ram.append(ram)
        self.vram.append(vram)
        self._read.extend(bytes_read)
        self._keep.extend(keep)
        self._end.append(len(self._read))

    def extend_alone(
        self,
        nodes: Sequence[int],
        devices: Sequence[int],
        bytes_read: Sequence[tuple[int, ...]],
        uploaded: Sequence[int],
        ram: Sequence[int],
        vram: Sequence[int],
    ) -> None:
        """Append the only step of each of some nodes, which find nothing in the cache and leave nothing there.

        Args:
            nodes: the nodes.
            devices: for each node, as in `Step`.
            bytes_read: likewise.
            uploaded: likewise.
            ram: likewise.
            vram: likewise.
        """
        self._node.extend(nodes)
        self._index.append_zeros(len(nodes))
        self._first.append_zeros(len(nodes))
        self._device.extend(devices)
        self._uploaded.extend(uploaded)
        self.ram.extend(ram)
        self.vram.extend(vram)
        end = len(self._read)
        self._end.extend(islice(accumulate(map(len, bytes_read), initial=end), 1, None))
        self._read.extend(chain.from_iterable(bytes_read))
        self._keep.append_nothing(len(self._read) - end)

    @property
    def nodes(self) -> set[int]:
        """The nodes that have steps."""
        return set(self._node)

    @property
    def nbytes(self) -> int:
        """Memory of the steps in bytes."""
        arrays = (self._node, self._end, self._read, self._drop_step, self._drop_read, self._drop_length)
        columns = (self._index, self._first, self._device, self._uploaded, self.ram, self.vram, self._drop_access)
        ranges = self._keep.nbytes + self._drop_held.nbytes
        return sum(len(a) * a.itemsize for a in arrays) + sum(column.nbytes for column in columns) + ranges

    def bytes_read(self) -> tuple[Sequence[int], Sequence[int]]:
        """The node of each step, and `Step.bytes_read` of all steps one after another."""
        return self._node, self._read

    def __len__(self) -> int:
        return len(self._node)

    def __iter__(self) -> Iterator[Step]:
        return map(self._step, range(len(self._node)))

    @overload
    def __getitem__(self, index: int) -> Step: ...
    @overload
    def __getitem__(self, index: slice) -> list[Step]: ...
    def __getitem__(self, index: int | slice) -> Step | list[Step]:
        numbers = range(len(self._node))[index]
        return self._step(numbers) if isinstance(numbers, int) else list(map(self._step, numbers))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, StepList):
            return NotImplemented
        return len(self) == len(other) and all(mine == theirs for mine, theirs in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]  # it is mutable

    def _step(self, number: int) -> Step:
        node = self._node[number]
        start, end = self._end[number - 1] if number else 0, self._end[number]
        return Step(
            node=node,
            index=self._index[number],
            first=self._first[number],
            device=self._device[number],
            places=self._places(node),
            keep=tuple([self._keep[entry] for entry in range(start, end)]),
            drop=self._dropped(number) if self._drop_step else (),
            bytes_read=tuple(self._read[start:end]),
            uploaded=self._uploaded[number],
            ram=self.ram[number],
            vram=self.vram[number],
        )

    def _dropped(self, number: int) -> tuple[tuple[ChunkedRead, CachedRange], ...]:
        """Return what a step drops. The entries are in the order of the steps, so bisection finds those of one."""
        entries = range(bisect_left(self._drop_step, number), bisect_right(self._drop_step, number))
        return tuple(
            (
                ChunkedRead(self._drop_read[entry], self._drop_length[entry], self._drop_access[entry]),
                self._drop_held[entry],
            )
            for entry in entries
        )
