"""The schedule: pictures of small graphs with bounds in bytes, and laws over random ones."""

from __future__ import annotations

import inspect
import sys
from collections import Counter
from itertools import pairwise
from types import FrameType
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mergeloom.engine.schedule.budget import Budget, DeviceBudget
from mergeloom.engine.schedule.order import orders
from mergeloom.engine.schedule.requirements import PAGE
from mergeloom.engine.schedule.schedule import SLOT_BYTES, WORTH, Schedule, make_schedule
from mergeloom.engine.schedule.simulate import Simulation
from mergeloom.engine.schedule.tiling import length, widest
from mergeloom.errors import BudgetError
from tests.examples import examples
from tests.support.blueprints import CPU, ELEMENTS, SLOT, Blueprint, blueprints, build, minimum, with_slots
from tests.support.graphs import World


def test_single_pass_streams_through_three_slots() -> None:
    #  a(4 chunks) ─┐
    #               ├─ sum ── out      one chunk of a, b and out at a time: 3 slots, whatever the size
    #  b(4 chunks) ─┘
    world = World()
    a, b = world.source(4 * ELEMENTS), world.source(4 * ELEMENTS)
    world.node("sum", [a, b])
    schedule = with_slots(world, 0)
    assert schedule.serial_ram == 3 * SLOT
    assert schedule.bytes_read == 8 * SLOT
    assert schedule.bytes_reread == 0


def test_copy_needs_one_slot() -> None:
    #  a(4 chunks) ── copy ── out, out      read once into one slot, written twice from it
    world = World()
    world.node("copy", [world.source(4 * ELEMENTS)], outputs=2)
    schedule = with_slots(world, 0)
    assert schedule.serial_ram == SLOT
    assert schedule.bytes_read == 4 * SLOT
    assert schedule.bytes_written == 8 * SLOT


def test_passes_keep_their_inputs_where_there_is_room() -> None:
    #  a(3 chunks) ── above: 2 reductions and a combine      3 slots for a, 1 for out, none read twice
    world = World()
    world.node("above", [world.source(3 * ELEMENTS)])
    assert with_slots(world, 8).bytes_reread == 0
    assert with_slots(world, 8).serial_ram == 4 * SLOT


def test_passes_read_again_what_does_not_fit() -> None:
    #  a(4 chunks) ── above, 3 passes, 2 slots: 1 for the chunk at work, 1 for the output: everything is read 3 times
    world = World()
    world.node("above", [world.source(4 * ELEMENTS)])
    assert with_slots(world, 0).bytes_read == 3 * 4 * SLOT
    #  with 1 slot more, the first chunk stays for the second and third pass
    assert with_slots(world, 1).bytes_read == 4 * SLOT + 2 * 3 * SLOT
    #  with 3 more, three of them stay
    assert with_slots(world, 3).bytes_read == 4 * SLOT + 2 * 1 * SLOT


def test_chain_keeps_only_the_neighbour() -> None:
    #  t0  t1  t2  t3  t4      each t is one chunk; out_i = t_i + t_i+1
    #   └┬──┴┬──┴┬──┴┬──┘
    #   o0  o1  o2  o3         t_i+1 stays for o_i+1: 4 slots (two at work, one kept, one output), each t read once
    world = World()
    sources = [world.source(ELEMENTS) for _ in range(5)]
    for first, second in pairwise(sources):
        world.node("sum", [first, second])
    roomy = with_slots(world, 4)
    assert roomy.bytes_reread == 0
    assert roomy.serial_ram <= 4 * SLOT
    assert with_slots(world, 0).bytes_reread == 3 * SLOT  # in the least budget nothing can stay


@pytest.mark.parametrize("vram", [None, 24 << 30])
def test_planning_a_chain_takes_as_many_operations_for_each_node(vram: int | None) -> None:
    #  out_i = t_i + t_i+1: a step looks at its own sources, and not at all that are cached or at all steps before it
    def lines(nodes: int) -> int:
        """How many lines the simulations run."""
        world = World()
        sources = [world.source(16) for _ in range(nodes + 1)]
        for first, second in pairwise(sources):
            world.node("sum", [first, second])
        counts: Counter[str] = Counter()

        def trace(frame: FrameType, event: str, argument: object) -> Any:
            counts[frame.f_code.co_filename] += event == "line"
            return trace

        budget = Budget(1 << 40, 0, (DeviceBudget("test", vram, 1),))
        before = sys.gettrace()
        sys.settrace(trace)
        try:
            make_schedule(world.graph, budget)
        finally:
            sys.settrace(before)
        return counts[inspect.getfile(Simulation)]

    assert 0 < lines(320) < 4.5 * lines(80)


