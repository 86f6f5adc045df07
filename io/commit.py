"""Group commits: data is synced in groups, and only then named in the journal."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

GROUP_BYTES = 1 << 30
"""The most bytes that are written and not yet committed."""
GROUP_SECONDS = 5.0
"""How long written bytes wait for their commit, at most."""

ABANDON_SECONDS = 1.0
"""How long `abandon` waits for a commit that is under way."""


class GroupCommit:
    """Commits what was written, on a thread of its own.

    Half of `group_bytes` may gather while the other half is being synced, so that writing goes on meanwhile; beyond
    that `add` waits.

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
        append: Callable[[Collection[Mapping[str, Any]]], None],
        failed: Callable[[BaseException], None],
        *,
        group_bytes: int = GROUP_BYTES,
        group_seconds: float = GROUP_SECONDS,
    ) -> None:
        self._sync = sync
        self._append = append
        self._failed = failed
        self._half = max(1, group_bytes // 2)
        self._seconds = group_seconds
        self._changed = threading.Condition()
        self._bytes = 0
        self._shards: set[int] = set()
        self._records: list[Mapping[str, Any]] = []
        self._oldest = 0.0
        self._closing = False
        self._broken = False
        self.seconds = 0.0
        self.commits = 0
        self._thread = threading.Thread(target=self._run, name="commit", daemon=True)
        self._thread.start()

    def add(self, shards: Collection[int], nbytes: int, records: Collection[Mapping[str, Any]]) -> None:
        """Bytes were written to these shards, which make the records true. Waits where too much is not committed."""
        with self._changed:
            while self._bytes >= self._half and not self._broken:
                self._changed.notify_all()
                self._changed.wait()
            if self._bytes == 0:
                self._oldest = time.monotonic()
                self._changed.notify_all()
            self._bytes += nbytes
            self._shards.update(shards)
            self._records += records
            if self._bytes >= self._half:
                self._changed.notify_all()

    def close(self) -> None:
        """Commit what is left, and end the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()

    def abandon(self) -> None:
        """End without another commit; one that is under way may still come to its end."""
        with self._changed:
            self._broken = True
            self._changed.notify_all()
        self._thread.join(ABANDON_SECONDS)

    def _due(self) -> bool:
        old = self._bytes > 0 and time.monotonic() - self._oldest >= self._seconds
        return self._closing or self._broken or self._bytes >= self._half or old

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._due():
                    self._changed.wait(self._seconds / 4 if self._bytes else None)
                if self._broken or (self._closing and not self._bytes and not self._records):
                    return
                shards, records = self._shards, self._records
                self._shards, self._records, self._bytes = set(), [], 0
                self._changed.notify_all()
            try:
                start = time.perf_counter()
                self._sync(shards)
                self._append(records)
                self.seconds += time.perf_counter() - start
                self.commits += 1
            except BaseException as error:  # noqa: BLE001  the main thread raises it
                with self._changed:
                    self._broken = True
                    self._changed.notify_all()
                self._failed(error)
                return
