"""The I/O counters: no byte is lost when several threads count at the same time."""

from __future__ import annotations

import sys
import threading
from dataclasses import replace

from mergeloom.io.counters import IoCounters
from mergeloom.io.task_group import TaskGroup


def test_several_threads_count() -> None:
    counters, together = IoCounters(), threading.Barrier(4)

    def count(number: int) -> None:
        together.wait()
        for _ in range(2000):
            counters.add(read=1, written=2, shared=3, checked=4)
            counters.add_refused(number % 2, 5)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with TaskGroup("count") as group:
            for number in range(4):
                group.spawn(count, number)
    finally:
        sys.setswitchinterval(interval)
    assert counters == IoCounters(8000, 16000, 24000, 32000, {0: 20000, 1: 20000})


def test_a_copy_counts_for_itself() -> None:
    counters = IoCounters(bytes_read=1)
    copy = replace(counters, refused={})
    copy.add(read=1)
    copy.add_refused(5, 10)
    assert (counters, copy) == (IoCounters(1), IoCounters(2, refused={5: 10}))
