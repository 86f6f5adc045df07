"""Tasks that use tasks: one length of chunks, outputs that stay until their last use, and runs that go on."""

from __future__ import annotations

import pytest

from mergeloom.engine.graph.fuse import fuse
from mergeloom.engine.schedule.budget import Budget
from mergeloom.engine.schedule.schedule import make_schedule
from mergeloom.engine.schedule.step_list import CachedRange
from mergeloom.engine.schedule.tiling import chunk_elements
from mergeloom.errors import BudgetError
from mergeloom.methods.kernel.access import ALIGNED, BlockRows, GatheredRows
from tests.support.blueprints import CPU, ELEMENTS, SLOT
from tests.support.tasks.laws import resume, run, scheduled, smallest_slot
from tests.support.tasks.world import Operand, TaskWorld
from tests.support.waiting import no_hang


def chain(*kinds: str, shape: tuple[int, ...] = (4 * ELEMENTS,), dtypes: str = "F32") -> TaskWorld:
    """A world with tasks of some kinds, each of which uses the one before it, and an output of the last one."""
    world = TaskWorld()
    operand = Operand((world.source(shape),))
    for number, kind in enumerate(kinds):
        node = world.task(kind, [operand], shape, dtypes, outputs=int(number == len(kinds) - 1))
        operand = Operand((~node,))
    world.measure()
    return world


@pytest.mark.parametrize("kinds", [("sum 48", "sum 9999"), ("sum 9999", "vote", "sum 48")])
def test_tasks_with_different_alignments_have_chunks_of_one_length(kinds: tuple[str, ...]) -> None:
    world = chain(*kinds)
    slot = smallest_slot(world, CPU)
    (length,) = set(chunk_elements(world.graph, slot))
    assert slot == 4 * SLOT  # one chunk, although the least common multiple is longer
    assert length == 4 * ELEMENTS  # no slot of 64 KiB holds a multiple of both
    with no_hang():
        run(world, scheduled(world, 3), serial=True)


def test_a_source_that_is_staged_by_rows_shortens_the_chunks_of_all_linked_tasks() -> None:
    #  scales (one for each element) ─ a ─ b: a needs as many bytes of scales as of its own output
    world, shape = TaskWorld(), (40, 1000)
    scales = Operand((world.source(shape, "F64"),), (BlockRows(1, 1),))
    first = world.task("sum", [scales], shape, "F32", outputs=0)
    world.task("vote", [Operand((~first,))], shape, "F32")
    world.measure()
    assert len(set(chunk_elements(world.graph, SLOT))) == 1
    with no_hang():
        run(world, scheduled(world, 2))


def test_a_copy_of_a_shared_read_leaves_linked_tasks_linked() -> None:
    #  a ─ copy; a ─ sum (F32) ─ sum (F64): the copy counts bytes, so the cluster has no common length of chunks
    world, shape = TaskWorld(), (5 * ELEMENTS,)
    a = Operand((world.source(shape),))
    world.task("copy", [a], shape)
    first = world.task("sum", [a], shape, "F32", outputs=0)
    last = world.task("sum", [Operand((~first,)), Operand((world.source(shape, "F64"),))], shape, "F64")
    world.measure()
    chunks = chunk_elements(world.graph, SLOT)
    assert chunks[first] == chunks[last] == ELEMENTS // 2
    with no_hang():
        run(world, scheduled(world, 3))


def test_rows_of_zeros_are_uploaded_but_not_read() -> None:
    world, shape = TaskWorld(), (3, ELEMENTS)
    part = Operand((world.source((2, ELEMENTS)),), (GatheredRows.of((-1, 1, -1)),))
    world.task("sum", [part], shape, "F32")
    world.measure()
    schedule = scheduled(world, 0, 0)
    assert (schedule.bytes_read, schedule.uploaded) == (SLOT, 3 * SLOT)
    run(world, schedule)


def test_an_output_is_written_although_the_task_that_uses_it_is_complete() -> None:
    world, shape = TaskWorld(), (2 * ELEMENTS,)
    first = world.task("sum", [Operand((world.source(shape),))], shape, "F32")
    last = world.task("vote", [Operand((~first,))], shape, "F32")
    world.measure()
    complete, rest = world.fresh(), world.fresh()
    run(complete, scheduled(complete, 3))
    with no_hang():
        resume(rest, complete, 0, None, {last: 1.0})
    assert first in rest.counts


def test_an_output_that_only_complete_tasks_use_does_not_stay() -> None:
    #  first ─ last, which is complete: 12 chunks of first go through the few slots that one task takes
    world, shape = TaskWorld(), (12 * ELEMENTS,)
    first = world.task("sum", [Operand((world.source(shape),))], shape, "F32")
    last = world.task("sum", [Operand((~first,))], shape, "F32")
    world.measure()
    complete, rest = world.fresh(), world.fresh()
    run(complete, scheduled(complete, 20))
    with no_hang():
        resume(rest, complete, 0, None, {last: 1.0})


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_complete_output_is_computed_again_for_a_task_that_uses_it_and_not_written(share: float) -> None:
    world, shape = TaskWorld(), (3 * ELEMENTS,)
    source = Operand((world.source(shape),))
    first = world.task("sum", [source], shape, "F32")
    middle = world.task("sum", [Operand((~first,))], shape, "F32")
    last = world.task("vote", [Operand((~middle,))], shape, "F32")
    world.measure()
    complete, rest = world.fresh(), world.fresh()
    run(complete, scheduled(complete, 20))
    with no_hang():
        resume(rest, complete, 20, None, {first: 1.0, middle: 1.0, last: share})
    assert rest.counts.keys() == {last}


