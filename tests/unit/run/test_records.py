"""Journal records: their form on disk, and what a reader makes of unknown, malformed and misplaced ones."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mergeloom.engine.graph.graph import MergeGraph
from mergeloom.engine.graph.layout import Layout, lay_out
from mergeloom.engine.run.plan import Options
from mergeloom.engine.run.planning import plan
from mergeloom.engine.run.recovery.records import (
    BlocksWritten,
    JournalRecord,
    Publishing,
    RangeCopied,
    SourceRange,
    SourceRead,
    Tail,
    block_count,
    parse_records,
)
from tests.support.merges.small import make_blocks_small
from tests.support.models import write_checkpoint

A, B, C = bytes(range(16)), bytes(range(16, 32)), bytes(16)
BLOCK = 16 << 10
NBYTES = 50 * 1000 * 4
"""Size of the only tensor: 12 blocks, and 3392 bytes of a 13th."""

RECORDS: list[tuple[JournalRecord, dict[str, Any]]] = [
    (
        SourceRead(0, (SourceRange(0, 300, 100, 255), SourceRange(400, 401, 1, (1 << 128) - 1))),
        {"source": 0, "ranges": [[0, 300, 100, f"{255:032x}"], [400, 401, 1, "f" * 32]]},
    ),
    (BlocksWritten(0, 10, (A, B, C)), {"node": 0, "first": 10, "blocks": [A.hex(), B.hex(), C.hex()]}),
    (
        BlocksWritten(0, 11, (A,), Tail(3391, B)),
        {"node": 0, "first": 11, "blocks": [A.hex()], "tail": [3391, B.hex()]},
    ),
    (BlocksWritten(0, 0, (), Tail(1, C)), {"node": 0, "first": 0, "blocks": [], "tail": [1, C.hex()]}),
    (RangeCopied(0, 100, 200_000), {"copied": [0, 100, 200_000]}),
    (Publishing(("model.safetensors", "b/config.json")), {"publish": ["model.safetensors", "b/config.json"]}),
]
IDS = [f"{type(record).__name__}{number}" for number, (record, _) in enumerate(RECORDS)]


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[MergeGraph, Layout]]:
    """The graph and the layout of a model with one tensor, with small blocks."""
    model = write_checkpoint(tmp_path_factory.mktemp("model"), {"w.weight": (50, 1000)}, dtype="F32", fill=1)
    recipe = {"merge_method": "passthrough", "models": [{"model": str(model)}]}
    graph = plan(recipe, Options(device="cpu", max_ram=4 << 30)).built.graph
    with pytest.MonkeyPatch.context() as patch:
        make_blocks_small(patch)
        assert (graph.nbytes(0), block_count(graph, 0)) == (NBYTES, 13)
        yield graph, lay_out(graph, 1 << 30)


def parse(planned: tuple[MergeGraph, Layout], *stored: Any) -> list[JournalRecord]:
    """Parse records as a reader of the journal does."""
    return list(parse_records(json.loads(json.dumps(stored)), *planned))


@pytest.mark.parametrize(("record", "stored"), RECORDS, ids=IDS)
def test_the_form_on_disk(record: JournalRecord, stored: dict[str, Any], planned: tuple[MergeGraph, Layout]) -> None:
    """The bytes that other releases of the same journal format write and read."""
    assert json.dumps(record.to_json()) == json.dumps(stored)
    assert parse(planned, stored) == [record]


def mutations(value: Any) -> Iterator[Any]:
    """Every change of one value: of another type, out of range, too long, too short, or missing."""
    if isinstance(value, dict):
        for key in value:
            yield {name: each for name, each in value.items() if name != key}
            yield {f"{name}x" if name == key else name: each for name, each in value.items()}
            yield from ({**value, key: changed} for changed in mutations(value[key]))
    elif isinstance(value, list):
        yield from (None, 5, "abc", {})
        for index, entry in enumerate(value):
            yield value[:index] + value[index + 1 :]
            yield from ([*value[:index], changed, *value[index + 1 :]] for changed in mutations(entry))
    elif isinstance(value, int):
        yield from (None, str(value), float(value), [value], True, -1, value + 10**9, 10**30)
    else:
        yield from (None, 7, [value], value[:-1], f"{value}00", "x" * len(value), f"{value[:-1]}/")


def is_valid(record: JournalRecord) -> bool:
    """Whether every number in a record exists in the plan."""
    match record:
        case SourceRead(read, ranges):
            return read == 0 and all(
                0 <= r.start < r.end <= NBYTES and 1 <= r.chunk <= r.end - r.start and 0 <= r.digest < 1 << 128
                for r in ranges
            )
        case BlocksWritten(node, first, blocks, tail):
            end = first + len(blocks)
            left = min(BLOCK, NBYTES - end * BLOCK)
            fits = node == 0 and first >= 0 and end <= 13 and all(len(block) == 16 for block in blocks)
            return fits and (tail is None or (0 < tail.nbytes < left and len(tail.digest) == 16))
        case RangeCopied(shard, start, end):
            return shard == 0 and 0 <= start <= end
        case Publishing(names):
            return all(isinstance(name, str) for name in names)


@pytest.mark.parametrize(("record", "stored"), RECORDS, ids=IDS)
def test_a_changed_record_is_ignored_or_read_as_what_it_says(
    record: JournalRecord, stored: dict[str, Any], planned: tuple[MergeGraph, Layout]
) -> None:
    """Every change is seen, and none yields a number that the plan does not have."""
    for changed in mutations(stored):
        for found in parse(planned, changed):
            assert type(found) is type(record), changed
            assert found != record, changed
            assert is_valid(found), changed


@pytest.mark.parametrize(
    "stored",
    [
        {"node": 1, "first": 0, "blocks": []},
        {"node": 0, "first": 0, "blocks": [], "tail": [0, A.hex()]},
        {"node": 0, "first": 0, "blocks": [], "tail": [BLOCK, A.hex()]},
        {"node": 0, "first": 12, "blocks": [], "tail": [NBYTES - 12 * BLOCK, A.hex()]},  # a complete block
        {"node": 0, "first": 13, "blocks": [], "tail": [1, A.hex()]},
        {"node": 0, "first": 13, "blocks": [A.hex()]},
        {"node": True, "first": 0, "blocks": []},
        {"source": 1, "ranges": []},
        {"copied": [0, 200, 100]},
        {"copied": [0, 0, 10**9]},
        {"copied": [1, 0, 1]},
        {"copied": [0, 0, 1, 1]},
        {"node": 0, "first": 0, "blocks": [A.hex(), None]},
        {"node": 0, "first": 0, "blocks": [], "tail": [1, A.hex(), 1]},
        {"blocks": [], "first": 0, "node": 0},  # the first key determines the type
        {"deleted": [0, 1]},
        {},
    ],
)
def test_what_does_not_fit_the_plan_is_ignored(stored: dict[str, Any], planned: tuple[MergeGraph, Layout]) -> None:
    good = {"copied": [0, 0, 1]}
    assert parse(planned, good, stored, good) == [RangeCopied(0, 0, 1)] * 2


def test_malformed_entries_of_a_list_are_dropped(planned: tuple[MergeGraph, Layout]) -> None:
    """Each range is a promise of its own, and so is each name."""
    good = [0, 10, 10, A.hex()]
    ranges = [None, [*good, 1], [0, NBYTES + 1, 1, A.hex()], [5, 5, 1, A.hex()], [0, 10, 11, A.hex()], good]
    (read,) = parse(planned, {"source": 0, "ranges": ranges})
    assert read == SourceRead(0, (SourceRange(0, 10, 10, int(A.hex(), 16)),))
    assert parse(planned, {"publish": [None, "a", 1]}) == [Publishing(("a",))]


@pytest.mark.parametrize("seed", range(20))
def test_random_json_is_ignored(seed: int, planned: tuple[MergeGraph, Layout]) -> None:
    chance = random.Random(seed)
    keys = ("source", "ranges", "node", "first", "blocks", "tail", "copied", "publish")

    def value(depth: int) -> Any:
        if depth and chance.random() < 0.5:
            return [value(depth - 1) for _ in range(chance.randrange(4))]
        return chance.choice((0, 1, -1, 10**20, 0.5, None, "", A.hex(), "../x", True, {}, {"node": 0}))

    stored = [{chance.choice(keys): value(3) for _ in range(chance.randrange(6))} for _ in range(500)]
    assert all(is_valid(record) for record in parse(planned, *stored))


def test_each_record_is_a_line_of_the_journal(planned: tuple[MergeGraph, Layout], tmp_path: Path) -> None:
    """A line of the journal is a digest, a space, and the record without spaces."""
    import xxhash

    from mergeloom.io.output.journal import Journal

    Journal(tmp_path / "journal", {"seed": 0}, (record.to_json() for record, _ in RECORDS)).close()
    lines = (tmp_path / "journal").read_bytes().splitlines()
    for line, (_, stored) in zip(lines[1:], RECORDS, strict=True):
        content = json.dumps(stored, separators=(",", ":")).encode()
        assert line == xxhash.xxh3_64_hexdigest(content).encode() + b" " + content
