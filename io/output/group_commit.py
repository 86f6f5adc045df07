"""Group commits: written data is synced in groups, and recorded in the journal only then."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

from ..task_group import TaskGroup

GROUP_BYTES = 1 << 30
"""Default maximum number of bytes that are written and not yet committed."""
GROUP_RECORDS = 4096
"""Maximum number of records that wait for their commit, unless a single `add` has more: each takes memory, and small
tensors make many of them before `GROUP_BYTES` are written."""
GROUP_SECONDS = 5.0
"""Maximum time in seconds that written bytes wait for their commit."""
ABANDON_SECONDS = 1.0
"""Time in seconds that `abandon` waits for a commit in progress."""

Record = TypeVar("Record")


class Aborted(Exception):
    """Nothing more is committed: the merge is being stopped, or a commit has failed."""


class GroupCommit(Generic[Record]):
    """Commits written data in a thread.

    Bytes are reserved before they are written, and stay reserved until they are committed. At most `group_bytes` are
    reserved at a time, except for a single reservation that is larger. Each commit takes about half of them, so the
    writers can fill the other half meanwhile. In the same way, nothing is reserved while `group_records` records wait.

    Args:
        sync: function that makes the shards with these numbers durable.
        append: function that makes records durable; called after `sync`.
        group: task group that gets the error of either; nothing is committed after an error.
        group_bytes: maximum number of bytes that a kill can lose.
        group_records: maximum number of records that are added and not yet durable; each writer may add to it once.
        group_seconds: maximum time in seconds that written bytes wait for their commit.
    """

    def __init__(
        self,
        sync: Callable[[Collection[int]], None],
        append: Callable[[Collection[Record]], None],
        group: TaskGroup,
        *,
        group_bytes: int = GROUP_BYTES,
        group_records: int = GROUP_RECORDS,
        group_seconds: float = GROUP_SECONDS,
    ) -> None:
        self._sync = sync
        self._append = append
        self._group = group
        self._limit = max(2, group_bytes)
        self._max_records = max(2, group_records)
        self._seconds = group_seconds
        self._changed = threading.Condition()
        self._reserved = 0  # bytes reserved, written, or being committed
        self._waiting: deque[object] = deque()  # tickets of the threads that wait to reserve, first come, first served
        self._written = 0  # bytes that the next commit takes
        self._shards: set[int] = set()
        self._records: list[Record] = []
        self._committing = 0  # number of records that the commit in progress makes durable
        self._oldest = 0.0
        self._closing = False
        self._stopped = False
        self._closed = False  # the thread has ended
        self._on_closed: Callable[[], None] = _do_nothing
        self.seconds = 0.0
        """Total duration of the commits in seconds."""
        self.commits = 0
        """Number of commits."""
        self.peak = 0
        """Maximum number of bytes that were reserved at a time."""
        self.peak_records = 0
        """Maximum number of records that waited for their commit at a time."""
        self._thread = threading.Thread(target=self._run, name="commit", daemon=True)
        self._thread.start()

    @property
    def max_reservation(self) -> int:
        """Maximum number of bytes that a caller should reserve at a time: half of the limit."""
        return self._limit // 2

    @contextmanager
    def writing(self, nbytes: int) -> Iterator[None]:
        """Reserve bytes, in turn, for the writes inside the block; `add` them afterwards.

        If the block fails, the bytes are released, so no other thread waits for them.

        Raises:
            Aborted: nothing more is committed.
        """
        self.reserve(nbytes)
        try:
            yield
        except BaseException:
            self.release(nbytes)
            raise

    def release(self, nbytes: int) -> None:
        """Release bytes that were reserved and will not be written."""
        with self._changed:
            self._reserved -= nbytes
            self._changed.notify_all()

    def reserve(self, nbytes: int) -> None:
        """Wait, in turn, until this many more bytes may be written; then `add` or `release` them. Raises Aborted."""
        ticket = object()
        with self._changed:
            self._waiting.append(ticket)
            self._changed.notify_all()  # a waiting thread makes a commit due
            try:
                while not self._stopped and (self._waiting[0] is not ticket or not self._has_room(nbytes)):
                    self._changed.wait()
            finally:
                self._waiting.remove(ticket)
                self._changed.notify_all()
            if self._stopped:
                raise Aborted
            self._reserved += nbytes
            self.peak = max(self.peak, self._reserved)

    def _has_room(self, nbytes: int) -> bool:
        if self._reserved and self._reserved + nbytes > self._limit:
            return False
        return len(self._records) + self._committing < self._max_records

    def add(self, shards: Collection[int], reserved: int, records: Collection[Record], written: int) -> None:
        """Add reserved bytes that have been written to the next commit, with their records.

        Args:
            shards: numbers of the shards that they were written to.
            reserved: number of bytes that were reserved for them.
            records: records that become true once the shards are durable.
            written: number of bytes that were written; fewer than reserved if blocks were shared instead.
        """
        with self._changed:
            self._reserved -= reserved - written
            if not self._has_work:
                self._oldest = time.monotonic()
            self._written += written
            self._shards.update(shards)
            self._records += records
            self.peak_records = max(self.peak_records, len(self._records) + self._committing)
            self._changed.notify_all()

    def close(self) -> None:
        """Commit the rest, and end the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()

    def stop(self) -> None:
        """Start no more commits, and wake all threads that wait to reserve."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def abandon(self) -> bool:
        """Stop without another commit, except for one whose records are already being appended.

        Returns:
            Whether the thread has ended; on a slow disk it may still be syncing.
        """
        self.stop()
        self._thread.join(ABANDON_SECONDS)
        return not self._thread.is_alive()

    def on_closed(self, callback: Callable[[], None]) -> None:
        """Call a function once no commit is in progress: now, or from the thread when it ends."""
        with self._changed:
            if not self._closed:
                self._on_closed = callback
                return
        callback()

    @property
    def _has_work(self) -> bool:
        """Whether a commit has anything to do. Records may be added without a shard that has unsynced data: if they
        did not count, a writer would wait forever for the commit that makes room for more records."""
        return bool(self._shards or self._records)

    def _is_due(self) -> bool:
        if self._stopped or self._closing:
            return True
        if not self._has_work:
            return False
        is_old = time.monotonic() - self._oldest >= self._seconds
        is_full = self._written >= self.max_reservation or len(self._records) >= self._max_records // 2
        return is_old or is_full or bool(self._waiting)

    def _run(self) -> None:
        try:
            while self._commit():
                pass
        except BaseException as error:  # noqa: BLE001  the group raises it in the main thread
            if not self._stopped:
                self._group.fail(error)  # before any waiting thread is woken by the end of the commits
        finally:
            with self._changed:
                self._stopped = self._closed = True
                self._changed.notify_all()
            self._on_closed()

    def _commit(self) -> bool:
        """Wait until a commit is due, and commit. Return whether another one may follow."""
        with self._changed:
            while not self._is_due():
                left = self._oldest + self._seconds - time.monotonic()
                self._changed.wait(max(0.0, left) if self._has_work else None)
            if self._stopped or not self._has_work:
                return False
            shards, records, nbytes = self._shards, self._records, self._written
            self._shards, self._records, self._written = set(), [], 0
            self._committing = len(records)
        start = time.perf_counter()
        if shards:
            self._sync(shards)
        if self._stopped:
            return False
        self._append(records)
        records.clear()
        self.seconds += time.perf_counter() - start
        self.commits += 1
        with self._changed:
            self._reserved -= nbytes
            self._committing = 0
            self._changed.notify_all()
        return True


def _do_nothing() -> None:
    """Do nothing when the commits end; the default of `GroupCommit.on_closed`."""
