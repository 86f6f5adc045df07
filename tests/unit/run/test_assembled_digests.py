"""Digests of tensors in several parts: the bytes of every part count, in whichever file it is stored."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from mergeloom.engine.graph.graph import Kind, MergeGraph, Operation
from mergeloom.engine.run.buffers import ThreadBuffers
from mergeloom.engine.run.recovery.checks import CHECKS
from mergeloom.engine.run.recovery.records import SourceRange
from mergeloom.engine.run.recovery.source_digests import (
    SourceDigests,
    add_ranges,
    check_sources,
    ranges_in_use,
    used_bytes,
)
from mergeloom.errors import CheckpointError
from mergeloom.io.counters import IoCounters
from mergeloom.io.reading import Reader
from mergeloom.io.tensors.assembled import AssembledRef, read_tensor
from mergeloom.io.tensors.dtypes import BF16, F32
from mergeloom.io.tensors.refs import TensorRef

ROWS, COLUMNS, EXPERTS = 6, 5, 4
PART = ROWS * COLUMNS * 4


def graph_of(directory: Path, *, interleaved: bool) -> MergeGraph:
    """The graph that copies a tensor in parts of three files, and a tensor between the parts."""
    files = [directory / name for name in "abc"]
    for number, file in enumerate(files):
        file.write_bytes(random.Random(number).randbytes(8 + 4 * PART))
    parts = [(files[number % 3], 8 + number // 3 * PART) for number in range(2 * EXPERTS)]
    ref = AssembledRef(
        *parts[0],
        2 * EXPERTS * PART,
        F32,
        (EXPERTS, 2 * ROWS, COLUMNS),
        tuple(file for file, _ in parts),
        tuple(offset for _, offset in parts),
        2,
        COLUMNS * 4 if interleaved else PART,
    )
    graph = MergeGraph(("model",))
    reads = (
        graph.add_read(0, "experts", ref),
        graph.add_read(0, "other", TensorRef(files[0], 8 + 3 * PART, 8, F32, (2,))),
    )
    for read in reads:
        graph.add_output(str(read), graph.add_node(Operation(Kind.COPY, "passthrough"), (read,), F32), 0)
    return graph


def check(graph: MergeGraph, ranges: dict[int, list[SourceRange]], used: dict[int, int], files: set[Path]) -> int:
    in_use = ranges_in_use(graph, ranges, used)
    return check_sources(graph, files, in_use, used, ThreadBuffers(CHECKS, 2), IoCounters(), lambda done, total: None)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("piece", [4, COLUMNS * 4, 52, PART, 3 * PART + 8])
def test_each_byte_of_each_part_is_digested_and_compared(piece: int, interleaved: bool, tmp_path: Path) -> None:
    graph = graph_of(tmp_path, interleaved=interleaved)
    digests = SourceDigests(graph)
    reader = Reader(observe=digests.add)
    nbytes = graph.reads[0].nbytes
    starts = list(range(0, nbytes, piece))
    random.Random(7).shuffle(starts)
    for start in (*starts, *starts[:3]):
        read_tensor(reader.read, graph.reads[0], start, memoryview(bytearray(min(piece, nbytes - start))))
    read_tensor(reader.read, graph.reads[1], 0, memoryview(bytearray(8)))
    reader.close()
    ranges: dict[int, list[SourceRange]] = {}
    for record in digests.take():
        add_ranges(ranges, record)
    used = {0: nbytes, 1: 8}
    files = {tmp_path / name for name in "abc"}
    assert check(graph, ranges, used, files) == nbytes + 8
    for file in sorted(files):
        content = file.read_bytes()
        assert check(graph, ranges, used, {file}) > 0
        for place in (8, 8 + PART - 1, 8 + PART, 8 + 2 * PART - 1):
            file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
            with pytest.raises(CheckpointError, match=rf"{file.name} was changed .*tensor experts differs"):
                check(graph, ranges, used, {file})
        file.write_bytes(content)
    del ranges[0][-1]
    with pytest.raises(CheckpointError, match="the journal has no digest of tensor experts"):
        check(graph, ranges, used, files)


def test_the_first_bytes_of_interleaved_parts_are_spread_over_all(tmp_path: Path) -> None:
    done = {0: 2 * PART}
    assert used_bytes(graph_of(tmp_path, interleaved=False), done) == {0: 2 * PART}
    assert used_bytes(graph_of(tmp_path, interleaved=True), done) == {0: 2 * EXPERTS * PART}


def test_many_small_ranges_become_one(tmp_path: Path) -> None:
    """Ranges that are not adjacent, as a transposed access reads them, and then those between them."""
    file = tmp_path / "a"
    count, size = 20_000, 4
    file.write_bytes(os.urandom(2 * count * size))
    graph = MergeGraph(("model",))
    graph.add_read(0, "turned", TensorRef(file, 0, 2 * count * size, BF16, (count, 2 * size // 2)))
    digests = SourceDigests(graph)
    data = memoryview(file.read_bytes())
    for first in (0, size):
        for place in range(first, len(data), 2 * size):
            digests.add(file, place, data[place : place + size])
    ranges: dict[int, list[SourceRange]] = {}
    for record in digests.take():
        add_ranges(ranges, record)
    assert [(each.start, each.end, each.chunk) for each in ranges[0]] == [(0, len(data), size)]
    for place in (0, size, 5 * size):  # known: not digested again
        digests.add(file, place, data[place : place + size])
    assert digests.take() == []
