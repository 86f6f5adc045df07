"""Handles Ctrl-C and SIGTERM during a merge: the first signal stops it within two seconds, the second exits at once.

A merge can be killed at any moment and resumed (see `io.output.journal`), so the process exits if a clean stop takes
too long.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any, ClassVar

from ..errors import Interrupted

GRACE_SECONDS = 1.5
"""The time limit for a clean stop."""
_EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}
"""The exit codes that a shell reports for a process killed by these signals."""


class Terminated(Interrupted):
    """The merge was stopped by SIGTERM; it can be resumed."""

    exit_code: ClassVar[int] = _EXIT_CODES[signal.SIGTERM]


class StopSignals:
    """A context manager in which SIGINT and SIGTERM raise KeyboardInterrupt in the main thread.

    It ends with Terminated if the signal was SIGTERM. A watcher thread enforces the time limit. It learns of a signal
    at once, even while the main thread is inside a long system call or a library. In any other thread than the main
    one, the context manager does nothing.
    """

    def __init__(self) -> None:
        self._stopping: int | None = None  # the signal
        self._pipe: tuple[int, int] | None = None
        self._handlers: dict[int, Any] = {}
        self._wakeup = -1

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._pipe = os.pipe()
            os.set_blocking(self._pipe[1], False)
            self._wakeup = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
            self._handlers = {number: signal.signal(number, self._stop) for number in _EXIT_CODES}
            threading.Thread(target=self._watch, args=(self._pipe[0],), name="signals", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._stopping == signal.SIGTERM and isinstance(error, (KeyboardInterrupt, Interrupted)):
            raise Terminated(str(error) or "terminated") from error
        if self._pipe is None or self._stopping is not None:
            return  # while stopping, the thread watches until the process exits
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        os.write(self._pipe[1], b"\0")
        os.close(self._pipe[1])
        self._pipe = None

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self._stopping is None:
            self._stopping = number
            raise KeyboardInterrupt

    def _watch(self, pipe: int) -> None:
        seconds, exit_code = None, 0
        while True:
            ready, _, _ = select.select([pipe], [], [], seconds)
            number = os.read(pipe, 1) if ready else b""
            if ready and number in (b"", b"\0"):
                os.close(pipe)
                return
            if ready and number[0] not in _EXIT_CODES:
                continue
            if seconds is not None:
                if not ready:
                    _print("mergeloom: killed; run the same command to resume\n")
                os._exit(exit_code)
            seconds, exit_code = GRACE_SECONDS, _EXIT_CODES[signal.Signals(number[0])]


def _print(message: str) -> None:
    """Write to stderr directly: the main thread may hold the lock of sys.stderr."""
    try:
        os.write(sys.__stderr__.fileno() if sys.__stderr__ is not None else 2, message.encode())
    except (OSError, ValueError):
        return
