"""Steps in flat arrays: every step comes back as it was appended, and takes a few integers of memory."""

from __future__ import annotations

import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergeloom.engine.schedule.budget import Budget
from mergeloom.engine.schedule.schedule import make_schedule
from mergeloom.engine.schedule.step_list import NOTHING, CachedRange, Column, Step, StepList
from mergeloom.engine.schedule.tiling import ChunkedRead
from tests.examples import examples
from tests.support.blueprints import CPU
from tests.support.graphs import World

NODES = [(0, 1, 2), (0,), (0, 2), ()]
"""The places of each node's distinct sources; the third one has a source twice."""

counts = st.integers(0, 2**32 - 1)
large = st.integers(0, 2**63)
ranges = st.builds(CachedRange, counts, counts, counts.filter(bool)) | st.just(NOTHING)
drops = st.lists(st.tuples(st.builds(ChunkedRead, counts, large, st.just(0) | counts), ranges), max_size=3).map(tuple)


@st.composite
def steps(draw: st.DrawFn) -> Step:
    """A step of one of the nodes. Most values are 0, as in most schedules."""
    node = draw(st.integers(0, len(NODES) - 1))
    places = NODES[node]
    zero = st.just(0)
    return Step(
        node=node,
        index=draw(zero | counts),
        first=draw(zero | counts),
        device=draw(zero | counts),
        places=places,
        keep=tuple(draw(ranges) for _ in places),
        drop=draw(st.just(()) | drops),
        bytes_read=tuple(draw(large) for _ in places),
        uploaded=draw(zero | large),
        ram=draw(counts),
        vram=draw(zero | counts),
    )


def listed(expected: list[Step]) -> StepList:
    """The steps in flat arrays."""
    found = StepList(NODES.__getitem__)
    for step in expected:
        found.append(step)
    return found


@settings(max_examples=examples(300), deadline=None)
@given(st.lists(steps(), max_size=8))
def test_every_step_comes_back(expected: list[Step]) -> None:
    found = listed(expected)
    assert list(found) == expected
    assert [found[number] for number in range(len(expected))] == expected
    assert [found[number - len(expected)] for number in range(len(expected))] == expected
    assert (found[1:3], found[::-1]) == (expected[1:3], expected[::-1])
    assert (len(found), list(reversed(found))) == (len(expected), expected[::-1])
    assert (list(found.ram), list(found.vram)) == ([step.ram for step in expected], [step.vram for step in expected])
    assert found == listed(expected)
    assert found != expected
    if expected:
        assert found != listed(expected[:-1])
        assert found != listed([*expected[:-1], Step(3, 7, 0, 0, (), (), (), (), 0, 0, 0)]) or expected[-1].index == 7


def test_an_index_beyond_the_end_is_an_error() -> None:
    found = listed([])
    for number in (0, -1):
        with pytest.raises(IndexError):
            found[number]


@given(st.lists(st.lists(st.integers(0, 3), max_size=4), max_size=4))
def test_columns_are_extended(parts: list[list[int]]) -> None:
    found, expected = Column(), [value for part in parts for value in part]
    for part in parts:
        found.extend(part)
    assert list(found) == expected
    assert found.first_highest() == (expected.index(max(expected)) if any(expected) else -1)
    assert not found.nbytes or any(expected)


def test_a_column_of_zeros_takes_no_memory() -> None:
    column = Column()
    for value in (0, 0, 0):
        column.append(value)
    assert (list(column), len(column), column.nbytes) == ([0, 0, 0], 3, 0)
    for value in (5, 0):
        column.append(value)
    assert (list(column), len(column), column.nbytes) == ([0, 0, 0, 5, 0], 5, 5 * 4)
    with pytest.raises(OverflowError):
        column.append(1 << 32)


def test_a_schedule_keeps_no_objects_for_its_steps() -> None:
    """With one object for each step and one for each cached range, it was 450 bytes."""
    number = 400
    world = World()
    for _ in range(number):
        world.node("above", [world.source(100), world.source(100), world.source(100)])
    budget = Budget(1 << 30, 0, CPU)
    make_schedule(world.graph, budget)  # imports and caches
    tracemalloc.start()
    schedule = make_schedule(world.graph, budget)
    held = tracemalloc.get_traced_memory()[0]
    others = 100 * len(world.graph.node_sources)  # chunk lengths, mostly
    tracemalloc.stop()
    assert len(schedule.steps) == 3 * number
    assert schedule.steps.nbytes <= 60 * len(schedule.steps)
    assert held <= 80 * len(schedule.steps) + others
