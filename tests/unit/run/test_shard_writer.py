"""The shard writer: every byte in all destinations, correct digests, and a journal that names durable data only."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from mergeloom.engine.run.plan import Options, Plan
from mergeloom.engine.run.planning import plan
from mergeloom.engine.run.recovery.recover import RecoveredState, recover
from mergeloom.engine.run.shard_writer import ShardWriter, records_of
from mergeloom.engine.run.transfers import Transfer, plan_transfers
from mergeloom.io.counters import IoCounters
from mergeloom.io.output.digests import tensor_digest
from mergeloom.io.output.directory import OutputDirectory, ShardFile
from mergeloom.io.output.group_commit import Aborted
from mergeloom.io.output.journal import Journal, read_journal
from mergeloom.io.task_group import TaskGroup
from tests.support.merges.small import make_blocks_small
from tests.support.models import write_checkpoint

BLOCK = 16 << 10
SIZES = {"a.weight": (50, 1000), "b.weight": (4096,), "c.weight": (3,), "d.weight": (0, 4), "e.weight": (8192,)}


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    make_blocks_small(monkeypatch)


class Writer:
    """A shard writer for a plan, with random data for each node."""

    def __init__(self, planned: Plan, out: Path, **options: Any) -> None:
        self.plan = planned
        self.graph, self.layout = planned.built.graph, planned.layout
        self.out = OutputDirectory.open(out)
        shards = [ShardFile(each.name, each.header, each.nbytes, each.computed) for each in self.layout.shards]
        self.out.begin(shards)
        self.counters = IoCounters()
        self.durable = recover(
            self.out.lock.journal, self.graph, self.layout, self.out.shard_path, counters=self.counters
        )
        self.journal = Journal(
            self.out.lock.journal_path, {"seed": 0}, (record.to_json() for record in records_of(self.durable))
        )
        self.group = TaskGroup("test")
        self.shards = ShardWriter(planned, self.out, self.journal, self.durable, lambda: None, self.group, **options)
        self.data = {node: random.Random(node).randbytes(self.graph.nbytes(node)) for node in self.graph}

    def write(self, node: int, start: int, end: int) -> None:
        """Write a range of a node."""
        self.shards.write(node, start, memoryview(self.data[node])[start:end])

    def close(self) -> None:
        """Stop the writer, and release OUT."""
        self.shards.stop()
        self.shards.abandon()
        self.journal.close()
        self.out.close()

    def destinations(self, node: int) -> Iterator[tuple[Path, int]]:
        """Shard and offset of each destination of a node."""
        for output in self.graph.destinations()[node]:
            yield self.out.shard_path(self.layout.shard_of[output]), self.layout.offset_of[output]

    def check_complete(self) -> None:
        """All data must be in all destinations, with correct digests."""
        for node, data in self.data.items():
            for file, offset in self.destinations(node):
                assert file.read_bytes()[offset : offset + len(data)] == data
            if node in self.shards.digests:
                expected = [digest_of(data[start : start + BLOCK]) for start in range(0, len(data), BLOCK)]
                assert self.shards.digests[node] == expected

    def check_journal(self) -> RecoveredState:
        """Data that the journal names must be in the shards already."""
        found = read_journal(self.out.lock.journal_path)
        durable = recover(found, self.graph, self.layout, self.out.shard_path)
        assert durable.damaged == 0
        for node, nbytes in durable.done(self.graph, self.layout).items():
            for file, offset in self.destinations(node):
                assert file.read_bytes()[offset : offset + nbytes] == self.data[node][:nbytes]
        return durable


def digest_of(data: bytes) -> bytes:
    """The digest of a block."""
    import xxhash

    return bytes(xxhash.xxh3_128_digest(data))


@pytest.fixture
def planned(tmp_path: Path) -> Plan:
    """A plan with every tensor in two destinations."""
    return make_plan(tmp_path, dtype="bfloat16")


def make_plan(tmp_path: Path, **more: str) -> Plan:
    """Plan a merge with every tensor in two destinations. With another dtype, the tensors are computed."""
    shapes = {f"model.layers.{layer}.{name}": shape for layer in range(2) for name, shape in SIZES.items()}
    model = write_checkpoint(tmp_path / "model", shapes, dtype="F32", fill=1)
    slices = [{"sources": [{"model": str(model), "layer_range": [0, 2]}]}] * 2
    options = Options(device="cpu", threads=1, max_ram=4 << 30, shard_size=300_000)
    found = plan({"merge_method": "passthrough", "slices": slices, **more}, options)
    assert all(len(places) == 2 for places in found.built.graph.destinations())
    assert len(found.layout.shards) > 1
    return found


@pytest.mark.parametrize("seed", range(6))
def test_chunks_of_all_sizes_from_many_threads(seed: int, planned: Plan, tmp_path: Path) -> None:
    writer = Writer(planned, tmp_path / "out", group_bytes=(8 << 10, 100 << 10, 1 << 30)[seed % 3])
    chance = random.Random(seed)
    pieces = []
    for node, data in writer.data.items():
        cuts = sorted({0, len(data), *(chance.randrange(len(data) + 1) for _ in range(chance.randrange(12)))})
        pieces.append([(node, start, end) for start, end in pairwise(cuts)])
    lock, queue = threading.Lock(), [piece for node in pieces for piece in node]

    def work() -> None:
        while True:
            with lock:
                if not queue:
                    return
                piece = queue.pop(0)
            writer.write(*piece)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(5):
        writer.check_journal()
    for thread in threads:
        thread.join()
    for node in writer.data:
        writer.shards.finished(node)
    writer.shards.commits.close()
    assert writer.group.error is None
    writer.check_complete()
    durable = writer.check_journal()
    assert {node: tensor_digest(blocks) for node, blocks in durable.complete.items()} == {
        node: tensor_digest(blocks) for node, blocks in writer.shards.digests.items() if writer.data[node]
    }
    assert not durable.partial
    writer.close()


@pytest.mark.parametrize("seed", range(8))
def test_resuming_with_chunks_of_another_size(seed: int, planned: Plan, tmp_path: Path) -> None:
    """Interrupted at random, and resumed with chunks of other sizes that overlap the durable data."""
    chance = random.Random(seed)
    for _ in range(100):
        writer = Writer(planned, tmp_path / "out", group_bytes=64 << 10)
        done = writer.durable.done(writer.graph, writer.layout)
        left = [node for node, data in writer.data.items() if done.get(node, 0) < len(data)]
        if not left:
            break
        for node in left:
            length = chance.choice((1000, 7000, BLOCK, 50_000))
            data = writer.data[node]
            first = done.get(node, 0) // length * length
            stop = len(data) if chance.random() < 0.5 else chance.randrange(len(data))
            for start in range(first, stop, length):
                writer.write(node, start, min(start + length, len(data)))
        if chance.random() < 0.7:
            writer.shards.commits.close()
        writer.check_journal()
        writer.close()
    else:
        pytest.fail("the merge was never completed")
    writer.check_complete()
    assert all(writer.durable.complete[node] for node, data in writer.data.items() if data)
    writer.close()


def test_durable_data_is_not_written_again(planned: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = Writer(planned, tmp_path / "out", group_bytes=64 << 10)
    node = max(writer.data, key=lambda each: len(writer.data[each]))
    writer.write(node, 0, 40_000)
    writer.shards.commits.close()
    writer.close()
    writer = Writer(planned, tmp_path / "out")
    assert writer.durable.done(writer.graph, writer.layout)[node] == 40_000
    written: list[tuple[int, int]] = []
    monkeypatch.setattr(OutputDirectory, "write", lambda self, shard, offset, data: written.append((offset, len(data))))
    writer.write(node, 0, 30_000)
    writer.write(node, 30_000, 50_000)
    offsets = [offset for _, offset in writer.destinations(node)]
    assert sorted(written) == sorted((offset + 40_000, 10_000) for offset in offsets)
    writer.close()


def test_a_failed_write_aborts_the_chunks_after_it(
    planned: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = Writer(planned, tmp_path / "out", group_bytes=1 << 20)

    def fail(self: OutputDirectory, shard: int, offset: int, data: memoryview) -> None:
        raise OSError(os.strerror(5))

    monkeypatch.setattr(OutputDirectory, "write", fail)
    node = max(writer.data, key=lambda each: len(writer.data[each]))
    ends: list[BaseException] = []

    def wait() -> None:
        try:
            writer.write(node, 50_000, 60_000)  # the chunk before it is never digested
        except Aborted as error:
            ends.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    with pytest.raises(OSError, match="Input/output"):
        writer.write(node, 0, 40_000)
    thread.join()
    assert [type(end) for end in ends] == [Aborted]
    assert str(writer.group.error) == "Input/output error"
    writer.close()


def test_an_incomplete_node_has_no_digest(planned: Plan, tmp_path: Path) -> None:
    writer = Writer(planned, tmp_path / "out")
    node = max(writer.data, key=lambda each: len(writer.data[each]))
    writer.write(node, 0, 40_000)
    with pytest.raises(RuntimeError, match=r"40000 of \d+ bytes were written"):
        writer.shards.finished(node)
    writer.close()


def test_copies_can_be_resumed(tmp_path: Path) -> None:
    planned = make_plan(tmp_path)
    writer = Writer(planned, tmp_path / "out")
    copying = [node for node, data in writer.data.items() if data]
    whole = plan_transfers(writer.graph, writer.layout, set(copying), set())
    target, nbytes = whole[0].target, whole[0].nbytes
    ranges = [(target, target + 100), (target + 300, target + 400), (target + 90, target + 150)]
    for start, end in ranges:
        copy(writer, whole[0], start, end)
    writer.journal.append([{"copied": [whole[0].shard, *each]} for each in ranges])
    writer.close()
    writer = Writer(planned, tmp_path / "out")
    assert writer.durable.copied == {whole[0].shard: [(target, target + 150), (target + 300, target + 400)]}
    left = writer.durable.uncopied(whole)
    pieces = [(each.target - target, each.nbytes, each.offset - whole[0].offset) for each in left[:2]]
    assert pieces == [(150, 150, 150), (400, nbytes - 400, 400)]
    assert left[2:] == whole[1:]
    assert writer.durable.done(writer.graph, writer.layout) == {}
    for each in left:
        copy(writer, each, each.target, each.target + each.nbytes)
    writer.journal.append([{"copied": [each.shard, each.target, each.target + each.nbytes]} for each in left])
    writer.close()
    writer = Writer(planned, tmp_path / "out")
    assert writer.durable.uncopied(whole) == []
    assert writer.durable.differing == 0
    assert writer.counters == IoCounters(bytes_checked=2 * sum(each.nbytes for each in whole))
    writer.out.write(whole[0].shard, target + 700, memoryview(b"damaged"))
    writer.close()
    writer = Writer(planned, tmp_path / "out")
    (left,) = writer.durable.uncopied(whole)
    assert (left.shard, left.file) == (whole[0].shard, whole[0].file)
    assert left.target <= target + 700 < left.target + left.nbytes
    assert writer.durable.differing == left.nbytes
    writer.close()


def copy(writer: Writer, transfer: Transfer, start: int, end: int) -> None:
    """Copy the bytes [start, end) of a shard from a transfer's source."""
    offset = transfer.offset + start - transfer.target
    data = transfer.file.read_bytes()[offset : offset + end - start]
    writer.out.write(transfer.shard, start, memoryview(data))
