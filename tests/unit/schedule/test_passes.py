"""Passes that nothing disturbs are simulated in a shorter way, with the result of the general one."""

from __future__ import annotations

from unittest.mock import patch

from hypothesis import given, settings
from hypothesis import strategies as st

from mergeloom.engine.schedule import simulate
from mergeloom.engine.schedule.budget import Budget, DeviceBudget
from mergeloom.engine.schedule.passes import StepShape, undisturbed
from mergeloom.engine.schedule.schedule import Schedule, make_schedule
from mergeloom.engine.schedule.step_list import NOTHING, CachedRange
from tests.examples import examples
from tests.support.blueprints import CPU, SLOT, Blueprint, blueprints, build, minimum
from tests.support.tasks.drawn import task_worlds
from tests.support.tasks.laws import scheduled
from tests.support.tasks.world import TaskWorld

BOTH = (DeviceBudget("cpu", None, 1), DeviceBudget("cuda:0", 1 << 30, 1))


@settings(max_examples=examples(200), deadline=None)
@given(blueprints(), st.sampled_from([CPU, BOTH]), st.integers(0, 12), st.data())
def test_the_schedule_is_that_of_the_general_way(
    blueprint: Blueprint, devices: tuple[DeviceBudget, ...], extra: int, data: st.DataObject
) -> None:
    world = build(blueprint)
    graph = world.graph
    written = {node: int(graph.nbytes(node) * data.draw(st.sampled_from([0.0, 0.0, 0.5, 1.0]))) for node in graph}
    done = {node: nbytes for node, nbytes in written.items() if nbytes}
    budget = Budget(minimum(world, devices) + extra * SLOT, 0, devices)

    def schedule() -> Schedule:
        return make_schedule(graph, budget, slot_bytes=SLOT, done=done)

    found = schedule()
    with patch.object(simulate, "undisturbed", lambda *args, **options: None):
        assert schedule() == found


@settings(max_examples=examples(100), deadline=None)
@given(task_worlds(), st.integers(0, 40))
def test_outputs_that_others_use_stay_likewise(world: TaskWorld, extra: int) -> None:
    found = scheduled(world, extra)
    with patch.object(simulate, "undisturbed", lambda *args, **options: None):
        assert scheduled(world, extra) == found


def test_what_has_no_room_is_left_to_the_general_way() -> None:
    complete = CachedRange(0, 0, 3)
    shape = StepShape(3, (3, 3), 1, (30, 30), complete)
    arguments = shape, [complete, NOTHING], [None, 7], 1, 4  # four slots are held by others
    for stays, room in ((False, 4 + 6), (True, 4 + 6 + 3)):
        found = undisturbed(*arguments, room, stays=stays)
        assert found is not None
        assert (found.keep, found.bytes_read, found.working_set) == ([NOTHING, complete], (0, 30), room - 4)
        # the first chunk: its output, one chunk of the second source, all of the first
        assert found.ram == 4 + 1 + 1 + 3 + 2 * stays
        assert undisturbed(*arguments, room - 1, stays=stays) is None
    assert undisturbed(shape, [CachedRange(0, 0, 2), NOTHING], [None, 7], 1, 4, 100, stays=False) is None
    assert undisturbed(shape, [CachedRange(1, 1, 3), NOTHING], [None, 7], 1, 4, 100, stays=False) is None
    once = StepShape(3, (3, 1), 1, (30, 30), complete)
    assert undisturbed(once, [complete, NOTHING], [None, 7], 1, 4, 100, stays=False) is None
