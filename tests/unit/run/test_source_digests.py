"""Digests of used source bytes: each byte once, for any order, chunk size and number of passes."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mergeloom.engine.graph.columns.reads import Reads
from mergeloom.engine.graph.graph import MergeGraph
from mergeloom.engine.graph.layout import lay_out
from mergeloom.engine.run.buffers import ThreadBuffers
from mergeloom.engine.run.plan import Options
from mergeloom.engine.run.planning import plan
from mergeloom.engine.run.recovery.checks import CHECKS
from mergeloom.engine.run.recovery.records import JournalRecord, SourceRange, SourceRead, parse_records
from mergeloom.engine.run.recovery.source_digests import (
    SharedPart,
    SourceDigests,
    add_ranges,
    check_sources,
    ranges_in_use,
    shared_parts,
    used_bytes,
)
from mergeloom.errors import CheckpointError, Interrupted
from mergeloom.io.counters import IoCounters
from mergeloom.io.tensors.refs import TensorRef
from tests.support.models import write_checkpoint
from tests.support.models.torch_files import write_torch_model

SHAPES = {f"model.layers.{layer}.w.weight": (100, 64) for layer in range(2)}
NBYTES = 100 * 64 * 4


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model of two tensors."""
    return write_checkpoint(tmp_path / "model", SHAPES, dtype="F32", fill=1)


def graph_of(model: Path, **more: Any) -> MergeGraph:
    """The graph of a merge of the model."""
    named = [{"model": str(model), "parameters": {"weight": 1}}]
    recipe = {"merge_method": "linear", "models": named, "dtype": "bfloat16", **more}
    return plan(recipe, Options(device="cpu", max_ram=4 << 30)).built.graph


def read(graph: MergeGraph, digests: SourceDigests, number: int, start: int, end: int) -> None:
    """Read a range of a tensor, as a lane does."""
    ref = graph.reads[number]
    data = ref.file.read_bytes()[ref.offset + start : ref.offset + end]
    digests.add(ref.file, ref.offset + start, memoryview(data))


def source_ranges(records: Iterable[JournalRecord]) -> dict[int, list[SourceRange]]:
    """The ranges that journal records name, by read number."""
    ranges: dict[int, list[SourceRange]] = {}
    for record in records:
        if isinstance(record, SourceRead):
            add_ranges(ranges, record)
    return ranges


def check(graph: MergeGraph, records: Sequence[SourceRead], used: dict[int, int]) -> int:
    """Compare what the records say with the files."""
    files = {ref.file for ref in graph.reads}
    ranges = ranges_in_use(graph, source_ranges(records), used)
    return check_sources(graph, files, ranges, used, ThreadBuffers(CHECKS, 2), IoCounters(), lambda done, total: None)


def bounds(record: SourceRead) -> list[tuple[int, int, int]]:
    """Start, end and chunk size of each range of a record."""
    return [(each.start, each.end, each.chunk) for each in record.ranges]


@pytest.mark.parametrize("piece", [1000, 4096, NBYTES, NBYTES + 1])
@pytest.mark.parametrize("order", ["in order", "backwards", "shuffled"])
def test_chunks_of_any_size_in_any_order_are_one_range(model: Path, piece: int, order: str) -> None:
    graph = graph_of(model)
    digests = SourceDigests(graph)
    pieces = [(start, min(start + piece, NBYTES)) for start in range(0, NBYTES, piece)]
    if order == "backwards":
        pieces.reverse()
    elif order == "shuffled":
        random.Random(piece).shuffle(pieces)
    for start, end in pieces:
        read(graph, digests, 1, start, end)
    (record,) = records = digests.take()
    assert record.read == 1
    assert bounds(record) == [(0, NBYTES, min(piece, NBYTES))]
    assert check(graph, records, {1: NBYTES}) == NBYTES
    for start, end in pieces:  # a second pass
        read(graph, digests, 1, start, end)
    assert digests.take() == []


def test_only_new_bytes_of_overlapping_chunks_are_digested(model: Path) -> None:
    graph = graph_of(model)
    digests = SourceDigests(graph)
    read(graph, digests, 0, 0, 5000)
    read(graph, digests, 0, 10_000, 15_000)
    read(graph, digests, 0, 11_000, 14_000)
    first = digests.take()
    assert bounds(first[0]) == [(0, 5000, 5000), (10_000, 15_000, 5000)]
    read(graph, digests, 0, 2000, 10_000)
    read(graph, digests, 0, 0, 15_000)
    second = digests.take()
    assert bounds(second[0]) == [(2000, 10_000, 8000)]
    assert check(graph, [*first, *second], {0: 15_000}) == 18_000
    with pytest.raises(CheckpointError, match="has no digest of tensor model.layers.0.w.weight"):
        check(graph, [*first, *second], {0: 15_001})
    with pytest.raises(CheckpointError, match="has no digest of tensor model.layers.0.w.weight"):
        check(graph, first, {0: 15_000})


def test_swapped_chunks_are_detected(model: Path) -> None:
    """Without the offset as the seed, the sum of the digests would be the same."""
    graph = graph_of(model)
    digests = SourceDigests(graph)
    for start in range(0, NBYTES, 6400):
        read(graph, digests, 0, start, start + 6400)
    records = digests.take()
    ref = graph.reads[0]
    data = bytearray(ref.file.read_bytes())
    a, b = slice(ref.offset, ref.offset + 6400), slice(ref.offset + 6400, ref.offset + 12_800)
    data[a], data[b] = data[b], data[a]
    ref.file.write_bytes(data)
    with pytest.raises(CheckpointError, match="tensor model.layers.0.w.weight differs from what was read before"):
        check(graph, records, {0: 1})
    assert check(graph, records, {}) == 0


