"""Estimates the time of a merge from the bytes of each lane and the rates of a machine, with a range.

The lanes run concurrently: the slowest one is the bottleneck, and the others add only what does not overlap with it.
All lanes share the CPU's cores and the memory bus. So the work of all threads divided by the cores counts as one more
lane, and so does the traffic between memory and cores divided by the memory bandwidth: computing is limited by the
cores or by the bandwidth, whichever is reached first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ...errors import UsageError
from ...io.sizes import parse_size
from ...io.units import data_size
from ..schedule.traffic import downloaded
from .machine import CACHED_SHARE, available_ram
from .scaling import SERIAL_SHARE, computed_bytes, computing_threads, effective_threads, memory_traffic
from .workload import Workload

GIVEN, MEASURED, EXTRAPOLATED, ASSUMED = "given", "measured", "extrapolated", "assumed"
_SPREAD = {GIVEN: (0.9, 1.25), MEASURED: (0.75, 1.6), EXTRAPOLATED: (0.6, 2.0), ASSUMED: (0.4, 2.5)}
"""Lowest and highest factor of a lane's time, by the origin of its rate."""
_UNHIDDEN = 0.35
"""Share of the second slowest lane's time that may not overlap with the slowest lane."""
_READERS = 2

RATES = {
    "disk_read": "reading from the disk of the inputs",
    "disk_write": "writing to the disk of OUT",
    "memory": "copying to and from the page cache, by one core",
    "h2d": "copying to each GPU",
    "d2h": "copying back from each GPU",
    "compute": "computing: input bytes of one pass, by all threads or GPUs together",
    "bandwidth": "reading and writing memory, by all cores together",
}
"""Descriptions of the rates, by name. All are in bytes per second."""


@dataclass(frozen=True, slots=True)
class Rate:
    """A throughput.

    Args:
        per_second: bytes per second.
        origin: `GIVEN` by the user, `MEASURED`, `EXTRAPOLATED` from a measurement with fewer threads, or `ASSUMED`.
    """

    per_second: float
    origin: str = ASSUMED

    @property
    def text(self) -> str:
        """The rate with its unit, such as ``1.8GB/s``."""
        return f"{data_size(self.per_second)}/s"


@dataclass(frozen=True, slots=True)
class Rates:
    """The rates of a machine.

    Args:
        disk_read, disk_write, memory, h2d, d2h, compute, bandwidth: throughput of each kind of work; see `RATES`.
        cached: share of the inputs that is in the page cache already.
        start: seconds to load the libraries that compute.
        notes: remarks for the user.
        serial: share of the computing that only one thread at a time can do.
    """

    disk_read: Rate = Rate(2e9)
    disk_write: Rate = Rate(1e9)
    memory: Rate = Rate(4e9)
    h2d: Rate = Rate(20e9)
    d2h: Rate = Rate(20e9)
    compute: Rate = Rate(4e9)
    bandwidth: Rate = Rate(40e9)  # two channels of DDR4-3200 at 80%
    cached: float = 0.0
    start: float = 0.0
    notes: tuple[str, ...] = ()
    serial: float = SERIAL_SHARE

    @property
    def option(self) -> str:
        """The ``--rates`` option that repeats the rates that are not assumed; empty if all are."""
        known = {name: getattr(self, name) for name in RATES}
        pairs = ",".join(f"{name}={rate.text}" for name, rate in known.items() if rate.origin != ASSUMED)
        return f"--rates {pairs}" if pairs else ""


_CORE, _GPU = 2e9, 150e9
"""Assumed input bytes per second of a core and of a GPU."""
_CPU_START, _GPU_START = 0.3, 1.0
"""Assumed seconds to load the compiler and compile the first kernel, and to load torch."""


def assumed_rates(work: Workload) -> Rates:
    """Return the assumed rates of a machine with the plan's devices."""
    threads = computing_threads(work)
    compute = _CORE * effective_threads(threads) if threads else _GPU * len(work.schedule.budget.devices)
    start = (_CPU_START if threads else _GPU_START) if work.computes else 0.0
    return Rates(compute=Rate(compute), start=start)


