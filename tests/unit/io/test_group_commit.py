"""Group commits: data is synced before it is journaled, reservations are bounded and fair, and no error is lost."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Collection, Iterator
from typing import Any

import pytest

from mergeloom.io.output.group_commit import Aborted, GroupCommit
from mergeloom.io.task_group import TaskGroup
from tests.support.waiting import no_hang, wait_until


class Recorder:
    """Records the calls of a GroupCommit to a slow disk."""

    def __init__(self, seconds: float = 0.0, **options: Any) -> None:
        self.seconds = seconds
        self.events: list[tuple[str, Any]] = []
        self.group = TaskGroup("test")
        self.gate = threading.Event()
        self.gate.set()
        self.commits: GroupCommit[int] = GroupCommit(self._sync, self._append, self.group, **options)

    def _sync(self, shards: Collection[int]) -> None:
        self.gate.wait()
        time.sleep(self.seconds)
        self.events.append(("sync", set(shards)))

    def _append(self, records: Collection[int]) -> None:
        self.events.append(("append", list(records)))

    def write(self, nbytes: int, number: int, shard: int = 0, used: int | None = None) -> None:
        """Reserve bytes, write them, and add a record."""
        with self.commits.writing(nbytes):
            self.events.append(("write", number))
        self.commits.add({shard}, nbytes, [number], nbytes if used is None else used)

    def journaled(self) -> list[int]:
        """Numbers of the records in the journal, in order."""
        return [number for kind, value in self.events if kind == "append" for number in value]


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    before = threading.active_count()
    with no_hang():
        yield
    wait_until(lambda: threading.active_count() == before)


def test_nothing_is_journaled_before_it_is_synced() -> None:
    recorder = Recorder(group_bytes=100)
    for number in range(50):
        recorder.write(17, number, shard=number % 3)
    recorder.commits.close()
    assert recorder.journaled() == list(range(50))
    assert [kind for kind, _ in recorder.events if kind != "write"][::2] == ["sync"] * recorder.commits.commits
    unsynced: set[int] = set()
    synced: set[int] = set()
    for kind, value in recorder.events:
        if kind == "write":
            unsynced.add(value)
        elif kind == "sync":
            synced = {number for number in unsynced if number % 3 in value}
        else:
            assert set(value) <= synced
            unsynced -= set(value)
    assert recorder.commits.peak <= 100


def test_old_writes_are_committed() -> None:
    recorder = Recorder(group_seconds=0.05)
    recorder.write(1, 0)
    wait_until(lambda: recorder.journaled() == [0])
    recorder.write(1, 1)
    wait_until(lambda: recorder.journaled() == [0, 1])
    recorder.commits.close()


def test_many_threads_never_reserve_more_than_a_group() -> None:
    """Reservations of all sizes at random times. A lost wake-up would hang the test."""
    recorder = Recorder(0.0005, group_bytes=1000, group_seconds=60)
    numbers = iter(range(10**6))

    def write(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(60):
            nbytes = chance.choice((1, 10, 300, 500, 999, 1000))
            recorder.write(nbytes, next(numbers), used=chance.choice((nbytes, nbytes, 0)))
            if chance.random() < 0.1:
                time.sleep(0.001)

    threads = [threading.Thread(target=write, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    recorder.commits.close()
    assert sorted(recorder.journaled()) == list(range(480))
    assert recorder.commits.peak <= 1000
    assert recorder.group.error is None


def test_a_write_larger_than_a_group_is_committed_alone() -> None:
    recorder = Recorder(group_bytes=100, group_seconds=60)
    recorder.write(60, 0)
    recorder.write(5000, 1)
    recorder.write(60, 2)
    recorder.commits.close()
    assert [value for kind, value in recorder.events if kind == "append"] == [[0], [1], [2]]


def test_writing_continues_during_a_sync_up_to_the_limit() -> None:
    recorder = Recorder(group_bytes=100, group_seconds=60)
    recorder.gate.clear()
    recorder.write(50, 0)  # its commit is in progress
    wait_until(lambda: recorder.commits._written == 0)
    recorder.write(50, 1)
    thread = threading.Thread(target=recorder.write, args=(1, 2))
    thread.start()
    wait_until(lambda: len(recorder.commits._waiting) == 1)
    assert ("write", 2) not in recorder.events
    recorder.gate.set()
    thread.join()
    recorder.commits.close()
    assert recorder.journaled() == [0, 1, 2]


def test_waiting_threads_are_served_in_order() -> None:
    """Small reservations do not overtake a large one."""
    recorder = Recorder(group_bytes=100, group_seconds=60)
    recorder.gate.clear()
    recorder.write(60, 0)
    order: list[int] = []
    threads = []
    for number, nbytes in enumerate((90, 5, 5), 1):
        thread = threading.Thread(target=lambda n=number, b=nbytes: (recorder.write(b, n), order.append(n)))
        thread.start()
        threads.append(thread)
        wait_until(lambda n=number: len(recorder.commits._waiting) == n)
    recorder.gate.set()
    for thread in threads:
        thread.join()
    recorder.commits.close()
    written = [value for kind, value in recorder.events if kind == "write"]
    assert written == [0, 1, 2, 3]


@pytest.mark.parametrize("where", ["sync", "append"])
def test_an_error_reaches_the_group_and_aborts_all_waiting_threads(where: str) -> None:
    recorder = Recorder(group_bytes=100, group_seconds=60)

    def fail(what: object) -> None:
        raise OSError("no disk")

    setattr(recorder.commits, f"_{where}", fail)
    seen: list[BaseException | None] = []

    def write() -> None:
        with contextlib.suppress(Aborted):
            for number in range(100):
                recorder.write(40, number)
        seen.append(recorder.group.error)

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [str(error) for error in seen] == ["no disk"] * 4  # every thread that is aborted finds the reason
    recorder.commits.close()
    assert recorder.commits.abandon()


def test_a_failed_write_releases_its_bytes() -> None:
    recorder = Recorder(group_bytes=100, group_seconds=60)
    with pytest.raises(OSError, match="full"), recorder.commits.writing(100):
        raise OSError("full")
    recorder.write(100, 0)  # does not wait
    recorder.commits.close()
    assert recorder.journaled() == [0]


def test_abandoning_journals_nothing_more() -> None:
    recorder = Recorder(group_bytes=100, group_seconds=60)
    recorder.gate.clear()
    recorder.write(60, 0)
    wait_until(lambda: recorder.commits._written == 0)
    recorder.write(30, 1)

    def wait() -> None:
        with pytest.raises(Aborted):
            recorder.write(50, 2)

    waiting = threading.Thread(target=wait)
    waiting.start()
    over: list[bool] = []
    with no_hang():
        assert not recorder.commits.abandon()  # a sync is in progress
    recorder.commits.on_closed(lambda: over.append(True))
    assert not over
    recorder.gate.set()
    waiting.join()
    wait_until(lambda: over == [True])
    assert recorder.journaled() == []
    assert recorder.commits.abandon()
    recorder.commits.on_closed(lambda: over.append(True))
    assert over == [True, True]
    assert recorder.group.error is None
    with pytest.raises(Aborted):
        recorder.write(1, 3)


def test_few_records_wait_for_their_commit() -> None:
    """Small tensors make many records before they have written many bytes."""
    recorder = Recorder(group_records=10, group_seconds=1e6)
    recorder.gate.clear()
    threads = [threading.Thread(target=lambda: [recorder.write(1, number) for number in range(50)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    wait_until(lambda: recorder.commits.peak_records >= 10)
    recorder.gate.set()
    for thread in threads:
        thread.join()
    recorder.commits.close()
    assert sorted(recorder.journaled()) == sorted(list(range(50)) * 4)
    assert recorder.commits.peak_records < 10 + len(threads)  # each may have reserved before the limit was reached
    assert recorder.commits.commits >= 200 // (10 + len(threads))


@pytest.mark.parametrize("shards", [set(), {0}])
def test_records_without_unsynced_data_are_committed_when_the_limit_is_reached(shards: set[int]) -> None:
    """A writer that waits for room would wait forever if only data made a commit due."""
    recorder = Recorder(group_records=4, group_seconds=1e6)
    for number in range(4):
        recorder.commits.add(shards, 0, [number], 0)
    writer = threading.Thread(target=recorder.commits.reserve, args=(0,), daemon=True)
    writer.start()
    try:
        wait_until(lambda: not writer.is_alive())
        recorder.commits.release(0)
        recorder.commits.add(set(), 0, [4], 0)
    finally:
        recorder.commits.close()
    assert recorder.journaled() == [0, 1, 2, 3, 4]
    assert [kind for kind, _ in recorder.events].count("sync") <= len(shards) * 2  # nothing else needs to be synced
