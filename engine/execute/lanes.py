"""All lanes of a run: started one by one, stopped together, and their times."""

from __future__ import annotations

from collections.abc import Callable
from itertools import zip_longest
from typing import Any, TypeVar

from .lane import Lane
from .tasks import LaneTime

T = TypeVar("T")


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
