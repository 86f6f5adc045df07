"""Group commits: synced before journaled, bounded, in turn; no wake-up is lost, and no error."""

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
    """What a GroupCommit does, with a disk that takes its time."""

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
        """Write so many bytes."""
        with self.commits.writing(nbytes):
            self.events.append(("write", number))
        self.commits.add({shard}, nbytes, [number], nbytes if used is None else used)

    def journaled(self) -> list[int]:
        """What the journal says."""
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


def test_what_waits_too_long_is_committed() -> None:
    recorder = Recorder(group_seconds=0.05)
    recorder.write(1, 0)
    wait_until(lambda: recorder.journaled() == [0])
    recorder.write(1, 1)
    wait_until(lambda: recorder.journaled() == [0, 1])
    recorder.commits.close()


def test_many_threads_never_hold_more_than_a_group() -> None:
    """Sizes of all kinds at random times; the test ends, so that no wake-up was lost."""
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


def test_what_is_larger_than_a_group_goes_alone() -> None:
    recorder = Recorder(group_bytes=100, group_seconds=60)
    recorder.write(60, 0)
    recorder.write(5000, 1)
    recorder.write(60, 2)
    recorder.commits.close()
    assert [value for kind, value in recorder.events if kind == "append"] == [[0], [1], [2]]


def test_writing_goes_on_while_the_disk_syncs_up_to_the_bound() -> None:
    recorder = Recorder(group_bytes=100, group_seconds=60)
    recorder.gate.clear()
    recorder.write(50, 0)  # is being committed
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


def test_those_who_wait_come_in_turn() -> None:
    """A large reservation is not overtaken for ever by small ones."""
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
def test_an_error_is_told_and_ends_all_waiting(where: str) -> None:
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


def test_a_write_that_fails_gives_its_bytes_back() -> None:
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
        assert not recorder.commits.abandon()  # it is being synced
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
