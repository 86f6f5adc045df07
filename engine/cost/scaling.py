"""How computing scales with threads, and the bytes that cross the memory bus: what keeps more cores from helping."""

from __future__ import annotations

from ..graph.graph import Kind
from ..schedule.traffic import downloaded
from .workload import Workload

SERIAL_SHARE = 0.2
"""Assumed share of the computing during which a thread holds Python's interpreter lock, so no other one computes. Two
threads of `ties` and `dare_ties` reach 1.5 times the throughput of one, methods with less arithmetic more."""
_LEAST_SERIAL_SHARE = 0.02
"""Smallest share that a measurement can show: two threads that are twice as fast as one don't prove that 64 scale."""
COPY_TRAFFIC = 2
"""Bytes on the memory bus for each byte that is copied between the page cache and a buffer: one read, one written."""


def effective_threads(threads: int, serial: float = SERIAL_SHARE) -> float:
    """Return how many times as fast as one thread several threads compute (Amdahl's law).

    Args:
        threads: number of threads, at least 1.
        serial: share of the work that only one thread at a time can do, from 0 to 1.
    """
    return threads / (1 + serial * (threads - 1))


def serial_share(threads: int, speedup: float) -> float:
    """Return the serial share at which several threads are `speedup` times as fast as one: `effective_threads` solved.

    Args:
        threads: number of threads, at least 2.
        speedup: their throughput divided by that of one thread.
    """
    return min(1.0, max(_LEAST_SERIAL_SHARE, (threads / speedup - 1) / (threads - 1)))


def computing_threads(work: Workload) -> int:
    """Return the number of CPU threads that can compute at the same time; 0 if only GPUs compute."""
    threads = sum(device.threads for device in work.schedule.budget.devices if device.vram is None)
    return min(threads, work.cores)


def computed_bytes(work: Workload) -> int:
    """Return the input bytes that are computed on, each pass counted."""
    graph = work.graph
    total = 0
    for node in graph:
        operation = graph.operation(node)
        if operation.kind is Kind.MERGE:
            total += operation.passes * sum(map(graph.value_nbytes, graph.node_sources[node]))
    return total


def memory_traffic(work: Workload) -> int:
    """Return the bytes that cross the memory bus.

    Copies cross it twice. On the CPU, each pass reads its inputs and the last one writes the output; workspaces stay in
    the caches. A GPU's copies cross it once.
    """
    graph, schedule = work.graph, work.schedule
    total = COPY_TRAFFIC * (work.bytes_read + work.bytes_written)
    if any(device.vram is not None for device in schedule.budget.devices):
        return total + schedule.uploaded + downloaded(graph, schedule)
    outputs = sum(graph.nbytes(node) for node in graph if graph.operation(node).kind is Kind.MERGE)
    return total + computed_bytes(work) + outputs
