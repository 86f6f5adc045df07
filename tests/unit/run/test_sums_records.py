"""Records of sums over outputs: their form on disk, which ones a reader uses, and where they are in the journal."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from mergeloom.engine.execute.survival import Prefix
from mergeloom.engine.graph.graph import MergeGraph
from mergeloom.engine.graph.layout import Layout
from mergeloom.engine.run.plan import Options
from mergeloom.engine.run.planning import plan
from mergeloom.engine.run.recovery.records import BlocksWritten, JournalRecord, SumsWritten, parse_records
from mergeloom.engine.run.recovery.recover import RecoveredState
from mergeloom.engine.run.recovery.recovered_sums import covered_sums
from mergeloom.engine.run.recovery.reopen import is_finished, reopen_outputs
from mergeloom.engine.run.shard_writer import coalesce_records, records_of
from mergeloom.io.output.digests import BLOCK_BYTES
from mergeloom.methods.kernel.spec import BLOCK
from tests.support.models import FineTune, Random, write_checkpoint

SHAPE = (300, 1000)
COUNT = 300_000


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> tuple[MergeGraph, Layout]:
    """A merge of a tensor that is compared with the base (node 0), and of one that is not."""
    directory = tmp_path_factory.mktemp("models")
    models = [
        write_checkpoint(directory / name, {"w.weight": SHAPE}, dtype="BF16", fill=FineTune(Random(0), seed))
        for seed, name in enumerate("ab")
    ]
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": str(models[0]),
        "models": [{"model": str(models[1]), "parameters": {"weight": 0.5}}],
    }
    made = plan(recipe, Options(device="cpu", max_ram=4 << 30, survival=True))
    assert made.compared == 1
    return made.built.graph, made.layout


def parse(planned: tuple[MergeGraph, Layout], *stored: Any) -> list[JournalRecord]:
    """Parse records as a reader of the journal does."""
    return list(parse_records(json.loads(json.dumps(stored)), *planned))


def stored(**changes: Any) -> dict[str, Any]:
    """A record on disk."""
    return {"sums": 0, "elements": 2 * BLOCK, "values": [[1.5, 2.0**-80], []]} | changes


def test_the_form_on_disk(planned: tuple[MergeGraph, Layout]) -> None:
    for elements in (BLOCK, 2 * BLOCK, COUNT):
        record = SumsWritten(0, Prefix(elements, ((0.1, -3e-19), ())))
        assert record.to_json() == {"sums": 0, "elements": elements, "values": [[0.1, -3e-19], []]}
        assert parse(planned, record.to_json()) == [record]
    bad = SumsWritten(0, Prefix(COUNT, ((math.nan,), (math.nan,))))
    assert json.dumps(bad.to_json(), allow_nan=False)
    (found,) = parse(planned, bad.to_json())
    assert isinstance(found, SumsWritten)
    assert all(math.isnan(part) for parts in found.prefix.sums for part in parts)


@pytest.mark.parametrize(
    "changes",
    [
        {"sums": 1},
        {"sums": -1},
        {"sums": True},
        {"elements": 0},
        {"elements": BLOCK + 1},
        {"elements": COUNT + 1},
        {"elements": 10 * BLOCK},
        {"elements": 2.0 * BLOCK},
        {"values": [[1.5]]},
        {"values": [[1.5], [], []]},
        {"values": [1.5, 2.5]},
        {"values": [["1.5"], []]},
        {"values": [[True], []]},
        {"values": [[float("inf")], []]},
        {"values": None},
    ],
)
def test_what_does_not_fit_is_ignored(changes: dict[str, Any], planned: tuple[MergeGraph, Layout]) -> None:
    assert parse(planned, stored(**changes)) == []
    assert len(parse(planned, stored())) == 1


def test_sums_of_an_output_that_is_not_compared_are_ignored(planned: tuple[MergeGraph, Layout], tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model", {"w.weight": SHAPE}, dtype="F32", fill=1)
    recipe = {"merge_method": "passthrough", "models": [{"model": str(model)}]}
    made = plan(recipe, Options(device="cpu", max_ram=4 << 30, survival=True))
    assert parse((made.built.graph, made.layout), stored()) == []
    assert made.compared == 0


def test_only_the_last_sums_are_journaled_after_the_bytes() -> None:
    blocks = [BlocksWritten(0, number, (bytes(16),)) for number in range(3)]
    sums = [SumsWritten(node, Prefix(elements)) for node, elements in ((0, 1), (1, 1), (0, 2))]
    mixed = [sums[0], blocks[0], sums[1], blocks[1], sums[2], blocks[2]]
    assert coalesce_records(mixed) == [BlocksWritten(0, 0, (bytes(16),) * 3), sums[2], sums[1]]


def test_the_newest_sums_over_durable_bytes_are_used(planned: tuple[MergeGraph, Layout]) -> None:
    graph, _ = planned
    prefixes = [Prefix(elements, ((float(elements),), ())) for elements in (BLOCK, COUNT, 2 * BLOCK)]
    for written, wanted in ((2 * COUNT, 1), (2 * COUNT - 1, 2), (4 * BLOCK, 2), (4 * BLOCK - 1, 0), (2 * BLOCK, 0)):
        assert covered_sums({0: prefixes}, graph, {0: written}) == {0: prefixes[wanted]}
    assert covered_sums({0: prefixes}, graph, {0: 2 * BLOCK - 1}) == {}
    assert covered_sums({0: prefixes}, graph, {}) == {}


def test_an_output_without_its_sums_is_computed_again(planned: tuple[MergeGraph, Layout]) -> None:
    graph, _ = planned
    assert graph.nbytes(0) < BLOCK_BYTES
    for prefix, left in ((None, 0), (Prefix(3 * BLOCK), 6 * BLOCK), (Prefix(COUNT), 2 * COUNT)):
        state = RecoveredState(complete={0: [bytes(16)]}, survival={} if prefix is None else {0: prefix})
        done = {0: graph.nbytes(0)}
        reopen_outputs(state, graph, done)
        assert done == {0: left}
        assert is_finished(graph, 0, done) == (left == 2 * COUNT)
        assert list(state.complete) == ([0] if left == 2 * COUNT else [])
        assert [digests.position for digests in state.partial.values()] == ([] if left == 2 * COUNT else [2 * COUNT])
    written = list(records_of(RecoveredState(complete={0: [bytes(16)]}, survival={0: Prefix(COUNT)})))
    assert written == [BlocksWritten(0, 0, (bytes(16),)), SumsWritten(0, Prefix(COUNT))]
