"""The rows of `plan --steps`: what each step of a schedule reads, keeps and drops."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mergeloom.engine.schedule.steps import SourceBytes, SourceChunks, step_rows
from tests.examples import examples
from tests.support.blueprints import ELEMENTS, SLOT, Blueprint, blueprints, build, with_slots
from tests.support.graphs import World


def test_a_row_says_what_a_step_reads_and_keeps() -> None:
    #  t0 ─┐
    #      ├─ out0      t1 stays for out1
    #  t1 ─┤
    #      ├─ out1
    #  t2 ─┘
    world = World()
    sources = [world.source(ELEMENTS) for _ in range(3)]
    for first, second in pairwise(sources):
        world.node("sum", [first, second])
    schedule = with_slots(world, 8)
    rows = {row.tensor: row for row in step_rows(world.graph, schedule)}
    row = rows["out0"]
    assert (row.index, row.passes, row.device, row.uploaded) == (1, 1, "cpu", 0)
    assert {read.tensor for read in row.read} == {"m: t0", "m: t1"}
    first, last = sorted(rows.values(), key=lambda row: row.step)
    assert sum(read.nbytes for read in first.read) == 2 * SLOT
    assert first.kept == (SourceChunks("m: t1", ELEMENTS, 1, 0),)
    assert SourceBytes("m: t1", 0) in last.read
    assert last.kept == last.dropped == ()
    assert first.ram == 3


@settings(max_examples=examples(60), deadline=None, suppress_health_check=list(HealthCheck))
@given(blueprints(), st.sampled_from([0, 1, 3, 20]))
def test_rows_add_up_to_the_schedule(blueprint: Blueprint, extra: int) -> None:
    world = build(blueprint)
    schedule = with_slots(world, extra)
    rows = list(step_rows(world.graph, schedule))
    assert [row.step for row in rows] == list(range(1, len(schedule.steps) + 1))
    assert sum(read.nbytes for row in rows for read in row.read) == schedule.bytes_read
    assert max((row.ram for row in rows), default=0) * schedule.slot_bytes == schedule.serial_ram
    held: dict[tuple[str, int], int] = {}
    for row in rows:
        for chunks in row.dropped:
            held[chunks.tensor, chunks.chunk_length] -= chunks.ram
            assert chunks.ram > 0
            assert held[chunks.tensor, chunks.chunk_length] >= 0
        length = schedule.chunk_elements[schedule.steps[row.step - 1].node]
        held.update({(read.tensor, length): 0 for read in row.read})
        held.update({(chunks.tensor, chunks.chunk_length): chunks.ram for chunks in row.kept})
        assert sum(held.values()) <= schedule.ram_slots
    assert not any(held.values())
