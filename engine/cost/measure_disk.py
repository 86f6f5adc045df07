"""Measures the rates of this machine for `estimate`, in about half a second each.

Reading is measured on inputs that are not in the page cache, with the calls that a merge makes. Writing is measured on
an unnamed temporary file in OUT's file system.
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
from ...io.tensors.assembled import stored_ranges
from .estimate import MEASURED, Rate, Rates, assumed_rates, with_given
from .measure_compute import with_computing
from .workload import Workload

SECONDS = 0.5
"""Approximate time of each measurement."""
_SAMPLES = 64  # number of input ranges that are checked against the page cache and read
_WINDOW = 8 << 20
_BLOCK = 1 << 20
_THREADS = 2
_FIRST_WRITE, _MAX_WRITTEN = 8 << 20, 1 << 30
_FREE_SHARE = 8  # the file takes at most one in so many bytes of the free space


@dataclass(frozen=True, slots=True)
class InputRange:
    """A range of an input file that a merge reads.

    Args:
        file: path of the file.
        offset: start of the range, a multiple of the page size.
        nbytes: size of the range in bytes.
        cached: share of the range that is in the page cache.
    """

    file: Path
    offset: int
    nbytes: int
    cached: float


@dataclass(slots=True)
class TransferSample:
    """The result of a measurement.

    Args:
        nbytes: bytes read or written.
        seconds: elapsed time in seconds.
        core: CPU time in seconds.
    """

    nbytes: int = 0
    seconds: float = 0.0
    core: float = 0.0

    def add(self, nbytes: int, seconds: float, core: float) -> None:
        """Add the result of one thread."""
        self.nbytes += nbytes
        self.seconds += seconds
        self.core += core

    @property
    def rate(self) -> Rate:
        """The throughput."""
        return Rate(self.nbytes / self.seconds, MEASURED)

    @property
    def cost(self) -> float:
        """CPU seconds per byte; 0 if nothing was read or written."""
        return self.core / self.nbytes if self.nbytes else 0.0


def measured_rates(work: Workload, out: Path | None, given: Mapping[str, float]) -> Rates:
    """Measure the rates of this machine for a merge.

    Args:
        work: work of the merge.
        out: output directory; if None, the write rate is assumed and no disk is written to.
        given: rates that the user gave, which are not measured.
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
        notes.append("pass OUT to measure its disk, too")
    return with_given(replace(rates, notes=tuple(notes)), given)


# ------------------------------------------------------------------------------------------------ disks


def _with_reading(rates: Rates, work: Workload) -> tuple[Rates, float | None, list[str]]:
    """Measure the read rate; return it with the CPU seconds per byte and remarks for the user."""
    ranges = input_ranges(work)
    if not ranges:
        return rates, None, []
    cached = sum(each.cached for each in ranges) / len(ranges)
    fresh = [each for each in ranges if each.cached < 0.5]
    disk = measure_reading(fresh, SECONDS) if fresh else TransferSample()
    again = measure_reading(fresh or ranges, SECONDS / 4)  # they are in the page cache now
    notes = [f"{cached:.0%} of the inputs are in the page cache now"] if cached >= 0.005 else []
    if disk.nbytes:
        rates = replace(rates, disk_read=disk.rate)
    else:
        notes.append("the disk of the inputs was not measured, because every input is cached")
    costs = [(cached, again.cost), (1 - cached, disk.cost)]
    weighed = [(share, cost) for share, cost in costs if cost]
    shares = sum(share for share, _ in weighed)
    cost = sum(share * cost for share, cost in weighed) / shares if shares else None
    return replace(rates, cached=cached), cost, notes


def input_ranges(work: Workload, count: int = _SAMPLES) -> list[InputRange]:
    """Return ranges of the input files on this machine, evenly spaced over all bytes that are read."""
    graph = work.graph
    total = sum(ref.nbytes for ref in graph.reads)
    page = os.sysconf("SC_PAGESIZE")
    ranges = []
    past = wanted = 0
    for ref in graph.reads:
        while wanted < count and wanted * total < (past + ref.nbytes) * count:
            inside = wanted * total // count - past
            stored = stored_ranges(ref, inside, ref.nbytes)[0]
            offset = stored.offset // page * page
            nbytes = min(_WINDOW, stored.offset + stored.nbytes - offset)
            wanted += 1
            share = _cached_share(stored.file, offset, nbytes)
            if share is not None:
                ranges.append(InputRange(stored.file, offset, nbytes, share))
        past += ref.nbytes
    return ranges


def _cached_share(file: Path, offset: int, nbytes: int) -> float | None:
    """Return `cached_share` of a file; None if the file cannot be opened, 0 if the system does not report it."""
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return cached_share(descriptor, offset, nbytes) or 0.0
    finally:
        os.close(descriptor)


def measure_reading(ranges: Sequence[InputRange], seconds: float) -> TransferSample:
    """Read ranges with as many threads as a merge uses, until the time is up or all are read."""
    start = time.perf_counter()
    deadline = start + seconds

    def read(part: Sequence[InputRange]) -> tuple[int, float]:
        total = 0
        begin = time.thread_time()
        buffer = memoryview(bytearray(_BLOCK))
        for each in part:
            descriptor = os.open(each.file, os.O_RDONLY | os.O_CLOEXEC)
            try:
                done = 0
                # at least one block: on a busy machine the time may be up before the first one is read
                while done < each.nbytes and (total + done == 0 or time.perf_counter() < deadline):
                    count = read_at(descriptor, buffer[: each.nbytes - done], each.offset + done)
                    if count == 0:
                        break
                    done += count
                total += done
            finally:
                os.close(descriptor)
        return total, time.thread_time() - begin

    sample = TransferSample()
    try:
        with ThreadPoolExecutor(_THREADS) as pool:
            for nbytes, core in pool.map(read, (ranges[number::_THREADS] for number in range(_THREADS))):
                sample.add(nbytes, 0, core)
    except OSError:
        return TransferSample()
    sample.seconds = time.perf_counter() - start
    return sample


def measure_writing(directory: Path) -> TransferSample:
    """Write and sync ever larger parts of an unnamed temporary file in a directory, until the time is up."""
    sample = TransferSample()
    data = os.urandom(_BLOCK)  # random, since a file system may compress
    try:
        stats = os.statvfs(directory)
        limit = min(_MAX_WRITTEN, stats.f_bavail * stats.f_frsize // _FREE_SHARE)
        start, size = time.perf_counter(), _FIRST_WRITE
        with tempfile.TemporaryFile(dir=directory, buffering=0) as file:
            descriptor = file.fileno()
            while sample.nbytes + size <= limit:
                begin, core = time.perf_counter(), time.thread_time()
                for offset in range(0, size, _BLOCK):
                    write_at(descriptor, data, sample.nbytes + offset)
                busy = time.thread_time() - core
                os.fsync(descriptor)
                sample.add(size, time.perf_counter() - begin, busy)
                if time.perf_counter() - start + 2 * (time.perf_counter() - begin) > SECONDS:
                    break
                size *= 2
    except OSError:
        return TransferSample()  # the plan reports elsewhere if OUT cannot be written
    return sample
