"""Waiting for events. The limits are there for tests that fail: a test that passes never comes near them."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

HANG_SECONDS = 300
"""How long anything may take before a test fails because it hangs; also the timeout of child processes."""


class Hang(BaseException):
    """Something did not end. No handler of `Exception` catches it."""


def wait_until(ready: Callable[[], bool]) -> None:
    """Wait until a condition holds; raise Hang where it never does."""
    end = time.monotonic() + HANG_SECONDS
    while not ready():
        if time.monotonic() > end:
            raise Hang("the awaited condition does not hold")
        time.sleep(0.001)


@contextmanager
def no_hang(seconds: float = HANG_SECONDS) -> Iterator[None]:
    """Raise Hang in the main thread where the body blocks or loops for ever."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Hang(f"in {frame}")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