def parse_rates(text: str) -> dict[str, float]:
    """Parse the value of ``--rates``, such as ``disk_read=6GB/s,h2d=25GB/s``, into bytes per second by name.

    Raises:
        UsageError: if it is invalid.
    """
    rates: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = (piece.strip() for piece in part.partition("="))
        if name not in RATES:
            raise UsageError(f"--rates {text}: unknown rate {name!r}; use {', '.join(RATES)}, such as disk_read=6GB/s")
        if name in rates:
            raise UsageError(f"--rates {text}: {name} is given more than once")
        try:
            rates[name] = parse_size(value.removesuffix("/s"))
        except UsageError as error:
            raise UsageError(f"--rates {text}: {name}: {error}") from None
    return rates


def with_given(rates: Rates, given: Mapping[str, float]) -> Rates:
    """Return the rates with the given ones replaced. With a given `disk_read`, no input counts as cached."""
    changed: dict[str, Any] = {name: Rate(value, GIVEN) for name, value in given.items()}
    if "disk_read" in given:
        changed["cached"] = 0.0
    return replace(rates, **changed)


@dataclass(frozen=True, slots=True)
class LaneEstimate:
    """The estimate of one lane.

    Args:
        name: name of the lane, as in the merge's summary; ``cores`` is the work of all threads on the CPU, and
            ``bandwidth`` the traffic between memory and cores.
        nbytes: bytes that the lane processes.
        rate: throughput of the lane.
        seconds: time that the lane would take alone.
    """

    name: str
    nbytes: int
    rate: Rate
    seconds: float


@dataclass(frozen=True, slots=True)
class Estimate:
    """The estimated time of a merge.

    Args:
        seconds: likely time in seconds.
        low: lower bound in seconds.
        high: upper bound in seconds.
        lanes: estimate of each lane.
        rates: rates that the estimate uses.
        assumptions: what the estimate assumes, in words.
    """

    seconds: float
    low: float
    high: float
    lanes: tuple[LaneEstimate, ...]
    rates: Rates
    assumptions: tuple[str, ...] = ()

    @property
    def bottleneck(self) -> LaneEstimate:
        """The slowest lane."""
        return max(self.lanes, key=lambda lane: lane.seconds)

    def to_dict(self) -> dict[str, Any]:
        """Return the estimate in the form that ``plan --json`` prints."""
        return {
            "seconds": self.seconds,
            "low": self.low,
            "high": self.high,
            "bottleneck": self.bottleneck.name,
            "lanes": {lane.name: {"bytes": lane.nbytes, "seconds": lane.seconds} for lane in self.lanes},
            "rates": {
                name: {"bytes_per_second": rate.per_second, "known": rate.origin}
                for name in RATES
                if (rate := getattr(self.rates, name))
            },
            "cached": self.rates.cached,
            "start": self.rates.start,
            "assumptions": list(self.assumptions),
        }


def estimate(work: Workload, rates: Rates) -> Estimate:
    """Estimate the time of a merge, without the planning."""
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
    lanes.append(_cores(work, rates, lanes))
    lanes.append(_lane("bandwidth", memory_traffic(work), rates.bandwidth))
    order = sorted((lane.seconds for lane in lanes), reverse=True)
    spread = [_SPREAD[lane.rate.origin] for lane in lanes]
    low = max(lane.seconds * least for lane, (least, _) in zip(lanes, spread, strict=True))
    high = max(lane.seconds * most for lane, (_, most) in zip(lanes, spread, strict=True))
    more = _fill(work, rates) + rates.start
    high += 2 * more + _UNHIDDEN * order[1]
    assumptions = tuple(_assumptions(work, rates, lanes))
    return Estimate(order[0] + more, low + rates.start / 2, high, tuple(lanes), rates, assumptions)