def test_an_intermediate_is_computed_again_for_a_complete_output_that_is() -> None:
    world, shape = TaskWorld(), (3 * ELEMENTS,)
    inner = world.task("sum", [Operand((world.source(shape),))], shape, "F32", outputs=0)
    middle = world.task("sum", [Operand((~inner,))], shape, "F32")
    last = world.task("sum", [Operand((~middle,))], shape, "F32")
    world.measure()
    complete, rest = world.fresh(), world.fresh()
    run(complete, scheduled(complete, 20))
    with no_hang():
        resume(rest, complete, 20, None, {middle: 1.0, last: 0.3})
    assert rest.counts.keys() == {last}


def test_a_step_drops_its_own_cached_chunks_for_its_output() -> None:
    #  a ─┬─ sum ── out0           4 chunks of a fit the cache after the first task, but the second one, whose output
    #     └─ vote ── sum ── out1   stays, needs their slots
    world, shape = TaskWorld(), (4 * ELEMENTS,)
    a = Operand((world.source(shape),))
    world.task("sum", [a], shape, "F32")
    kept = world.task("vote", [a], shape, "F32", outputs=0)
    world.task("sum", [Operand((~kept,)), Operand((world.source(shape),))], shape, "F32")
    world.measure()
    smallest = None
    for slots in range(1, 16):
        budget = Budget(make_schedule(world.graph, Budget(1 << 40, 0, CPU)).fixed_ram + slots * SLOT, 0, CPU)
        try:
            schedule = make_schedule(world.graph, budget, slot_bytes=SLOT)
        except BudgetError:
            assert smallest is None, "more RAM is refused although less was enough"
            continue
        smallest = smallest or slots
        run(world.fresh(), schedule, serial=True)
    assert smallest == 4 + 1 + 1  # the output that is kept, and a chunk of the other source and of the last output


def test_an_intermediate_is_never_dropped_for_lack_of_room() -> None:
    #  kept ─┬───────────────────────────── last      kept is needed furthest away, while the passes of the others
    #        └─ first ─ second(b) ─ third(b) ─┘       would fill RAM with b
    world, shape = TaskWorld(), (4 * ELEMENTS,)
    a, b = (Operand((world.source(shape),)) for _ in range(2))
    kept = Operand((~world.task("sum", [a], shape, "F32", outputs=0),))
    before = kept
    for _ in range(3):
        before = Operand((~world.task("vote", [before, b], shape, "F32", outputs=0),))
    world.task("sum", [kept, before], shape, "F32")
    world.measure()
    for extra in range(12):
        schedule = scheduled(world, extra)
        assert all(source.read >= 0 for step in schedule.steps for source, _ in step.drop)
        run(world.fresh(), schedule, serial=extra % 2 == 0)


def test_one_read_through_two_accesses_is_cached_twice() -> None:
    #  rows 0 and 1 and rows 1 and 0 of a part: chunks of one length of one read, with different bytes
    world, shape = TaskWorld(), (2, ELEMENTS)
    part = world.source(shape)
    straight, turned = (Operand((part,), (GatheredRows.of(index),)) for index in ((0, 1), (1, 0)))
    for operands in ([straight], [turned], [straight, turned, Operand((part,), (ALIGNED,))]):
        world.task("vote", operands, shape, "F32")
    world.measure()
    schedule = scheduled(world, 20)
    assert schedule.bytes_read == 3 * 2 * SLOT
    run(world, schedule)


def test_a_source_that_is_staged_once_is_read_once_and_kept_for_the_next_task() -> None:
    world, shape = TaskWorld(), (64, 4096)
    scales = world.source((64, 128))
    for seed in range(2):
        codes = Operand((world.source(shape, seed=seed),))
        world.task("vote", [codes, Operand((scales,), (BlockRows(1, 32),))], shape, "F32")
    world.measure()
    schedule = scheduled(world, 200)
    assert schedule.bytes_read == sum(ref.nbytes for ref in world.graph.reads)
    assert {step.keep[1] for step in schedule.steps[:-1]} == {CachedRange(0, 0, 1)}
    run(world, schedule, serial=True)


def test_fused_and_unfused_graphs_have_equal_outputs_in_both_forms() -> None:
    world = chain("sum", "vote", "sum", "vote")
    for inline in (False, True):
        fused = world.fresh(fuse(world.graph, inline=inline))
        assert len(fused.graph.node_sources) == 1
        run(fused, scheduled(fused, 1))
