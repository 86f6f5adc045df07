"""Group commits: data is synced in groups, and only then named in the journal."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

GROUP_BYTES = 1 << 30
"""The most bytes that are written and not yet committed."""
GROUP_SECONDS = 5.0
"""How long written bytes wait for their commit, at most."""
ABANDON_SECONDS = 1.0
"""How long `abandon` waits for a commit that is under way."""

Record = Mapping[str, Any]


class Aborted(Exception):
    """Nothing more is committed: the merge is being stopped, or a commit has failed."""


class GroupCommit:
    """Commits what was written, on a thread of its own.

    Bytes are reserved before they are written, and held until they are committed: never more than `group_bytes`, but
    for a single reservation that is larger. Half of them are committed at a time, so that writing goes on meanwhile.

    Args:
        sync: makes the shards of these numbers durable.
        append: makes records durable, after that.
        failed: called with what either raised; nothing is committed after it.
        group_bytes: the most bytes that a kill can cost.
        group_seconds: how long bytes wait, at most.
    """

    def __init__(
        self,
        sync: Callable[[Collection[int]], None],
        append: Callable[[Collection[Record]], None],
        failed: Callable[[BaseException], None],
        *,
        group_bytes: int = GROUP_BYTES,
        group_seconds: float = GROUP_SECONDS,
    ) -> None:
        self._sync = sync
        self._append = append
        self._failed = failed
        self._limit = max(2, group_bytes)
        self._seconds = group_seconds
        self._changed = threading.Condition()
        self._held = 0  # bytes reserved, gathered, or being committed
        self._waiting: deque[object] = deque()  # those who wait to reserve, in their order
        self._gathered = 0
        self._shards: set[int] = set()
        self._records: list[Record] = []
        self._oldest = 0.0
        self._closing = False
        self._ended = False
        self._over = False  # the thread has ended
        self._then: Callable[[], None] = _nothing
        self.seconds = 0.0
        """Time that commits took."""
        self.commits = 0
        self.peak = 0
        """The most bytes that were held."""
        self._thread = threading.Thread(target=self._run, name="commit", daemon=True)
        self._thread.start()

    @property
    def piece(self) -> int:
        """The most bytes that should be reserved at a time: half of what may be held."""
        return self._limit // 2

    @contextmanager
    def writing(self, nbytes: int) -> Iterator[None]:
        """Wait, in turn, until so many bytes more may be written, which is done inside; then `add` them.

        Where that fails, they are given back, so that nobody waits for them.

        Raises:
            Ended: nothing more is committed.
        """
        self.reserve(nbytes)
        try:
            yield
        except BaseException:
            self.release(nbytes)
            raise

    def release(self, nbytes: int) -> None:
        """Give back bytes that were reserved and will not be written."""
        with self._changed:
            self._held -= nbytes
            self._changed.notify_all()

    def reserve(self, nbytes: int) -> None:
        """Wait, in turn, until so many bytes more may be written; then `add` or `release` them. Raises Ended."""
        ticket = object()
        with self._changed:
            self._waiting.append(ticket)
            self._changed.notify_all()  # whoever waits wants what is gathered to be committed now
            try:
                while not self._ended and (
                    self._waiting[0] is not ticket or (self._held and self._held + nbytes > self._limit)
                ):
                    self._changed.wait()
            finally:
                self._waiting.remove(ticket)
                self._changed.notify_all()
            if self._ended:
                raise Aborted
            self._held += nbytes
            self.peak = max(self.peak, self._held)

    def add(self, shards: Collection[int], reserved: int, records: Collection[Record], written: int) -> None:
        """Bytes that were reserved have been written to these shards, which makes the records true.

        Args:
            shards: their numbers.
            reserved: how many bytes were reserved for it.
            records: what is true once the shards are durable.
            written: how many were needed; fewer where blocks were shared instead.
        """
        with self._changed:
            self._held -= reserved - written
            if not self._shards:
                self._oldest = time.monotonic()
            self._gathered += written
            self._shards.update(shards)
            self._records += records
            self._changed.notify_all()

    def close(self) -> None:
        """Commit what is left, and end the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()

    def stop(self) -> None:
        """Begin no other commit, and let nobody wait any more."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def abandon(self) -> bool:
        """End without another commit, but for one whose records are being written already.

        Returns:
            Whether it is over; where the disk takes its time, the thread may still be at work.
        """
        self.stop()
        self._thread.join(ABANDON_SECONDS)
        return not self._thread.is_alive()

    def on_closed(self, then: Callable[[], None]) -> None:
        """Call `then` once nothing is being committed any more: now, or else from the thread at its end."""
        with self._changed:
            if not self._over:
                self._then = then
                return
        then()

    def _due(self) -> bool:
        if self._ended or self._closing:
            return True
        if not self._shards:
            return False
        old = time.monotonic() - self._oldest >= self._seconds
        return old or self._gathered >= self.piece or bool(self._waiting)

    def _run(self) -> None:
        try:
            while self._commit():
                pass
        except BaseException as error:  # noqa: BLE001  the main thread raises it
            if not self._ended:
                self._failed(error)  # before anybody learns that it is over
        finally:
            with self._changed:
                self._ended = self._over = True
                self._changed.notify_all()
            self._then()

    def _commit(self) -> bool:
        """Wait for a group, and commit it; whether there may be another one."""
        with self._changed:
            while not self._due():
                left = self._oldest + self._seconds - time.monotonic()
                self._changed.wait(max(0.0, left) if self._shards else None)
            if self._ended or not self._shards:
                return False
            shards, records, nbytes = self._shards, self._records, self._gathered
            self._shards, self._records, self._gathered = set(), [], 0
        start = time.perf_counter()
        self._sync(shards)
        if self._ended:
            return False
        self._append(records)
        self.seconds += time.perf_counter() - start
        self.commits += 1
        with self._changed:
            self._held -= nbytes
            self._changed.notify_all()
        return True


def _nothing() -> None:
    """What is to be done where there is nothing to do."""
