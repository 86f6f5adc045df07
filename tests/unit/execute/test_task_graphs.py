"""Random graphs of tasks that use tasks, and of parts behind accesses: planned and executed bytes, and the output's."""

from __future__ import annotations

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mergeloom.engine.graph.fuse import fuse
from tests.examples import examples
from tests.support.tasks.drawn import task_worlds
from tests.support.tasks.laws import resume, run, scheduled
from tests.support.tasks.world import TaskWorld

SLOTS = st.sampled_from([0, 1, 3, 20])
MAYBE_SLOTS = st.sampled_from([None, None, 0, 3, 20])


@settings(max_examples=examples(100), deadline=None, suppress_health_check=list(HealthCheck))
@given(task_worlds(), SLOTS, MAYBE_SLOTS, st.integers(1, 2), st.booleans())
def test_planned_bytes_are_executed(world: TaskWorld, ram: int, vram: int | None, count: int, serial: bool) -> None:
    run(world, scheduled(world, ram, vram, count), serial=serial)


@settings(max_examples=examples(50), deadline=None, suppress_health_check=list(HealthCheck))
@given(task_worlds(staged=True), SLOTS, MAYBE_SLOTS, st.booleans(), st.booleans())
def test_fused_tasks_write_the_same(world: TaskWorld, ram: int, vram: int | None, inline: bool, serial: bool) -> None:
    fused = world.fresh(fuse(world.graph, inline=inline))
    assert not inline or fused.graph.users().keys() <= {output.node for output in fused.graph.outputs}
    run(fused, scheduled(fused, ram, vram), serial=serial)


@settings(max_examples=examples(50), deadline=None, suppress_health_check=list(HealthCheck))
@given(task_worlds(), SLOTS, SLOTS, MAYBE_SLOTS, st.data())
def test_another_run_goes_on_with_any_budget(
    world: TaskWorld, before: int, ram: int, vram: int | None, data: st.DataObject
) -> None:
    run(world, scheduled(world, before))
    outputs = sorted({output.node for output in world.graph.outputs})
    shares = st.sampled_from([0.0, 0.3, 0.9, 1.0, 1.0])
    resume(world.fresh(), world, ram, vram, data.draw(st.dictionaries(st.sampled_from(outputs), shares)))
