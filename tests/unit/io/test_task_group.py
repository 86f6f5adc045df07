"""Task groups: the first error wins, cancels the other threads, and reaches whoever waits."""

from __future__ import annotations

import threading

import pytest

from mergeloom.io.task_group import TaskGroup
from tests.support.waiting import wait_until


def test_all_tasks_run_and_are_waited_for() -> None:
    done: list[int] = []
    with TaskGroup("add") as group:
        for number in range(5):
            group.spawn(done.append, number)
    assert sorted(done) == [0, 1, 2, 3, 4]
    assert not group.cancelled


def test_the_first_error_cancels_the_others_and_is_raised() -> None:
    def fail() -> None:
        raise ValueError("first")

    def work(group: TaskGroup) -> None:
        wait_until(lambda: group.cancelled)
        raise OSError("second, as a consequence")

    def run() -> None:
        with TaskGroup("fail") as group:
            group.spawn(work, group)
            group.spawn(fail)

    with pytest.raises(ValueError, match="first"):
        run()


def test_check_raises_while_other_tasks_are_running() -> None:
    released = threading.Event()
    group = TaskGroup("check")
    group.spawn(released.wait)
    group.fail(OSError("disk"))
    with pytest.raises(OSError, match="disk"):
        group.check()
    released.set()
    with pytest.raises(OSError, match="disk"):
        group.join()


def test_an_error_in_the_block_cancels_the_group_and_takes_precedence() -> None:
    def stop_when_cancelled(group: TaskGroup) -> None:
        wait_until(lambda: group.cancelled)
        raise OSError("interrupted")

    group = TaskGroup("block")

    def run() -> None:
        with group:
            group.spawn(stop_when_cancelled, group)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    assert group.cancelled


def test_cancelling_is_not_an_error() -> None:
    with TaskGroup("cancel") as group:
        group.spawn(wait_until, lambda: group.cancelled)
        group.cancel()
    assert group.error is None


def test_waiting_does_not_raise() -> None:
    group = TaskGroup("wait")
    group.spawn(int, "three")
    group.wait()
    with pytest.raises(ValueError, match="three"):
        group.check()
