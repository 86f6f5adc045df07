"""Threads that succeed or fail together: the first error cancels the group and is raised to whoever waits for it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any


class TaskGroup:
    """A group of threads with one outcome.

        with TaskGroup("copy") as group:
            for part in parts:
                group.spawn(copy, part)
            group.check()  # raises the first error while the threads are running

    Leaving the block waits for all threads and raises the first error. An error inside the block cancels the group,
    and is raised once the threads have ended. Threads that are started elsewhere can report to a group with `fail`.

    Args:
        name: prefix of the threads' names.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._error: BaseException | None = None
        self._cancelled = threading.Event()

    def spawn(self, function: Callable[..., object], *arguments: Any) -> None:
        """Run a function in a thread of its own. What it raises fails the group."""

        def run() -> None:
            try:
                function(*arguments)
            except BaseException as error:  # noqa: BLE001  raised again by `check` and `join`
                self.fail(error)

        thread = threading.Thread(target=run, name=f"{self._name} {len(self._threads)}", daemon=True)
        with self._lock:
            self._threads.append(thread)
        thread.start()

    def fail(self, error: BaseException) -> None:
        """Record an error and cancel the group. Only the first error counts."""
        with self._lock:
            self._error = self._error or error
        self._cancelled.set()

    def cancel(self) -> None:
        """Ask all threads to stop, without an error. Threads poll `cancelled`."""
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        """Whether the group has failed or was cancelled."""
        return self._cancelled.is_set()

    @property
    def error(self) -> BaseException | None:
        """The first error, or None."""
        return self._error

    def check(self) -> None:
        """Raise the first error, if any."""
        if self._error is not None:
            raise self._error

    def wait(self) -> None:
        """Wait for all threads to end."""
        for thread in self._threads:
            thread.join()

    def join(self) -> None:
        """Wait for all threads to end, then raise the first error, if any."""
        self.wait()
        self.check()

    def __enter__(self) -> TaskGroup:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.join()
            return
        self.cancel()
        self.wait()