def test_many_threads(model: Path) -> None:
    graph = graph_of(model)
    digests = SourceDigests(graph)
    pieces = [(number, start) for number in range(2) for start in range(0, NBYTES, 512)] * 2
    random.Random(0).shuffle(pieces)
    taken: list[SourceRead] = []

    def work(part: Sequence[tuple[int, int]]) -> None:
        for number, start in part:
            read(graph, digests, number, start, start + 512)
            if start % 4096 == 0:
                taken.extend(digests.take())

    threads = [threading.Thread(target=work, args=(pieces[number::4],)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    taken += digests.take()
    assert check(graph, taken, {0: NBYTES, 1: NBYTES}) == 2 * NBYTES  # each piece once


def test_journaled_ranges_are_not_digested_again(model: Path) -> None:
    graph = graph_of(model)
    digests = SourceDigests(graph)
    read(graph, digests, 0, 0, 5000)
    again = SourceDigests(graph, source_ranges(digests.take()))
    read(graph, again, 0, 0, 5000)
    assert again.take() == []


def with_reads(graph: MergeGraph, changed: dict[int, TensorRef]) -> MergeGraph:
    """The graph with other references for some reads."""
    refs, graph.reads = list(graph.reads), Reads()
    for number, ref in enumerate(refs):
        graph.reads.append(changed.get(number, ref))
    return graph


def test_used_bytes_of_a_source(model: Path) -> None:
    """With one pass, the source of the first bytes; with several passes, the complete source."""
    simple = graph_of(model)
    assert used_bytes(simple, {}) == used_bytes(simple, {0: 0}) == {}
    assert used_bytes(simple, {0: 2}) == {0: NBYTES}  # a chunk has at least 32768 elements
    large = replace(simple.reads[0], shape=(1024, 64), nbytes=1024 * 64 * 4)
    simple = with_reads(simple, {0: large})
    assert used_bytes(simple, {0: 2}) == {0: 32768 * 4}
    assert used_bytes(simple, {0: 32768 * 2 + 2}) == {0: large.nbytes}
    base = {"base_model": str(model), "merge_method": "ties", "parameters": {"density": 0.5}}
    other = write_checkpoint(model.with_name("other"), SHAPES, dtype="F32", fill=2)
    passes = graph_of(other, **base)
    passes = with_reads(passes, {0: replace(passes.reads[0], shape=(1024, 64), nbytes=1024 * 64 * 4)})
    used = used_bytes(passes, {0: 2})
    assert set(used) == set(passes.node_sources[0])
    assert all(used[read] == passes.reads[read].nbytes for read in used)


def test_malformed_records_are_ignored(model: Path) -> None:
    graph = graph_of(model)
    good = [0, 10, 10, "0" * 32]
    ranges: list[Any] = [None, 1, "abc", [], [0, 10, 10], [*good, 1], [-1, 10, 5, "0"], [0, NBYTES + 1, 1, "0"]]
    ranges += [[5, 5, 1, "0"], [0, 10, 0, "0"], [0, 10, 11, "0"], [0, 10, 10, "x"], [0, 10.0, 10, "0"], [0, 10, 10, 0]]
    records: list[dict[str, Any]] = [{"source": source, "ranges": [good]} for source in (-1, 2, None, "0", 1.5)]
    records += [{"source": 0, "ranges": value} for value in (None, 5, "abc", {})]
    records += [{"source": 0, "ranges": [*ranges, good]}]
    found = source_ranges(parse_records(records, graph, lay_out(graph, 1 << 30)))
    assert [(each.start, each.end, each.chunk, each.digest) for each in found[0]] == [(0, 10, 10, 0)]
    assert found.keys() == {0}


def test_a_comparison_can_be_interrupted(model: Path) -> None:
    graph = graph_of(model)
    digests = SourceDigests(graph)
    read(graph, digests, 0, 0, NBYTES)
    ranges = source_ranges(digests.take())

    def stop(done: int, total: int) -> None:
        raise Interrupted("stopped")

    with pytest.raises(Interrupted):
        check_sources(graph, {graph.reads[0].file}, ranges, {0: NBYTES}, ThreadBuffers(CHECKS, 2), IoCounters(), stop)


def test_tensors_that_share_bytes_are_digested_once_or_twice(tmp_path: Path) -> None:
    """One inside another counts as its part; of two that overlap in part, each has digests of all its bytes."""
    values = torch.arange(100 * 64, dtype=torch.float32).reshape(100, 64)
    state = {"a.weight": values[:60], "b.weight": values[40:], "c.weight": values[50:55]}
    model = write_torch_model(tmp_path / "model", state)
    (model / "config.json").unlink()
    graph = graph_of(model)
    numbers = {name: graph.read_names.index(name) for name in state}
    inside = SharedPart(0, 5 * 256, numbers["b.weight"], 10 * 256)
    assert shared_parts(graph) == {numbers["c.weight"]: [inside]}
    digests = SourceDigests(graph)
    read(graph, digests, numbers["c.weight"], 0, 5 * 256)
    read(graph, digests, numbers["b.weight"], 20 * 256, 60 * 256)
    records = digests.take()
    assert {record.read: bounds(record) for record in records} == {
        numbers["a.weight"]: [(50 * 256, 55 * 256, 5 * 256)],
        numbers["b.weight"]: [(10 * 256, 15 * 256, 5 * 256), (20 * 256, 60 * 256, 40 * 256)],
    }
    assert check(graph, records, {numbers["c.weight"]: 5 * 256}) == 5 * 256
    file = graph.reads[0].file
    data = bytearray(file.read_bytes())
    data[graph.reads[numbers["c.weight"]].offset] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"b\.weight differs"):
        check(graph, records, {numbers["c.weight"]: 5 * 256})
