"""Counts the work of a call, which is the same on a fast and a slow machine, idle or busy; tests assert no seconds."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any


class TooMuchWork(BaseException):
    """A call executes more lines than allowed. No handler of `Exception` catches it."""


def count_lines(call: Callable[[], object], limit: int | None = None) -> int:
    """Count the lines of Python that a call executes in this thread; a line in a loop counts once per iteration.

    Args:
        call: the work.
        limit: number of lines after which TooMuchWork is raised inside the call.
    """
    lines = 0

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal lines
        if event == "line":
            lines += 1
            if limit is not None and lines > limit:
                raise TooMuchWork(f"more than {limit:,} lines")
        return trace

    before = sys.gettrace()  # of `make coverage`
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return lines


def count_calls(call: Callable[[], object]) -> int:
    """Count the functions that a call calls in this thread, built-in ones included; what these do is not counted."""
    calls = 0

    def count(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        call()
    finally:
        sys.setprofile(before)
    return calls


def count_bytes_read(call: Callable[[], object]) -> int:
    """Count the bytes that this process reads from files during a call, in all threads and by any system call."""
    before = _bytes_read()
    call()
    return _bytes_read() - before


def _bytes_read() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line.removeprefix("rchar: ") for line in lines if line.startswith("rchar: ")))
