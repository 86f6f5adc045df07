"""Runs a graph to its end: schedules it, and again for less memory where a GPU's neighbour has taken some."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from ..graph.graph import MergeGraph
from ..schedule.schedule import DeviceBudget, Schedule, make_schedule, shrink
from .devices.base import Device, OutOfDeviceMemory
from .executor import Executor
from .tasks import Measured, Progress, Sink, Source

SPARE = 0.9
"""The share of a GPU's free memory that is tried where there is less than was planned."""


def run_graph(
    graph: MergeGraph,
    schedule: Schedule,
    open_devices: Callable[[Sequence[DeviceBudget]], list[Device]],
    source: Source,
    sink: Sink,
    *,
    done: Mapping[int, int] | None = None,
    allow_nonfinite: bool = False,
    notify: Callable[[Progress], None] | None = None,
) -> Measured:
    """Perform a schedule.

    Args:
        graph: what is made.
        schedule: how.
        open_devices: the devices of a budget.
        source: where tensor bytes come from.
        sink: where they go.
        done: nodes that need not be made, as the schedule was made with.
        allow_nonfinite: whether a NaN or an infinity in an input is let through.
        notify: called now and then with how far it is.

    Raises:
        MergeloomError: what went wrong in any lane.
    """
    reduced_vram: dict[str, int] = {}
    while True:
        devices = open_devices(schedule.budget.devices)
        executor = Executor(graph, schedule, devices, source, sink, allow_nonfinite=allow_nonfinite)
        try:
            measured = executor.run(notify)
            measured.reduced_vram = reduced_vram
            return measured
        except OutOfDeviceMemory as error:
            held = next(device.vram or 0 for device in schedule.budget.devices if device.name == error.name)
            vram = int(min(error.free_slots, held) * SPARE)  # what is free may be more than what was allowed
            if vram < schedule.minimum_vram:
                raise
            reduced_vram[error.name] = vram
            schedule = make_schedule(graph, shrink(schedule.budget, error.name, vram), done=done)