def _assumptions(work: Workload, rates: Rates, lanes: list[LaneEstimate]) -> Iterator[str]:
    """Say which rates are assumed, how computing scales with threads, and what the memory bandwidth limits."""
    threads = computing_threads(work)
    moves, gpus = bool(work.bytes_read), work.computes and not threads
    used = {"disk_read": moves and rates.cached < 1, "disk_write": moves, "memory": moves, "bandwidth": moves}
    used |= {"h2d": gpus, "d2h": gpus, "compute": work.computes}
    known = {name: getattr(rates, name) for name in RATES if used[name]}
    assumed = [f"{name}={rate.text}" for name, rate in known.items() if rate.origin == ASSUMED]
    if assumed:
        measure = "" if any(rate.origin == MEASURED for rate in known.values()) else ", or measure them with --time"
        yield f"assumed rates: {', '.join(assumed)}; set them with --rates{measure}"
    if work.computes and threads > 1 and rates.compute.origin in (ASSUMED, EXTRAPOLATED):
        yield (
            f"{threads} threads compute {effective_threads(threads, rates.serial):.2g} times as fast as one: "
            f"{rates.serial:.0%} of the computing holds Python's interpreter lock"
        )
    if lanes[-1].nbytes:
        traffic = data_size(lanes[-1].nbytes)
        caches = ", with workspaces in the CPU's caches" if work.computes and threads else ""
        yield f"all lanes share the memory bandwidth: {traffic} of traffic{caches}"


def _lane(name: str, nbytes: int, rate: Rate, count: int = 1) -> LaneEstimate:
    return LaneEstimate(name, nbytes, rate, nbytes / (rate.per_second * max(1, count)))


def _read(work: Workload, rates: Rates) -> LaneEstimate:
    """Estimate the read lane: bytes in the page cache, now or after an earlier pass, are read from there."""
    nbytes = work.bytes_read
    cached = cached_again(work) + rates.cached * (nbytes - work.schedule.bytes_reread)
    disk = nbytes - cached
    seconds = disk / rates.disk_read.per_second + cached / (_READERS * rates.memory.per_second)
    rate = rates.disk_read if disk > cached else rates.memory
    if seconds:
        rate = replace(rate, per_second=nbytes / seconds)
    return LaneEstimate("read", nbytes, rate, seconds)


def cached_again(work: Workload) -> int:
    """Return the re-read bytes that come from the page cache: all if the merge keeps its inputs there, else none."""
    graph, machine = work.graph, work.machine
    free = machine.ram if machine is not None and machine.ram is not None else available_ram()
    kept = sum(ref.nbytes for ref in graph.reads) < CACHED_SHARE * free
    return work.schedule.bytes_reread if kept else 0


def _cores(work: Workload, rates: Rates, lanes: list[LaneEstimate]) -> LaneEstimate:
    """Estimate the work of all threads on the machine's cores: copying, and the arithmetic of the CPU."""
    cores, threads = work.cores, computing_threads(work)
    computing = next((lane for lane in lanes if lane.name == "compute"), None)
    moved = work.bytes_read + work.bytes_written
    zeroed = min(moved, work.schedule.ram_slots * work.schedule.slot_bytes)  # by the kernel, at the first access
    seconds = (moved + zeroed) / rates.memory.per_second
    origin = rates.memory.origin
    if computing is not None and threads:
        busy = computing.seconds * threads
        origin = computing.rate.origin if busy > seconds else origin
        seconds += busy
    per_second = moved * cores / seconds if seconds else rates.memory.per_second
    return LaneEstimate("cores", moved, Rate(per_second, origin), seconds / cores)


def _fill(work: Workload, rates: Rates) -> float:
    """Return the seconds until the last lane starts: one chunk of every source passes through all lanes."""
    schedule, graph = work.schedule, work.graph
    first = graph.node_sources[schedule.steps[0].node] if schedule.steps else ()
    nbytes = sum(min(schedule.slot_bytes, graph.value_nbytes(value)) for value in dict.fromkeys(first))
    return nbytes * (1 / rates.disk_read.per_second + 1 / rates.compute.per_second + 1 / rates.disk_write.per_second)
