"""Executes a graph, and plans it again for less VRAM if another process has taken some."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from ..graph.graph import MergeGraph
from ..schedule.budget import DeviceBudget, shrink
from ..schedule.schedule import Schedule, make_schedule
from .devices.base import Device, OutOfDeviceMemory
from .executor import Executor
from .ledger import Ledger
from .tasks import Measured, Progress, Sink, Source

SPARE = 0.9
"""Share of a GPU's free memory that is used if less is free than planned."""


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
    ledger: Ledger | None = None,
    resident: Callable[[], int] | None = None,
) -> Measured:
    """Execute a schedule.

    Args:
        graph: graph to execute.
        schedule: schedule of the graph.
        open_devices: function that returns the devices of a budget.
        source: reader of tensor bytes.
        sink: writer of output bytes.
        done: bytes that an earlier run wrote, by node; the same as the schedule was made with.
        allow_nonfinite: whether a NaN or an infinity is accepted in an input of a computed tensor.
        notify: function that receives the progress about ten times a second.
        ledger: ledger in which the buffers are reserved; one of its own if None.
        resident: function that measures the process's resident memory in bytes, see `SlotAllocator`.

    Raises:
        MergeloomError: the first error of any lane.
    """
    reduced_vram: dict[str, int] = {}
    while True:
        devices = open_devices(schedule.budget.devices)
        executor = Executor(
            graph, schedule, devices, source, sink, ledger=ledger, allow_nonfinite=allow_nonfinite, resident=resident
        )
        try:
            measured = executor.run(notify)
            measured.reduced_vram = reduced_vram
            return measured
        except OutOfDeviceMemory as error:
            limit = next(device.vram or 0 for device in schedule.budget.devices if device.name == error.name)
            vram = int(min(error.free, limit) * SPARE)  # more may be free by now than the budget allows
            if vram < schedule.minimum_vram:
                raise
            reduced_vram[error.name] = vram
            schedule = make_schedule(graph, shrink(schedule.budget, error.name, vram), done=done)
