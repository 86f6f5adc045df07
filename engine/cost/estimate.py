"""How long a merge will take: the bytes of each lane at the rates of a machine, with a range and the bottleneck.

The lanes work side by side, so that the slowest one decides, and the others show only where they can't hide behind it.
On the CPU all of them share the cores: what all threads do together, divided by the cores, is a lane of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ...errors import UsageError
from ...io.sizes import parse_size
from ...io.units import data_size
from ..graph.graph import Kind
from ..schedule.traffic import downloaded
from .machine import CACHED_SHARE, available_ram, usable_cores
from .workload import Workload

GIVEN, MEASURED, ASSUMED = "given", "measured", "assumed"
_SPREAD = {GIVEN: (0.9, 1.25), MEASURED: (0.75, 1.6), ASSUMED: (0.4, 2.5)}
"""By how much the time of a lane may be off, by how its rate is known."""
_UNHIDDEN = 0.35
"""The share of the second slowest lane's time that may not hide behind the slowest."""
_READERS = 2

WHAT = {
    "disk_read": "reading from the disk of the inputs",
    "disk_write": "writing to the disk of OUT",
    "memory": "copying to and from the page cache, by one core",
    "h2d": "copying to each GPU",
    "d2h": "copying back from each GPU",
    "compute": "inputs gone through in one pass of the arithmetic, by all threads or GPUs together",
}
"""The rates by name, with what is counted: bytes a second."""


@dataclass(frozen=True, slots=True)
class Rate:
    """Bytes a second, and how that is known: given, measured, or assumed."""

    per_second: float
    origin: str = ASSUMED

    @property
    def text(self) -> str:
        """``1.8GB/s``."""
        return f"{data_size(self.per_second)}/s"


@dataclass(frozen=True, slots=True)
class Rates:
    """What a machine does in a second; see `WHAT`.

    Args:
        disk_read, disk_write, memory, h2d, d2h, compute: bytes a second.
        cached: the share of the inputs that lies in the page cache already.
        start: seconds until the libraries are loaded that compute.
        notes: what people should know of them.
    """

    disk_read: Rate = Rate(2e9)
    disk_write: Rate = Rate(1e9)
    memory: Rate = Rate(4e9)
    h2d: Rate = Rate(20e9)
    d2h: Rate = Rate(20e9)
    compute: Rate = Rate(4e9)
    cached: float = 0.0
    start: float = 0.0
    notes: tuple[str, ...] = ()

    @property
    def option(self) -> str:
        """What gives these rates again, but for those that are only assumed; "" where all are."""
        known = {name: getattr(self, name) for name in WHAT}
        said = ",".join(f"{name}={rate.text}" for name, rate in known.items() if rate.origin != ASSUMED)
        return f"--rates {said}" if said else ""


_CORE, _GPU = 2e9, 150e9
"""Assumed bytes of inputs that a core, or a GPU, goes through in a second."""
_START = 1.0
"""Assumed seconds to load torch."""


def assumed_rates(work: Workload) -> Rates:
    """Rates for a machine of which nothing is known, but with the plan's devices."""
    devices = work.schedule.budget.devices
    compute = sum(_CORE * device.threads if device.vram is None else _GPU for device in devices)
    return Rates(compute=Rate(compute), start=_START if work.computes else 0.0)


def parse_rates(text: str) -> dict[str, float]:
    """Bytes a second by name, from ``disk_read=6GB/s,h2d=25GB/s``. Raises UsageError."""
    found: dict[str, float] = {}
    for part in text.split(","):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or name not in WHAT:
            raise UsageError(f"--rates {text}: {part.strip()!r} is no rate: give some of {', '.join(WHAT)}")
        if name in found:
            raise UsageError(f"--rates {text}: {name} is there twice")
        try:
            found[name] = parse_size(value.removesuffix("/s"))
        except UsageError as error:
            raise UsageError(f"--rates {text}: {name}: {error}") from None
    return found


def with_given(rates: Rates, given: Mapping[str, float]) -> Rates:
    """The rates, with those that the user gave in their place; a given disk is read, not the page cache."""
    changed: dict[str, Any] = {name: Rate(value, GIVEN) for name, value in given.items()}
    if "disk_read" in given:
        changed["cached"] = 0.0
    return replace(rates, **changed)


@dataclass(frozen=True, slots=True)
class LaneEstimate:
    """What one lane has to do.

    Args:
        name: as the merge's summary has it; ``cores`` is what all threads do on the CPU.
        nbytes: that it moves, or goes through.
        rate: at which.
        seconds: that it would take alone.
    """

    name: str
    nbytes: int
    rate: Rate
    seconds: float


