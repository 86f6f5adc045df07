"""Transfers cover what is only copied, byte for byte and once; the threads that perform them end in good order."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergeloom.engine.graph.graph import Kind, MergeGraph
from mergeloom.engine.graph.layout import BLOCK, SHORTEST_RUN, Layout, lay_out
from mergeloom.engine.run import transfers as transfer
from mergeloom.engine.run.transfers import Transfer, WorkerPool, plan_transfers, source_of, written_ranges
from mergeloom.io.output.clone import shareable
from mergeloom.io.output.group_commit import Aborted
from mergeloom.io.task_group import TaskGroup
from mergeloom.io.tensors.refs import TensorRef
from tests.examples import examples
from tests.support.merges.layouts import covered, graph_of, graphs, source


def check(graph: MergeGraph, layout: Layout, nodes: set[int], transfers: Sequence[Transfer]) -> None:
    """Every law of the transfers: the right bytes, all of them, once."""
    wanted = {}
    for output, (shard, place) in enumerate(zip(layout.shard_of, layout.offset_of, strict=True)):
        node = graph.outputs[output].node
        if node in nodes:
            wanted[shard, place] = graph.reads[graph.node_sources[node][0]]
    for each in transfers:
        assert 0 < each.nbytes <= (transfer.SHARED_PART_BYTES if each.shares else transfer.PART_BYTES)
        inside = [
            (place, ref)
            for (shard, place), ref in wanted.items()
            if shard == each.shard and place < each.target + each.nbytes and each.target < place + ref.nbytes
        ]
        assert inside
        for place, ref in inside:
            assert (each.file, each.offset - each.target) == (ref.file, ref.offset - place)
    for number in range(len(layout.shards)):
        moved = [(each.target, each.nbytes) for each in transfers if each.shard == number]
        assert all(sum(a) <= b[0] for a, b in pairwise(sorted(moved)))
        assert covered(moved) == covered(
            [(place, ref.nbytes) for (shard, place), ref in wanted.items() if shard == number]
        )
    assert [(each.file, each.offset) for each in transfers] == sorted((each.file, each.offset) for each in transfers)


@settings(max_examples=examples(200), deadline=None)
@given(graphs(), st.sampled_from([BLOCK, 3 * BLOCK, 1 << 20, 128 << 20]), st.randoms(use_true_random=False))
def test_any_graph_is_moved_by_the_rules(
    drawn: tuple[list[list[tuple[TensorRef, bool]]], int], part: int, chance: object
) -> None:
    groups, limit = drawn
    graph = graph_of(groups)
    layout = lay_out(graph, limit)
    copies = {node for node in graph if graph.operation(node).kind is Kind.COPY and graph.nbytes(node)}
    nodes = {node for node in copies if chance.random() < 0.8}  # type: ignore[attr-defined]
    sharing = {file for file in {source_of(graph, node) for node in nodes} if chance.random() < 0.7}  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transfer, "PART_BYTES", part)
        patch.setattr(transfer, "SHARED_PART_BYTES", 3 * part)
        transfers = plan_transfers(graph, layout, nodes, sharing)
        check(graph, layout, nodes, transfers)
    for each in transfers:
        assert each.shares == (each.file in sharing)
        assert each.shared == (shareable(each.offset, each.target, each.nbytes)[1] if each.shares else 0)
        # a part that isn't at the edge of its run begins and ends where blocks do
        if each.shares and each.shared and each.nbytes == 3 * part:
            assert each.shared in (3 * part, 3 * part - BLOCK)
    # what isn't shared needs space of its own
    for number, ranges in enumerate(written_ranges(graph, layout, transfers)):
        shard = layout.shards[number]
        shared = [(each.target, each.nbytes) for each in transfers if each.shard == number and each.shares]
        everything = [(0, len(shard.header)), *ranges, *shared]
        assert covered(everything) == [(0, shard.nbytes)]
        assert sum(nbytes for _, nbytes in everything) == shard.nbytes


def test_a_run_is_one_transfer_across_tensors_without_bytes() -> None:
    refs = source("f", [("BF16", (1 << 19,)), ("F32", (0, 3)), ("BF16", (1 << 19,)), ("U8", (5,))], 1000)
    graph = graph_of([[(ref, True) for ref in refs]])
    layout = lay_out(graph, 10**9)
    nodes = {node for node in graph if graph.nbytes(node)}
    (only,) = plan_transfers(graph, layout, nodes, {refs[0].file})
    assert (only.offset, only.nbytes) == (1000, (2 << 20) + 5)
    assert only.shared == (2 << 20) - BLOCK
    assert written_ranges(graph, layout, [only]) == [[]]


def test_sizes_that_are_no_multiples_of_a_block_shift_what_follows_on_both_sides() -> None:
    refs = source("f", [("U8", (SHORTEST_RUN + 1,)), ("U8", (3,)), ("U8", (7 * BLOCK + 5,)), ("U8", (BLOCK,))] * 9, 13)
    graph = graph_of([[(ref, True) for ref in refs], [(ref, True) for ref in refs[5:20]]])
    layout = lay_out(graph, 5_000_000)
    assert len(layout.shards) > 3
    transfers = plan_transfers(graph, layout, set(graph), {refs[0].file})
    check(graph, layout, set(graph), transfers)
    assert all((each.offset - each.target) % BLOCK == 0 for each in transfers)
    total = sum(each.nbytes for each in transfers)
    assert total - sum(each.shared for each in transfers) < 2 * BLOCK * len(transfers)


def test_what_lies_apart_is_moved_apart() -> None:
    refs = source("f", [("U8", (2 << 20,))] * 4, 8)
    graph = graph_of([[(refs[0], True), (refs[2], True), (refs[3], True)]])
    layout = lay_out(graph, 10**9)
    found = plan_transfers(graph, layout, set(graph), ())
    assert [(each.offset, each.nbytes, each.shares) for each in found] == [
        (8, 2 << 20, False),
        (8 + (4 << 20), 4 << 20, False),
    ]
    computed = graph_of([[(refs[0], True), (refs[1], False), (refs[2], True)]])  # and what is computed isn't moved
    layout = lay_out(computed, 10**9)
    nodes = {node for node in computed if computed.operation(node).kind is Kind.COPY}
    check(computed, layout, nodes, plan_transfers(computed, layout, nodes, ()))


# ------------------------------------------------------------------------------------------------ the threads


def test_every_task_runs_once() -> None:
    done: list[int] = []
    group = TaskGroup("test")
    pool = WorkerPool(range(500), 4, lambda thread, task: done.append(task), group)
    while not pool.wait(0.1):
        pass
    pool.stop()
    assert sorted(done) == list(range(500))
    assert not group.cancelled


def test_a_pool_without_tasks_is_done_at_once() -> None:
    pool: WorkerPool[int] = WorkerPool([], 4, lambda thread, task: None, TaskGroup("test"))
    assert pool.wait(0)
    pool.stop()


def test_an_error_stops_the_pool() -> None:
    done: list[int] = []
    group = TaskGroup("test")

    def work(thread: int, task: int) -> None:
        if task == 10:
            raise ValueError(task)
        done.append(task)

    pool = WorkerPool(range(100_000), 2, work, group)
    while not pool.wait(0.1):
        pass
    pool.stop()
    with pytest.raises(ValueError, match="10"):
        group.check()
    assert len(done) < 100_000


def test_an_aborted_task_is_not_an_error() -> None:
    group = TaskGroup("test")

    def work(thread: int, task: int) -> None:
        raise Aborted

    pool = WorkerPool(range(10), 2, work, group)
    while not pool.wait(0.1):
        pass
    pool.stop()
    assert group.cancelled
    assert group.error is None


def test_stopping_waits_for_the_current_task() -> None:
    started, released = threading.Event(), threading.Event()
    done: list[int] = []

    def work(thread: int, task: int) -> None:
        started.set()
        released.wait()
        done.append(task)

    pool = WorkerPool(range(10), 1, work, TaskGroup("test"))
    started.wait()
    assert not pool.wait(0)
    threading.Timer(0.1, released.set).start()
    pool.stop()
    assert done == [0]
