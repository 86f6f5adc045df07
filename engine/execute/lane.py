"""A lane: threads that do one kind of work, in the order of the plan, and know how long they worked and waited."""

from __future__ import annotations

import heapq
import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

from ...errors import EnvironmentFailure

T = TypeVar("T")


class Lane(Generic[T]):
    """Threads that take tasks, the earliest of the plan first, and hand each to `work`.

    Nothing bounds the queue but what its tasks hold: a task exists only with its slots reserved.

    Args:
        name: for people.
        threads: how many.
        work: called as ``work(thread, task)``.
        failed: called with what `work` raised; the lane goes on with the next task.
        idle: called when a thread finds no task, for work that was put off.
    """

    def __init__(
        self,
        name: str,
        threads: int,
        work: Callable[[int, T], None],
        failed: Callable[[BaseException], None],
        idle: Callable[[], None] | None = None,
    ) -> None:
        self.name = name
        self.worked = [0.0] * threads
        self.tasks = 0
        self._work = work
        self._failed = failed
        self._idle = idle
        self._queue: list[tuple[int, int, T]] = []
        self._changed = threading.Condition()
        self._closed = False
        self._sequence = 0
        self._started = self._since = time.perf_counter()
        self._busy = 0
        self.levels = [0.0] * (threads + 1)
        """Seconds with so many of the threads at work, up to the last change."""
        self._threads = [
            threading.Thread(target=self._run, args=(number,), name=f"{name}-{number}", daemon=True)
            for number in range(threads)
        ]
        try:
            for thread in self._threads:
                thread.start()
        except RuntimeError as error:
            raise EnvironmentFailure(
                f"no more threads can be started ({error}): see ulimit -u, ulimit -v and the cgroup's limit on tasks, "
                "or give fewer --threads"
            ) from error

    def put(self, order: int, task: T) -> None:
        """Let the lane do a task; those with a smaller `order` go first."""
        with self._changed:
            self._sequence += 1
            heapq.heappush(self._queue, (order, self._sequence, task))
            self._changed.notify()

    def _take(self) -> T | None:
        with self._changed:
            if not self._queue and self._idle is not None and not self._closed:
                self._changed.release()
                try:
                    self._idle()
                finally:
                    self._changed.acquire()
            while not self._queue:
                if self._closed:
                    return None
                self._changed.wait()
            return heapq.heappop(self._queue)[2]

    def _run(self, thread: int) -> None:
        while True:
            try:
                task = self._take()
                if task is None:
                    return
                start = self._count(1)
                try:
                    self._work(thread, task)
                finally:
                    self.worked[thread] += self._count(-1) - start
                self.tasks += 1
            except BaseException as error:  # noqa: BLE001  whatever it is, the main thread raises it
                self._failed(error)

    def _count(self, change: int) -> float:
        """One thread more or less is at work; the time now."""
        with self._changed:
            now = time.perf_counter()
            self.levels[self._busy] += now - self._since
            self._since = now
            self._busy += change
            return now

    @property
    def seconds_worked(self) -> float:
        """Seconds of work, all threads together."""
        return sum(self.worked)

    def seconds_waited(self, until: float) -> float:
        """Seconds that the threads waited, all together, from their start to `until` (``time.perf_counter``)."""
        return max(0.0, (until - self._started) * len(self._threads) - self.seconds_worked)

    def stop(self) -> None:
        """Forget what is queued, and end the threads once they have done what they are at."""
        with self._changed:
            self._queue.clear()
            self._closed = True
            self._changed.notify_all()

    def join(self) -> None:
        """Wait until the threads have ended; `stop` comes first."""
        for thread in self._threads:
            thread.join()