def test_consumers_side_by_side_beat_the_disk_order(monkeypatch: pytest.MonkeyPatch) -> None:
    #  three tensors are each needed by two nodes; as they lie on the disk, the first nodes of all three come before the
    #  second ones, and twelve chunks would have to be kept instead of four
    world = World()
    sources = [world.source(4 * ELEMENTS) for _ in range(9)]  # in three files by turns
    for first in (0, 3, 6):
        world.node("sum", [sources[first], sources[first + 1]])
        world.node("sum", [sources[first + 2], sources[first]])
    found = [with_slots(world, extra).bytes_reread // SLOT for extra in range(5)]
    assert found[-1] == 0
    monkeypatch.setattr("mergeloom.engine.schedule.candidate.orders", lambda graph: [next(orders(graph))])
    by_place = [with_slots(world, extra).bytes_reread // SLOT for extra in range(5)]
    assert sum(by_place) > sum(found)


def test_smaller_slots_are_taken_where_they_save_reading() -> None:
    #  a, b (100 MiB each) ── above, three passes: what is on its way to be computed can't be kept for the next pass
    world = World()
    world.node("above", [world.source(25 << 20), world.source(25 << 20)])
    least = make_schedule(world.graph, Budget(1 << 40, 0, CPU)).minimum_ram
    for extra, slot in ((100, SLOT_BYTES // 2), (200, SLOT_BYTES // 4), (220, SLOT_BYTES)):
        budget = Budget(least + (extra << 20), 0, CPU)
        schedule, large = make_schedule(world.graph, budget), make_schedule(world.graph, budget, slot_bytes=SLOT_BYTES)
        assert schedule.slot_bytes == slot
        if slot == SLOT_BYTES:
            assert schedule.bytes_read == large.bytes_read
        else:
            assert schedule.bytes_read < WORTH * large.bytes_read


def test_what_is_read_ahead_is_bounded() -> None:
    #  a ─┐
    #     ├─ sum, 100 chunks each: 3 slots at a time, and (2 + 1 for each thread) times as many ahead, in any RAM
    #  b ─┘
    world = World()
    world.node("sum", [world.source(100 * ELEMENTS), world.source(100 * ELEMENTS)])
    for threads in (1, 3):
        schedule = make_schedule(
            world.graph, Budget(1 << 40, 12345, (DeviceBudget("cpu", None, threads),)), slot_bytes=SLOT
        )
        assert schedule.ram_slots == 3 + (2 + threads) * 3
        allocated = -(-world.graph.footprints[0].allocated.at(1) // PAGE) * PAGE
        fixed = 12345 + threads * (schedule.workspace[0] + allocated)  # a sum has one pass: nothing is reduced
        assert schedule.peak_ram == fixed + schedule.ram_slots * SLOT
    device = (DeviceBudget("test", 1 << 40, 3),)
    schedule = make_schedule(world.graph, Budget(1 << 40, 12345, device), slot_bytes=SLOT)
    assert schedule.vram_slots == (3 + 10 * 3,)
    assert schedule.peak_vram == 33 * SLOT + 3 * schedule.workspace[0]
    assert schedule.peak_ram == 12345 + schedule.ram_slots * SLOT  # what is computed on is the device's
    #  with three passes, all 40 chunks of both are kept, too
    world = World()
    world.node("above", [world.source(20 * ELEMENTS), world.source(20 * ELEMENTS)])
    schedule = make_schedule(world.graph, Budget(1 << 40, 0, device), slot_bytes=SLOT)
    assert schedule.vram_slots == (60,)  # of which no more are ever taken


def test_equal_nodes_are_one() -> None:
    world = World()
    a = world.source(ELEMENTS)
    first = world.node("copy", [a])
    assert world.node("copy", [a]) == first
    assert with_slots(world, 2).bytes_read == SLOT
    assert with_slots(world, 2).bytes_written == 2 * SLOT


def test_empty_tensors_take_nothing() -> None:
    world = World()
    world.node("sum", [world.source(0)])
    world.node("above", [world.source(0)])
    schedule = with_slots(world, 0)
    assert schedule.bytes_read == schedule.bytes_written == 0


def test_too_small_a_budget_names_the_smallest_and_the_tensor() -> None:
    world = World()
    world.node("sum", [world.source(ELEMENTS), world.source(ELEMENTS)])
    least = minimum(world)
    make_schedule(world.graph, Budget(least, 0, CPU))
    with pytest.raises(BudgetError, match=r"smallest budget that works is .* required by out0"):
        make_schedule(world.graph, Budget(least - 1, 0, CPU))


def test_more_ram_does_not_read_more() -> None:
    #  a, b (100 MiB each) ── above, three passes: what doesn't stay is read three times
    world = World()
    a, b = world.source(25 << 20), world.source(25 << 20)
    world.node("above", [a, b])
    world.node("above", [a, b, world.source(25 << 20)])
    least = make_schedule(world.graph, Budget(1 << 40, 0, CPU)).minimum_ram
    budgets = [least + extra for extra in range(12 << 20, 420 << 20, 3 << 20)]
    reads = [make_schedule(world.graph, Budget(budget, 0, CPU)).bytes_read for budget in budgets]
    for number, found in enumerate(reads):  # a larger slot may cost a little of what it saves in pieces
        assert found * WORTH <= min(reads[: number + 1])
    assert reads[0] > 2 * reads[-1]
    assert reads[-1] == 300 << 20


def test_device_memory_keeps_inputs_before_ram_does() -> None:
    #  a(3 chunks) ── above on a device: uploaded once where it fits there, a chunk at a time in each pass where it fits
    #  RAM only, and read again where it fits neither
    world = World()
    world.node("above", [world.source(3 * ELEMENTS)])

    def on_device(ram: int, vram: int) -> Schedule:
        devices = (DeviceBudget("test", 1 << 40, 1),)
        least = make_schedule(world.graph, Budget(1 << 40, 0, devices), slot_bytes=SLOT)
        devices = (DeviceBudget("test", least.minimum_vram + vram * SLOT, 1),)
        return make_schedule(world.graph, Budget(least.minimum_ram + ram * SLOT, 0, devices), slot_bytes=SLOT)

    roomy = on_device(8, 8)
    assert (roomy.bytes_reread, roomy.uploaded) == (0, 3 * SLOT)
    narrow = on_device(8, 0)
    assert (narrow.bytes_reread, narrow.uploaded) == (0, 9 * SLOT)
    poor = on_device(0, 0)
    assert (poor.bytes_reread, poor.uploaded) == (6 * SLOT, 9 * SLOT)


@settings(max_examples=examples(150), deadline=None, suppress_health_check=list(HealthCheck))
@given(blueprints(), st.sampled_from([0, 1, 2, 5, 20, 1000]))
def test_simulation_keeps_every_budget(blueprint: Blueprint, extra: int) -> None:
    world = build(blueprint)
    schedule = with_slots(world, extra)
    graph = world.graph
    assert schedule.peak_ram <= schedule.budget.ram
    assert schedule.serial_ram <= schedule.ram_slots * schedule.slot_bytes
    needed = {read for sources in graph.node_sources for read in sources}
    unique = sum(graph.reads[read].nbytes for read in needed)
    assert schedule.bytes_read >= unique
    assert schedule.bytes_written == sum(graph.nbytes(output.node) for output in graph.outputs)
    done = [step.node for step in schedule.steps if step.index == graph.operation(step.node).passes - 1]
    assert sorted(done) == list(graph.nodes())
    for node in graph:
        assert schedule.chunk_elements[node] * widest(graph, node) <= schedule.slot_bytes
        assert length(graph, node) <= schedule.chunks(graph, node) * schedule.chunk_elements[node]


@settings(max_examples=examples(100), deadline=None, suppress_health_check=list(HealthCheck))
@given(blueprints())
def test_with_room_each_source_is_read_once_for_each_chunk_length(blueprint: Blueprint) -> None:
    world = build(blueprint)
    schedule = with_slots(world, 1000)
    graph = world.graph
    cuts = {(read, schedule.chunk_elements[node]) for node in graph for read in graph.node_sources[node]}
    assert schedule.bytes_read == sum(graph.reads[read].nbytes for read, _ in cuts)
    assert not any(step.drop for step in schedule.steps)