@dataclass(frozen=True, slots=True)
class Estimate:
    """How long a merge will take.

    Args:
        seconds: the likely time.
        low: it won't be faster than that.
        high: nor should it be slower than that.
        lanes: what each lane has to do.
        rates: on which it is based.
    """

    seconds: float
    low: float
    high: float
    lanes: tuple[LaneEstimate, ...]
    rates: Rates

    @property
    def bottleneck(self) -> LaneEstimate:
        """The lane that takes longest."""
        return max(self.lanes, key=lambda lane: lane.seconds)

    def to_dict(self) -> dict[str, Any]:
        """As ``plan --json`` prints it: bytes and seconds."""
        return {
            "seconds": self.seconds,
            "low": self.low,
            "high": self.high,
            "bottleneck": self.bottleneck.name,
            "lanes": {lane.name: {"bytes": lane.nbytes, "seconds": lane.seconds} for lane in self.lanes},
            "rates": {
                name: {"bytes_per_second": rate.per_second, "known": rate.origin}
                for name in WHAT
                if (rate := getattr(self.rates, name))
            },
            "cached": self.rates.cached,
            "start": self.rates.start,
        }


def estimate(work: Workload, rates: Rates) -> Estimate:
    """The time of a plan at these rates, planning itself left out."""
    schedule = work.schedule
    devices = schedule.budget.devices
    gpus = sum(device.vram is not None for device in devices)
    lanes = [_read(work, rates), _lane("write", work.bytes_written, rates.disk_write)]
    if work.computes:
        computing = _lane("compute", computed_bytes(work), rates.compute)
        if gpus:
            back = downloaded(work.graph, schedule)
            lanes += [
                _lane("upload", schedule.uploaded, rates.h2d, gpus),
                computing,
                _lane("download", back, rates.d2h, gpus),
            ]
        else:
            lanes.append(computing)
    lanes.append(_cores(work, rates, lanes, sum(device.threads for device in devices if device.vram is None)))
    order = sorted((lane.seconds for lane in lanes), reverse=True)
    spread = [_SPREAD[lane.rate.origin] for lane in lanes]
    low = max(lane.seconds * least for lane, (least, _) in zip(lanes, spread, strict=True))
    high = max(lane.seconds * most for lane, (_, most) in zip(lanes, spread, strict=True))
    more = _fill(work, rates) + rates.start
    return Estimate(order[0] + more, low + rates.start / 2, high + 2 * more + _UNHIDDEN * order[1], tuple(lanes), rates)


def computed_bytes(work: Workload) -> int:
    """Bytes of inputs that the arithmetic goes through, each pass counted."""
    graph = work.graph
    total = 0
    for node in graph:
        operation = graph.operation(node)
        if operation.kind is Kind.MERGE:
            total += operation.passes * sum(graph.reads[read].nbytes for read in graph.node_sources[node])
    return total


def _lane(name: str, nbytes: int, rate: Rate, count: int = 1) -> LaneEstimate:
    return LaneEstimate(name, nbytes, rate, nbytes / (rate.per_second * max(1, count)))


def _read(work: Workload, rates: Rates) -> LaneEstimate:
    """The read lane: what lies in the page cache, now or after an earlier pass, comes from there."""
    nbytes = work.bytes_read
    cached = cached_again(work) + rates.cached * (nbytes - work.schedule.bytes_reread)
    disk = nbytes - cached
    seconds = disk / rates.disk_read.per_second + cached / (_READERS * rates.memory.per_second)
    rate = rates.disk_read if disk > cached else rates.memory
    if seconds:
        rate = replace(rate, per_second=nbytes / seconds)
    return LaneEstimate("read", nbytes, rate, seconds)


def cached_again(work: Workload) -> int:
    """Bytes that are read again from the page cache: all or none, as the merge keeps its inputs there or not."""
    graph, machine = work.graph, work.machine
    free = machine.ram if machine is not None and machine.ram is not None else available_ram()
    kept = sum(ref.nbytes for ref in graph.reads) < CACHED_SHARE * free
    return work.schedule.bytes_reread if kept else 0


def _cores(work: Workload, rates: Rates, lanes: list[LaneEstimate], threads: int) -> LaneEstimate:
    """What all threads do together on the machine's cores: arithmetic where the CPU does it, and copying."""
    machine = work.machine
    cores = (machine and machine.cores) or usable_cores()
    computing = next((lane for lane in lanes if lane.name == "compute"), None)
    moved = work.bytes_read + work.bytes_written
    zeroed = min(moved, work.schedule.ram_slots * work.schedule.slot_bytes)  # by the kernel, at the first use
    seconds = (moved + zeroed) / rates.memory.per_second
    origin = rates.memory.origin
    if computing is not None and threads:
        busy = computing.seconds * threads
        origin = computing.rate.origin if busy > seconds else origin
        seconds += busy
    per_second = moved * cores / seconds if seconds else rates.memory.per_second
    return LaneEstimate("cores", moved, Rate(per_second, origin), seconds / cores)


def _fill(work: Workload, rates: Rates) -> float:
    """Until the last lane has something to do: one chunk of every source comes through all lanes."""
    schedule, reads = work.schedule, work.graph.reads
    first = schedule.steps[0].sources if schedule.steps else ()
    nbytes = sum(min(schedule.slot_bytes, reads[read].nbytes) for read in first)
    return nbytes * (1 / rates.disk_read.per_second + 1 / rates.compute.per_second + 1 / rates.disk_write.per_second)
