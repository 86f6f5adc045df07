"""What one pass of a node needs, and what stays cached after it if RAM holds everything that is needed again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from .step_list import NOTHING, CachedRange
from .tiling import ChunkedRead


@dataclass(frozen=True, slots=True)
class StepShape:
    """What a step of a node needs, apart from which sources: equal for all nodes of a class.

    Args:
        count: number of chunks.
        counts: for each distinct source, the number of chunks: 1 for one that is staged at once.
        writes: number of slots that each chunk takes for the output.
        nbytes: for each distinct source, the bytes that all chunks need.
        complete: all chunks of a source in RAM.
    """

    count: int
    counts: tuple[int, ...]
    writes: int
    nbytes: tuple[int, ...]
    complete: CachedRange


@dataclass(slots=True)
class Pass:
    """A step before the simulation has decided what stays cached after it.

    Args:
        node: number of the node.
        device: number of the device that computes it.
        separate: whether the computation reads its chunks from that device's own memory.
        shape: what the step needs.
        writes: number of slots that each chunk takes for the output in this pass.
        stays: whether the output stays in its slots, for the nodes that use it.
        sources: the distinct sources of the node.
        before: for each source, the chunks that are cached before the step.
        next_uses: for each source, the position of the next step that needs it; None if none does.
    """

    node: int
    device: int
    separate: bool
    shape: StepShape
    writes: int
    stays: bool
    sources: tuple[ChunkedRead, ...]
    before: list[CachedRange]
    next_uses: list[int | None]

    def by_next_use(self) -> list[tuple[int, int]]:
        """Return the next use and the number of each read that is needed again, the soonest first."""
        return sorted(
            (use, number)
            for number, (source, use) in enumerate(zip(self.sources, self.next_uses, strict=True))
            if use is not None and source.read >= 0
        )


class Undisturbed(NamedTuple):
    """A pass that keeps all chunks that are needed again, and for which no other source loses any.

    Args:
        keep: for each source, the chunks that stay cached after the step.
        bytes_read: for each source, the bytes read from files.
        ram: peak number of slots held in RAM.
        working_set: slots of the sources that are cached before or after the step.
    """

    keep: list[CachedRange]
    bytes_read: tuple[int, ...]
    ram: int
    working_set: int


def undisturbed(
    shape: StepShape,
    before: Sequence[CachedRange],
    next_uses: Sequence[int | None],
    writes: int,
    held: int,
    room: int,
    *,
    stays: bool,
) -> Undisturbed | None:
    """Return what a pass in RAM does if each source is cached either completely or not at all, and everything has room.

    This is nearly every pass. It does what `Simulation` finds for any pass, in less time.

    Args:
        shape: what the step needs.
        before: for each source, the chunks that are cached before the step.
        next_uses: for each source, the position of the next step that needs it; None if none does.
        writes: as in `Pass`.
        held: slots that others hold in RAM.
        room: slots for everything that is cached.
        stays: as in `Pass`.
    """
    count, complete = shape.count, shape.complete
    if not count or shape.counts.count(count) != len(shape.counts):
        return None
    cached = kept = either = 0
    for old, use in zip(before, next_uses, strict=True):
        if old is not NOTHING:
            if old != complete:
                return None
            cached += 1
        kept += use is not None
        either += old is not NOTHING or use is not None
    output = count if stays else 0
    if held + either * count + output > room:
        return None
    keep = [NOTHING if use is None else complete for use in next_uses]
    read = tuple([nbytes if old is NOTHING else 0 for old, nbytes in zip(before, shape.nbytes, strict=True)])
    # chunk by chunk, those that are needed no more are freed, and those that are needed again are added
    slots = held + writes + len(before) - cached
    last = slots + cached + (count - 1) * (kept + stays)
    return Undisturbed(keep, read, max(slots + cached * count, last), either * count + output)
