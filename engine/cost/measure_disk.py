"""What the real disks do in a second, and all that `estimate` wants to know: measured, each in about half a second.

Inputs are read where the page cache doesn't have them, through the calls that a merge makes; what is written goes to an
unnamed file in OUT's file system, which is gone afterwards.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from ...io.platform import cached_share, read_at, write_at
from .estimate import MEASURED, Rate, Rates, assumed_rates, with_given
from .measure_compute import with_computing
from .workload import Workload

SECONDS = 0.5
"""How long each measurement takes, about."""
_PLACES = 64  # in the inputs, at which the page cache is asked, and from which is read
_WINDOW = 8 << 20
_BLOCK = 1 << 20
_THREADS = 2
_FIRST_WRITE, _MOST_WRITTEN = 8 << 20, 1 << 30
_FREE_SHARE = 8  # of the free space, one in so many bytes may be written


@dataclass(frozen=True, slots=True)
class Place:
    """A range of an input that a merge reads.

    Args:
        file: of it.
        offset: a multiple of the page's size.
        nbytes: of the range.
        cached: the share of it in the page cache.
    """

    file: Path
    offset: int
    nbytes: int
    cached: float


@dataclass(slots=True)
class TransferSample:
    """What was moved in how many seconds, of the clock and of a core."""

    nbytes: int = 0
    seconds: float = 0.0
    core: float = 0.0

    def add(self, nbytes: int, seconds: float, core: float) -> None:
        """Count what one thread moved."""
        self.nbytes += nbytes
        self.seconds += seconds
        self.core += core

    @property
    def rate(self) -> Rate:
        """Bytes a second."""
        return Rate(self.nbytes / self.seconds, MEASURED)

    @property
    def cost(self) -> float:
        """Seconds of a core for a byte; 0 where nothing was moved."""
        return self.core / self.nbytes if self.nbytes else 0.0


def measured_rates(work: Workload, out: Path | None, given: Mapping[str, float]) -> Rates:
    """The rates for a plan on this machine.

    Args:
        work: says which inputs, methods and devices.
        out: where the merge would write; its disk isn't touched where None, and its rate is assumed.
        given: rates that needn't be measured.
    """
    rates = assumed_rates(work)
    notes = []
    reading = writing = None
    if "disk_read" not in given and work.bytes_read:
        rates, reading, more = _with_reading(rates, work)
        notes += more
    if "disk_write" not in given and out is not None and work.bytes_written:
        written = measure_writing(next(path for path in (out.absolute(), *out.absolute().parents) if path.is_dir()))
        if written.seconds:
            rates, writing = replace(rates, disk_write=written.rate), written.cost
    if (reading or writing) and "memory" not in given:
        nbytes = work.bytes_read * bool(reading) + work.bytes_written * bool(writing)
        seconds = work.bytes_read * (reading or 0) + work.bytes_written * (writing or 0)
        rates = replace(rates, memory=Rate(nbytes / seconds, MEASURED))
    if work.computes:
        rates, more = with_computing(rates, work, given)
        notes += more
    if out is None and "disk_write" not in given:
        notes.append("give OUT as well, and writing to its disk is measured too")
    return with_given(replace(rates, notes=tuple(notes)), given)


# ------------------------------------------------------------------------------------------------ disks


def _with_reading(rates: Rates, work: Workload) -> tuple[Rates, float | None, list[str]]:
    """The rate of the inputs' disks, what a byte costs a core in seconds, and remarks."""
    places = input_places(work)
    if not places:
        return rates, None, []
    cached = sum(place.cached for place in places) / len(places)
    fresh = [place for place in places if place.cached < 0.5]
    disk = measure_reading(fresh, SECONDS) if fresh else TransferSample()
    again = measure_reading(fresh or places, SECONDS / 4)  # they are in the page cache now
    notes = [f"{cached:.0%} of the inputs are in the page cache now"] if cached >= 0.005 else []
    if disk.nbytes:
        rates = replace(rates, disk_read=disk.rate)
    else:
        notes.append("the disk of the inputs was not measured, since it need not be read")
    known = [(cached, again.cost), (1 - cached, disk.cost)]
    weighed = [(share, cost) for share, cost in known if cost]
    shares = sum(share for share, _ in weighed)
    cost = sum(share * cost for share, cost in weighed) / shares if shares else None
    return replace(rates, cached=cached), cost, notes


