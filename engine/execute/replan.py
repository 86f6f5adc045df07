"""Executes a graph, and plans it again for less VRAM if another process has taken some."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from ...io.counters import IoCounters
from ..graph.graph import MergeGraph
from ..schedule.budget import DeviceBudget, shrink
from ..schedule.schedule import Schedule, make_schedule
from .devices.base import Device, OutOfDeviceMemory
from .executor import Executor
from .ledger import Ledger
from .measurements import Measured
from .survival import SurvivalSums
from .tasks import Sink, Source

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
    notify: Callable[[], None] | None = None,
    counters: IoCounters | None = None,
    ledger: Ledger | None = None,
    resident: Callable[[], int] | None = None,
    survival: SurvivalSums | None = None,
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
        notify: function that is called about ten times a second; if it raises, the run ends.
        counters: counters of the bytes read and written; new ones if None.
        ledger: ledger in which the buffers are reserved; one of its own if None.
        resident: function that measures the process's resident memory in bytes, see `SlotAllocator`.
        survival: receives the by-products of kernels; None to drop them.

    Raises:
        MergeloomError: the first error of any lane.
    """
    reduced_vram: dict[str, int] = {}
    while True:
        devices = open_devices(schedule.budget.devices)
        executor = Executor(
            graph,
            schedule,
            devices,
            source,
            sink,
            counters=counters,
            ledger=ledger,
            allow_nonfinite=allow_nonfinite,
            resident=resident,
            survival=survival,
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
