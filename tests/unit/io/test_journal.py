"""The journal: durable records are read back, damaged ones are ignored, and no content is trusted."""

from __future__ import annotations

import errno
import json
import tracemalloc
from pathlib import Path

import pytest
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mergeloom.io.output import journal as journal_module
from mergeloom.io.output.journal import FORMAT, Journal, JournalContent, StoredRecords, read_journal
from tests.support.faults import Fail, Kill, Stopped, watching

FACTS = {"recipe": "línea: 1\n", "seed": 0}
RECORDS = [{"node": number, "first": 0, "blocks": ["ab" * 16] * number} for number in range(5)]


def written(path: Path) -> bytes:
    """A journal with all the records."""
    journal = Journal(path, FACTS)
    journal.append(RECORDS[:2])
    journal.append([])
    journal.append(RECORDS[2:])
    assert journal.records == 5
    journal.close()
    return path.read_bytes()


def test_appended_records_are_read_back(tmp_path: Path) -> None:
    written(tmp_path / "journal")
    found = read_journal(tmp_path / "journal")
    assert found == JournalContent({**FACTS, "format": FORMAT}, tuple(RECORDS))
    assert found.readable
    assert [path.name for path in tmp_path.iterdir()] == ["journal"]


def test_a_missing_journal(tmp_path: Path) -> None:
    assert read_journal(tmp_path / "journal") is None
    (tmp_path / "file").write_text("")
    assert read_journal(tmp_path / "file" / "journal") is None


def test_a_torn_last_line_is_ignored(tmp_path: Path) -> None:
    data = written(tmp_path / "whole")
    lines = data.splitlines(keepends=True)
    for size in range(len(data) + 1):
        (tmp_path / "journal").write_bytes(data[:size])
        found = read_journal(tmp_path / "journal")
        assert found is not None
        whole = sum(size >= sum(map(len, lines[: number + 1])) for number in range(len(lines)))
        assert found.readable == (whole > 0)
        assert list(found.records) == RECORDS[: max(0, whole - 1)]


def test_lines_after_a_damaged_one_are_ignored(tmp_path: Path) -> None:
    data = written(tmp_path / "whole")
    ends = [number for number, byte in enumerate(data) if byte == 10]
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= 1
        (tmp_path / "journal").write_bytes(damaged)
        found = read_journal(tmp_path / "journal")
        assert found is not None
        before = sum(end < position for end in ends)
        assert list(found.records) == RECORDS[: max(0, before - 1)]
        assert found.readable == (before > 0)


def test_a_new_journal_replaces_an_old_one_atomically(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    written(path)
    for after in range(20):
        kill = Kill(after, torn=True)
        with watching(kill):
            try:
                journal = Journal(path, {"seed": 1}, RECORDS[:1])
            except Stopped:
                pass
            else:
                journal.close()
        found = read_journal(path)
        assert found is not None
        if found.facts["seed"] == 1:
            assert found.records == tuple(RECORDS[:1])
            break
        assert found.records == tuple(RECORDS)
    assert after > 2
    assert kill.calls == ["create", "write", "sync", "rename", "sync_directory"]  # the last one didn't get through


def test_nothing_is_appended_after_a_failure(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal", FACTS)
    with watching(Fail(errno.ENOSPC, 0, "write", partly=True)), pytest.raises(OSError, match="No space"):
        journal.append(RECORDS)
    with pytest.raises(ValueError, match="closed"):
        journal.append(RECORDS)
    journal.close()
    journal.close()
    with pytest.raises(ValueError, match="closed"):
        journal.append(RECORDS)
    found = read_journal(tmp_path / "journal")
    assert found is not None
    assert found.readable
    assert len(found.records) < 5


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(st.one_of(st.binary(max_size=60), st.sampled_from([b"[]", b"1", b"{}", b'{"format": 2}', b"[" * 4000])))
)
def test_any_content_can_be_read(tmp_path: Path, contents: list[bytes]) -> None:
    """Lines with a right digest, too, whatever they hold."""
    lines = [xxhash.xxh3_64_hexdigest(content).encode() + b" " + content + b"\n" for content in contents]
    (tmp_path / "journal").write_bytes(b"".join(lines) + b"rest")
    found = read_journal(tmp_path / "journal")
    assert found is not None
    assert all(isinstance(json.loads(json.dumps(record)), dict) for record in (found.facts, *found.records))


def test_records_are_kept_as_text(tmp_path: Path) -> None:
    """A parsed record takes ten times as much memory, and a merge has one for each tensor that it reads or writes."""
    count = 3000
    records = [{"node": number, "first": 0, "blocks": [f"{number:032x}"]} for number in range(count)]
    Journal(tmp_path / "journal", FACTS, records).close()
    read_journal(tmp_path / "journal")
    tracemalloc.start()
    found = read_journal(tmp_path / "journal")
    assert found is not None
    for number, record in enumerate(found.records):
        assert record["node"] == number
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 120 * count
    assert peak < 250 * count  # the text is copied when it grows
    assert isinstance(found.records, StoredRecords)
    assert found.records.nbytes < 100 * count
    assert found.records[-1] == records[-1]
    assert found.records[5:7] == records[5:7]
    assert found.records != records[:-1]
    assert found.records != [*records[:-1], {}]


def test_many_records_are_written_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_module, "_PIECE_BYTES", 1000)
    records = [{"node": number} for number in range(500)]
    kill = Kill(10**9)
    with watching(kill):
        journal = Journal(tmp_path / "journal", FACTS)
        before = len(kill.calls)
        journal.append(iter(records))
    calls = kill.calls[before:]
    assert len(calls) > 10
    assert calls == ["write"] * (len(calls) - 1) + ["sync"]
    assert journal.records == 500
    journal.close()
    found = read_journal(tmp_path / "journal")
    assert found is not None
    assert list(found.records) == records
