"""Lanes: threads that do one kind of work in the order of the plan, and the time that they worked and waited."""

from __future__ import annotations

import heapq
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Generic, TypeVar

from ...errors import EnvironmentFailure

T = TypeVar("T")


@dataclass(slots=True)
class LaneTime:
    """The time that a lane's threads worked and waited.

    Args:
        threads: number of threads.
        worked: seconds of work, summed over all threads.
        waited: seconds of waiting, summed over all threads.
        levels: seconds with 0, 1, 2, ... threads at work.
    """

    threads: int
    worked: float
    waited: float
    levels: tuple[float, ...] = ()

    @property
    def effective_threads(self) -> int:
        """Highest number of threads that were at work together for at least a twentieth of the time."""
        total = sum(self.levels)
        return max((n for n in range(len(self.levels)) if sum(self.levels[n:]) >= total / 20), default=0)


class Lane(Generic[T]):
    """Threads that take tasks, the earliest of the plan first, and pass each to `work`.

    The queue needs no bound of its own: a task exists only once its slots are taken.

    Args:
        name: name of the lane in reports.
        threads: number of threads.
        work: function that does a task, called as ``work(thread, task)``.
        failed: function that receives what `work` raises; the lane continues with the next task.
        idle: function that a thread calls when the queue is empty, for deferred work.
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
        self._changed = threading.Condition(threading.Lock())
        self._closed = False
        self._sequence = 0
        self._started = self._since = time.perf_counter()
        self._busy = 0
        self.levels = [0.0] * (threads + 1)
        """Seconds with 0, 1, 2, ... threads at work, up to the last change."""
        self._threads = [
            threading.Thread(target=self._run, args=(number,), name=f"{name}-{number}", daemon=True)
            for number in range(threads)
        ]
        try:
            for thread in self._threads:
                thread.start()
        except RuntimeError as error:
            raise EnvironmentFailure(
                f"no more threads can be started ({error}): check ulimit -u, ulimit -v and the cgroup's pids.max, or "
                "use fewer --threads"
            ) from error

    def put(self, order: int, task: T) -> None:
        """Queue a task; tasks with a smaller `order` go first."""
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
            except BaseException as error:  # noqa: BLE001  the main thread raises it again
                self._failed(error)

    def _count(self, change: int) -> float:
        """Add `change` to the number of threads at work, and return the time."""
        with self._changed:
            now = time.perf_counter()
            self.levels[self._busy] += now - self._since
            self._since = now
            self._busy += change
            return now

    @property
    def seconds_worked(self) -> float:
        """Seconds of work, summed over all threads."""
        return sum(self.worked)

    def seconds_waited(self, until: float) -> float:
        """Return the seconds that the threads waited, summed, from the start to `until` (``time.perf_counter``)."""
        return max(0.0, (until - self._started) * len(self._threads) - self.seconds_worked)

    def stop(self) -> None:
        """Discard the queue, and let each thread end after its current task."""
        with self._changed:
            self._queue.clear()
            self._closed = True
            self._changed.notify_all()

    def join(self) -> None:
        """Wait until the threads have ended; call `stop` first."""
        for thread in self._threads:
            thread.join()


class Lanes:
    """The lanes of one run.

    Args:
        failed: function that receives what a lane's work raises.
    """

    def __init__(self, failed: Callable[[BaseException], None]) -> None:
        self._failed = failed
        self._lanes: list[Lane[Any]] = []

    def start(
        self, name: str, threads: int, work: Callable[[int, T], None], idle: Callable[[], None] | None = None
    ) -> Lane[T]:
        """Start a lane; see `Lane` for the arguments."""
        lane = Lane(name, threads, work, self._failed, idle)
        self._lanes.append(lane)
        return lane

    def stop(self) -> None:
        """Discard all queued tasks and wait until every thread has ended."""
        for lane in self._lanes:
            lane.stop()
        for lane in self._lanes:
            lane.join()

    def times(self, until: float) -> dict[str, LaneTime]:
        """Return what the lanes of each name did, up to `until` (``time.perf_counter``)."""
        times: dict[str, LaneTime] = {}
        for lane in self._lanes:
            before = times.get(lane.name, LaneTime(0, 0.0, 0.0))
            times[lane.name] = LaneTime(
                before.threads + len(lane.worked),
                before.worked + lane.seconds_worked,
                before.waited + lane.seconds_waited(until),
                tuple(a + b for a, b in zip_longest(before.levels, lane.levels, fillvalue=0.0)),
            )
        return times
