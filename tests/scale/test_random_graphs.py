"""2,000 random task graphs: planned bytes are executed bytes, chunk by chunk or concurrently, on any device."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from mergeloom.engine.graph.fuse import fuse
from tests.support.tasks.drawn import task_worlds
from tests.support.tasks.laws import resume, run, scheduled
from tests.support.tasks.world import TaskWorld

SLOTS = st.sampled_from([0, 0, 1, 2, 3, 5, 8, 20])


@pytest.mark.parametrize("part", range(8))
def test_planned_bytes_are_executed(part: int) -> None:
    @seed(20_000 + part)
    @settings(
        max_examples=250,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(task_worlds(staged=part % 2 == 1), SLOTS, SLOTS, st.data())
    def every_way(world: TaskWorld, ram: int, vram: int, data: st.DataObject) -> None:
        graph = world.graph if part % 2 == 0 else fuse(world.graph, inline=part % 4 == 1)
        complete = world.fresh(graph)
        run(complete, scheduled(complete, ram))
        again = world.fresh(graph)
        run(again, scheduled(again, ram), serial=True)
        for count in (1, 2):
            on_devices = world.fresh(graph)
            run(on_devices, scheduled(on_devices, ram, vram, count), serial=data.draw(st.booleans()))
        outputs = sorted({output.node for output in graph.outputs})
        shares = st.sampled_from([0.0, 0.3, 0.9, 1.0, 1.0])
        written = data.draw(st.dictionaries(st.sampled_from(outputs), shares))
        resume(world.fresh(graph), complete, data.draw(SLOTS), data.draw(st.sampled_from([None, vram])), written)

    every_way()
