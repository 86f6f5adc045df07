"""Where every tensor lies: no shard too large, no holes, offsets that let blocks be shared, nothing of paths."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from mergeloom.engine.graph.graph import Kind, MergeGraph
from mergeloom.engine.graph.layout import BLOCK, SHORTEST_RUN, Layout, lay_out
from mergeloom.errors import UsageError
from mergeloom.io.safetensors.header import parse_header
from mergeloom.io.tensors.refs import TensorRef
from tests.examples import examples
from tests.support.merges.layouts import covered, graph_of, graphs, source

"""Element type and shape of a tensor."""


def check(graph: MergeGraph, layout: Layout, limit: int) -> None:
    """Every law of the layout."""
    assert sorted(n for shard in layout.shards for n in shard.outputs) == list(range(len(graph.outputs)))
    names = [shard.name for shard in layout.shards]
    assert names == sorted(set(names))
    assert layout.nbytes == sum(shard.nbytes for shard in layout.shards)
    for number, shard in enumerate(layout.shards):
        assert shard.nbytes <= limit or len(shard.outputs) == 1
        header = parse_header(shard.header, shard.nbytes, file=Path(shard.name))
        assert header.metadata == {"format": "pt"}
        assert len(header.tensors) == len(shard.outputs)
        computed: list[tuple[int, int]] = []
        copies_only = True
        for output in shard.outputs:
            node = graph.outputs[output].node
            ref = header.tensors[graph.outputs[output].name]
            assert (layout.shard_of[output], layout.offset_of[output]) == (number, ref.offset)
            assert (ref.dtype, ref.shape, ref.nbytes) == (
                graph.node_dtype[node],
                graph.shape(node),
                graph.nbytes(node),
            )
            if graph.operation(node).kind is not Kind.COPY:
                copies_only = False
                if ref.nbytes:
                    computed.append((ref.offset, ref.nbytes))
        assert covered(computed) == covered(shard.computed)
        if not copies_only:
            assert len(shard.header) % BLOCK == 0
            for ref in header.tensors.values():
                assert ref.offset % (ref.dtype.bits // 8) == 0


@settings(max_examples=examples(200), deadline=None)
@given(graphs())
def test_any_graph_is_laid_out_by_the_rules(drawn: tuple[list[list[tuple[TensorRef, bool]]], int]) -> None:
    groups, limit = drawn
    graph = graph_of(groups)
    layout = lay_out(graph, limit)
    check(graph, layout, limit)
    # runs that are worth sharing keep their offset within a block
    for group, members in enumerate(groups):
        refs = sorted({ref for ref, copied in members if copied}, key=lambda ref: (ref.offset, ref.nbytes))
        breaks = [n for n, (a, b) in enumerate(pairwise(refs), 1) if a.offset + a.nbytes != b.offset]
        for first, end in pairwise([0, *breaks, len(refs)]):
            run = [ref for ref in refs[first:end] if ref.nbytes]
            if sum(ref.nbytes for ref in run) < SHORTEST_RUN:
                continue
            for number, output in enumerate(graph.outputs):
                ref = graph.reads[graph.node_sources[output.node][0]]
                if output.group == group and ref in run and graph.operation(output.node).kind is Kind.COPY:
                    assert layout.offset_of[number] % BLOCK == ref.offset % BLOCK
    # and other paths change nothing
    moved = {ref.file: Path(f"elsewhere/{9 - n}") for n, ref in enumerate(ref for g in groups for ref, _ in g)}
    renamed = [
        [(TensorRef(moved[ref.file], ref.offset, ref.nbytes, ref.dtype, ref.shape), copied) for ref, copied in members]
        for members in groups
    ]
    again = lay_out(graph_of(renamed), limit)
    assert again == layout
    assert [shard.header for shard in again.shards] == [shard.header for shard in layout.shards]


def test_the_library_opens_every_shard(tmp_path: Path) -> None:
    drawn = [("BF16", (700, 1000)), ("F32", (0,)), ("U8", (3,)), ("F32", (5,)), ("I64", ()), ("BF16", (600, 1000))]
    refs = source("f", drawn, 1003)
    groups = [[(ref, True) for ref in refs], [(ref, False) for ref in refs], [(ref, True) for ref in refs[2:5]]]
    graph = graph_of(groups)
    layout = lay_out(graph, 3_000_000)
    check(graph, layout, 3_000_000)
    assert len(layout.shards) > 2
    found = set()
    for shard in layout.shards:
        file = tmp_path / shard.name
        with file.open("wb") as stream:
            stream.write(shard.header)
            stream.truncate(shard.nbytes)
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  not a dict
                found.add(name)
                output = int(name[1:])
                assert tuple(opened.get_tensor(name).shape) == graph.shape(graph.outputs[output].node)
    assert found == {output.name for output in graph.outputs}


def test_a_tensor_larger_than_a_shard_has_one_to_itself() -> None:
    refs = source("f", [("BF16", (10,)), ("BF16", (4 << 20,)), ("BF16", (10,)), ("BF16", (0,))], 8)
    for copied in (True, False):
        graph = graph_of([[(ref, copied) for ref in refs]])
        layout = lay_out(graph, 1 << 20)
        check(graph, layout, 1 << 20)
        large = layout.shards[layout.shard_of[1]]
        assert list(large.outputs) == [1]
        assert large.nbytes > 1 << 20


def test_a_shard_of_its_own_size_is_filled() -> None:
    refs = source("f", [("F32", (1000,))] * 100, 8)
    graph = graph_of([[(ref, False) for ref in refs]])
    layout = lay_out(graph, 110_000)
    check(graph, layout, 110_000)
    assert len(layout.shards) == 4  # no more than the sizes ask for


def test_a_single_shard_has_the_usual_name() -> None:
    graph = graph_of([[(ref, False) for ref in source("f", [("F32", (10,))] * 3, 8)]])
    assert [shard.name for shard in lay_out(graph, 10**9).shards] == ["model.safetensors"]
    names = [shard.name for shard in lay_out(graph, 2 * BLOCK).shards]
    assert names == ["model.safetensors"]


def test_short_copies_lie_behind_a_run() -> None:
    refs = source("f", [("BF16", (1 << 20,)), ("BF16", (3,)), ("F32", (5,)), ("BF16", (7,))], 4000)
    graph = graph_of([[(refs[0], True)], [(refs[3], True)], [(refs[2], True)]])
    layout = lay_out(graph, 10**9)
    check(graph, layout, 10**9)
    assert [list(shard.outputs) for shard in layout.shards] == [[0, 1], [2]]  # the last would begin at an odd place


def test_stacked_slices_share_shards() -> None:
    refs = source("f", [("BF16", (1 << 19,))] * 16, 5096)
    graph = graph_of([[(ref, True) for ref in part] for part in (refs[:8], refs[4:12], refs[8:])])
    layout = lay_out(graph, 10**9)
    assert len(layout.shards) == 1  # they all begin at the same offset within a block
    assert len(layout.shards[0].header) % BLOCK == 5096 % BLOCK


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40))
@example('"' * 300)
@example("\x00\x1f\\" * 100)
@example("権" * 300)
def test_any_name_fits(name: str) -> None:
    refs = source("f", [("F32", (2, 3))] * 40, 8)
    graph = graph_of([[(ref, False) for ref in refs]], prefix=name)
    limit = 3 * BLOCK
    layout = lay_out(graph, limit)
    assert all(shard.nbytes <= limit or len(shard.outputs) == 1 for shard in layout.shards)
    for shard in layout.shards:
        parse_header(shard.header, shard.nbytes, file=Path(shard.name))


def test_a_shard_size_that_no_header_fits() -> None:
    graph = graph_of([[(ref, False) for ref in source("f", [("F32", (1,))], 8)]])
    with pytest.raises(UsageError, match="too small"):
        lay_out(graph, 2 * BLOCK - 1)