def input_places(work: Workload, places: int = _PLACES) -> list[Place]:
    """Ranges of the inputs, evenly spaced over all bytes that are read, of the files that are here."""
    graph = work.graph
    total = sum(ref.nbytes for ref in graph.reads)
    page = os.sysconf("SC_PAGESIZE")
    found = []
    past = wanted = 0
    for ref in graph.reads:
        while wanted < places and wanted * total < (past + ref.nbytes) * places:
            inside = wanted * total // places - past
            offset = (ref.offset + inside) // page * page
            nbytes = min(_WINDOW, ref.offset + ref.nbytes - offset)
            wanted += 1
            share = _cached_share(ref.file, offset, nbytes)
            if share is not None:
                found.append(Place(ref.file, offset, nbytes, share))
        past += ref.nbytes
    return found


def _cached_share(file: Path, offset: int, nbytes: int) -> float | None:
    """See `cached_share`; None for a file that can't be opened here, and 0 where the system doesn't tell."""
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return cached_share(descriptor, offset, nbytes) or 0.0
    finally:
        os.close(descriptor)


def measure_reading(places: Sequence[Place], seconds: float) -> TransferSample:
    """Read the places, with as many threads as a merge does, for so long or until all are read."""
    start = time.perf_counter()
    deadline = start + seconds

    def read(part: Sequence[Place]) -> tuple[int, float]:
        total = 0
        begun = time.thread_time()
        buffer = memoryview(bytearray(_BLOCK))
        for place in part:
            descriptor = os.open(place.file, os.O_RDONLY | os.O_CLOEXEC)
            try:
                done = 0
                # at least one block, for a busy machine may let the time pass before the first one is read
                while done < place.nbytes and (total + done == 0 or time.perf_counter() < deadline):
                    count = read_at(descriptor, buffer[: place.nbytes - done], place.offset + done)
                    if count == 0:
                        break
                    done += count
                total += done
            finally:
                os.close(descriptor)
        return total, time.thread_time() - begun

    moved = TransferSample()
    try:
        with ThreadPoolExecutor(_THREADS) as pool:
            for nbytes, core in pool.map(read, (places[number::_THREADS] for number in range(_THREADS))):
                moved.add(nbytes, 0, core)
    except OSError:
        return TransferSample()
    moved.seconds = time.perf_counter() - start
    return moved


def measure_writing(directory: Path) -> TransferSample:
    """Write more and more to an unnamed file in a directory, synced each time, until the time is up."""
    moved = TransferSample()
    data = os.urandom(_BLOCK)  # a file system that compresses must not be faster for it
    try:
        stats = os.statvfs(directory)
        most = min(_MOST_WRITTEN, stats.f_bavail * stats.f_frsize // _FREE_SHARE)
        start, size = time.perf_counter(), _FIRST_WRITE
        with tempfile.TemporaryFile(dir=directory, buffering=0) as file:
            descriptor = file.fileno()
            while moved.nbytes + size <= most:
                begun, core = time.perf_counter(), time.thread_time()
                for offset in range(0, size, _BLOCK):
                    write_at(descriptor, data, moved.nbytes + offset)
                busy = time.thread_time() - core
                os.fsync(descriptor)
                moved.add(size, time.perf_counter() - begun, busy)
                if time.perf_counter() - start + 2 * (time.perf_counter() - begun) > SECONDS:
                    break
                size *= 2
    except OSError:
        return TransferSample()  # whether OUT can be written at all, the plan says elsewhere
    return moved
