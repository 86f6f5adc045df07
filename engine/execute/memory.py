"""Opens the memory of a run: the arena in RAM, and the arenas and workspaces of the devices."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from types import TracebackType

from ..schedule.schedule import Schedule
from .arena import HostArena
from .devices.base import Device
from .ledger import RAM, Ledger


@contextlib.contextmanager
def open_memory(
    schedule: Schedule, devices: Sequence[Device], ledger: Ledger, *, computes: bool
) -> Iterator[HostArena]:
    """Reserve and allocate the arena, and open the devices; close and release everything at the end of the block.

    Args:
        schedule: schedule of the run.
        devices: devices of the schedule's budget, in its order.
        ledger: ledger in which the buffers are reserved.
        computes: whether the run computes anything; otherwise, the devices stay closed.

    Raises:
        BudgetError: if the ledger refuses a buffer.
        MemoryError: if the system refuses one.
        OutOfDeviceMemory: if a device has too little free memory.
    """
    with contextlib.ExitStack() as opened:
        opened.enter_context(ledger.allow(schedule.buffer_ram))
        opened.enter_context(ledger.reserve("arena", schedule.ram_slots * schedule.slot_bytes))
        if schedule.partials:
            opened.enter_context(ledger.reserve("partial results", schedule.partials))
        arena = HostArena(schedule.ram_slots, schedule.slot_bytes)
        opened.callback(arena.close)
        for number in range(len(devices) if computes else 0):
            _open_device(opened, schedule, devices[number], number, ledger, arena)
        yield arena


def _open_device(
    opened: contextlib.ExitStack, schedule: Schedule, device: Device, number: int, ledger: Ledger, arena: HostArena
) -> None:
    """Reserve and allocate a device's memory; `opened` closes the device and releases the memory."""
    memory, slots, workspace = RAM, schedule.vram_slots[number], schedule.workspace[number]
    if device.separate:
        memory = device.name
        opened.enter_context(ledger.allow(schedule.buffer_vram(number), memory))
        opened.enter_context(ledger.reserve("arena", slots * schedule.slot_bytes, memory))
    opened.enter_context(ledger.reserve("workspaces", device.threads * workspace, memory))
    opened.push(functools.partial(_close, device))  # a device whose `open` fails is closed, too
    device.open(slots, schedule.slot_bytes, workspace, arena.memory)


def _close(
    device: Device, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
) -> None:
    """Close a device. If it fails again after an earlier error, the earlier error is raised."""
    try:
        device.close()
    except RuntimeError:
        if error is None:
            raise
