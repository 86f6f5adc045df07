"""What must hold of every graph, budget and device: the plan's counts are those of the run, and its bytes are right."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from mergeloom.engine.execute.devices.base import Device
from mergeloom.engine.execute.devices.cpu import CpuDevice
from mergeloom.engine.execute.executor import Executor
from mergeloom.engine.execute.measurements import Measured
from mergeloom.engine.schedule.budget import Budget, DeviceBudget
from mergeloom.engine.schedule.candidate import Problem
from mergeloom.engine.schedule.schedule import Schedule, make_schedule
from mergeloom.engine.schedule.traffic import bytes_of_reads, downloaded
from mergeloom.errors import BudgetError
from mergeloom.io.sizes import parse_size
from tests.support.blueprints import CPU, SLOT, check_ledger
from tests.support.devices import CountingDevice
from tests.support.tasks.world import TaskWorld

AMPLE = 1 << 40


def smallest_slot(world: TaskWorld, devices: Sequence[DeviceBudget], done: Mapping[int, int] | None = None) -> int:
    """The slot size of the tests, or the smallest one that every task fits that is left."""
    needs = Problem.of(world.graph, Budget(AMPLE, 0, tuple(devices)), done or {}).needs
    return max(SLOT, *(need.slot for need in needs))


def scheduled(
    world: TaskWorld,
    ram: int,
    vram: int | None = None,
    count: int = 1,
    done: Mapping[int, int] | None = None,
) -> Schedule:
    """The schedule with some more slots than the least, or with the RAM that an error names.

    Args:
        world: graph to schedule.
        ram: number of slots in RAM beyond the least.
        vram: number of slots on each device beyond the least; None to compute in RAM.
        count: number of devices with their own memory.
        done: bytes that an earlier run wrote, by node.
    """
    devices = CPU if vram is None else tuple(DeviceBudget(f"test:{n}", AMPLE, 2) for n in range(count))
    slot = smallest_slot(world, devices, done)
    ample = make_schedule(world.graph, Budget(AMPLE, 0, devices), slot_bytes=slot, done=done)
    if vram is not None:
        devices = tuple(DeviceBudget(each.name, ample.minimum_vram + vram * slot, 2) for each in devices)
    budget = Budget(ample.minimum_ram + ram * slot, 0, devices)
    try:
        return make_schedule(world.graph, budget, slot_bytes=slot, done=done)
    except BudgetError as error:
        assert world.graph.users(), "only tasks that use tasks take more than the least"
        found = re.search(r"use --max-ram (\S+) or more", str(error))
        assert found is not None
        named = parse_size(found[1])
        assert named > budget.ram
        return make_schedule(world.graph, Budget(named, 0, devices), slot_bytes=slot, done=done)


def devices_of(schedule: Schedule) -> list[Device]:
    """The devices of a schedule."""
    return [
        CpuDevice(each.threads) if each.vram is None else CountingDevice(each.name, each.vram, each.threads)
        for each in schedule.budget.devices
    ]


def run(world: TaskWorld, schedule: Schedule, *, serial: bool = False, resumed: bool = False) -> Measured:
    """Execute a schedule, and check that it did what was planned, and wrote what was expected.

    Args:
        world: graph that nothing has read yet.
        schedule: its schedule.
        serial: whether the chunks run one after another.
        resumed: whether an earlier run has written some of the output.
    """
    graph, devices = world.graph, devices_of(schedule)
    executor = Executor(graph, schedule, devices, world, world, serial=serial)
    measured = executor.run()
    world.check(resumed=resumed)
    planned = list(bytes_of_reads(graph, schedule))
    assert world.bytes_by_read() == planned
    assert measured.bytes_read == schedule.bytes_read == sum(planned)
    assert measured.bytes_written == schedule.bytes_written
    separate = [device for device in devices if isinstance(device, CountingDevice)]
    assert sum(device.uploaded for device in separate) == schedule.uploaded
    assert sum(device.downloaded for device in separate) == downloaded(graph, schedule)
    assert schedule.serial_ram <= schedule.ram_slots * schedule.slot_bytes
    assert measured.ram_peak <= schedule.ram_slots * schedule.slot_bytes
    if serial:
        assert measured.ram_peak == schedule.serial_ram
    assert schedule.peak_ram <= schedule.budget.ram
    assert measured.vram_peak <= schedule.peak_vram
    assert executor.slots.all_free
    check_ledger(executor, schedule, devices)
    return measured


def resume(world: TaskWorld, complete: TaskWorld, ram: int, vram: int | None, written: Mapping[int, float]) -> None:
    """Check the run that goes on where an earlier one has ended: it writes the rest, and no other byte.

    Args:
        world: graph that nothing has read yet.
        complete: a world with an equal graph, all of whose output is written.
        ram: see `scheduled`.
        vram: see `scheduled`.
        written: for each node that the earlier run has started, the share of its bytes that it wrote.
    """
    graph = world.graph
    done = {node: int(share * graph.nbytes(node)) for node, share in written.items()}
    for node, nbytes in done.items():
        world.written[node] = bytearray(complete.written.get(node, b"")[:nbytes].ljust(graph.nbytes(node), b"\xee"))
    run(world, scheduled(world, ram, vram, done=done), resumed=True)
    for node in done:  # tensors that are computed together are written together
        if all(done.get(other) == graph.nbytes(other) for other in graph.results_with(node)):
            assert node not in world.counts, "a complete tensor is written again"
