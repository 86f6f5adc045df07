"""Steps that share nothing are found by class, with the result of simulating each of them."""

from __future__ import annotations

from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergeloom.engine.graph.graph import Kind, Operation
from mergeloom.engine.schedule.alone import StepsAlone
from mergeloom.engine.schedule.budget import Budget, DeviceBudget
from mergeloom.engine.schedule.schedule import Schedule, make_schedule
from mergeloom.methods.kernel.spec import InputSpec
from tests.examples import examples
from tests.support.blueprints import CPU, SLOT, Blueprint, blueprints, build, minimum
from tests.support.counting import count_lines
from tests.support.graphs import World, kernel_of

GPUS = (DeviceBudget("cuda:0", 1 << 30, 1), DeviceBudget("cuda:1", 1 << 30, 1))
LINES_OF_A_NODE = 110
"""The most lines of Python that planning one more node may execute, if it shares nothing."""


@settings(max_examples=examples(150), deadline=None)
@given(blueprints(), st.sampled_from([CPU, GPUS[:1], GPUS]), st.integers(0, 8), st.data())
def test_the_schedule_is_that_of_simulating_every_step(
    blueprint: Blueprint, devices: tuple[DeviceBudget, ...], extra: int, data: st.DataObject
) -> None:
    world = build(blueprint)
    graph = world.graph
    nbytes = st.sampled_from([0.0, 0.5, 1.0]).map
    done = {node: data.draw(nbytes(lambda share, n=node: int(graph.nbytes(n) * share))) for node in graph}
    done = {node: written for node, written in done.items() if written}
    budget = Budget(minimum(world, devices) + extra * SLOT, 0, devices)

    def schedule() -> Schedule:
        return make_schedule(graph, budget, slot_bytes=SLOT, done=done)

    found = schedule()
    with patch.object(StepsAlone, "nodes", lambda self, shared, started: bytearray(len(graph.node_operation))):
        assert schedule() == found


@pytest.mark.parametrize("vram", [None, 24 << 30])
def test_a_node_that_shares_nothing_takes_little_work(vram: int | None) -> None:
    def lines(nodes: int) -> int:
        world = World()
        graph = world.graph
        operation = Operation(Kind.MERGE, "sum", kernel=kernel_of("sum", InputSpec(2, None, (64,))))
        for _ in range(nodes):
            pair = world.source(64), world.source(64)
            graph.add_output(f"out{len(graph.outputs)}", graph.add_node(operation, pair, graph.value_dtype(pair[0])), 0)
        budget = Budget(1 << 40, 0, (DeviceBudget("test", vram, 1),))
        return count_lines(lambda: make_schedule(graph, budget))

    assert lines(200) - lines(100) <= 100 * LINES_OF_A_NODE
