"""Shows the progress of a merge: a redrawn line on a terminal, a line every few seconds anywhere else.

The engine calls back with its progress, and a separate thread draws it: pausing the terminal pauses the display but
not the merge.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TextIO

from ..io.units import clean, data_size, duration, rate
from .sections import is_terminal, make_console

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from ..engine.execute.measurements import Progress

FRAME_SECONDS = 0.2
"""The interval at which the line on a terminal is redrawn."""
LINE_SECONDS = 10.0
"""The interval at which lines are printed without a terminal."""
WINDOW_SECONDS = 20.0
"""The window over which the rate is averaged."""
_MIN_BAR, _MAX_BAR = 8, 24


@dataclass(frozen=True, slots=True)
class State:
    """The progress at one moment.

    Args:
        read: bytes read so far.
        written: bytes written so far.
        to_read: total bytes to read.
        to_write: total bytes to write.
        per_second: recent rate in bytes read and written per second.
        left: estimated seconds left; None if unknown.
        verb: word for reading, such as ``downloaded``.
        checked: bytes of an unfinished merge checked so far.
        to_check: total bytes to check; 0 if no unfinished merge is being checked.
        earlier: bytes of `read` and `written` that earlier runs of the merge have moved.
    """

    read: int
    written: int
    to_read: int
    to_write: int
    per_second: float
    left: float | None
    verb: str = "read"
    checked: int = 0
    to_check: int = 0
    earlier: int = 0

    @property
    def share(self) -> float:
        """The completed share, from 0 to 1."""
        if self.to_check:
            return self.checked / self.to_check
        total = self.to_read + self.to_write
        return min(1.0, (self.read + self.written) / total) if total else 1.0

    @property
    def done(self) -> bool:
        """Whether all bytes are read and written."""
        return self.read + self.written >= self.to_read + self.to_write

    def parts(self) -> list[str]:
        """Return the parts of the line, most important first."""
        if self.to_check:
            share = f"{int(100 * self.share):3d}%"
            return [share, "checking the unfinished merge", f"{data_size(self.checked)} of {data_size(self.to_check)}"]
        if self.read + self.written <= self.earlier and not self.done:
            return [f"{int(100 * self.share):3d}%", "resuming" if self.earlier else "starting"]
        writes = self.to_write > 0
        if self.done:
            totals = [
                f"{self.verb} {data_size(self.read)}",
                *([f"written {data_size(self.written)}"] if writes else []),
            ]
            return ["100%", "syncing", *totals]
        return [
            f"{int(100 * self.share):3d}%",
            "time left unknown" if self.left is None else f"{_rounded(self.left)} left",
            rate(self.per_second, 1),
            f"{self.verb} {data_size(self.read)} of {data_size(self.to_read)}",
            *([f"written {data_size(self.written)} of {data_size(self.to_write)}"] if writes else []),
        ]

    def line(self, width: int | None = None) -> str:
        """Return the parts that fit in `width` characters; all parts if it is None."""
        parts = self.parts()
        while width is not None and len(parts) > 1 and len("  ".join(parts)) > width:
            parts.pop()
        return "  ".join(parts)


def _rounded(seconds: float) -> str:
    """Format the time left, in full seconds."""
    return duration(seconds) if seconds >= 59.5 else f"{max(1, round(seconds))} s"


class Meter:
    """Computes rates and the time left from the engine's progress.

    Args:
        to_read: total bytes to read.
        to_write: total bytes to write.
        clock: clock in seconds.
        verb: word for reading, such as ``downloaded``.
    """

    def __init__(
        self, to_read: int, to_write: int, clock: Callable[[], float] = time.monotonic, verb: str = "read"
    ) -> None:
        self._totals = (to_read, to_write)
        self._verb = verb
        self._clock = clock
        self._samples: deque[tuple[float, int]] = deque([(clock(), 0)])
        self._earlier = 0

    def state(self, progress: Progress | None) -> State:
        """Return the progress now."""
        now = self._clock()
        read, written = (progress.bytes_read, progress.bytes_written) if progress is not None else (0, 0)
        earlier = progress.bytes_earlier if progress is not None else 0
        if earlier != self._earlier:  # this run has not moved the bytes of earlier ones
            self._samples = deque([(self._samples[-1][0], earlier)])
            self._earlier = earlier
        if read + written <= earlier:
            self._samples.clear()  # start the clock at the first byte, not while libraries load
        self._samples.append((now, read + written))
        while len(self._samples) > 2 and self._samples[1][0] <= now - WINDOW_SECONDS:
            self._samples.popleft()
        start, done = self._samples[0]
        per_second = (read + written - done) / (now - start) if now > start else 0.0
        left = max(0, sum(self._totals) - read - written) / per_second if per_second else None
        checked, to_check = (progress.bytes_checked, progress.bytes_to_check) if progress is not None else (0, 0)
        return State(read, written, *self._totals, per_second, left, self._verb, checked, to_check, earlier)


class Display:
    """A context manager that shows the progress of a merge or a download; pass it to `merge` as `notify`.

    Args:
        to_read: total bytes to read.
        to_write: total bytes to write.
        quiet: whether to show nothing.
        stream: output stream; stderr by default.
        seconds: interval between updates; by default FRAME_SECONDS on a terminal, else LINE_SECONDS.
        verb: word for reading, such as ``downloaded``.
    """

    def __init__(
        self,
        to_read: int,
        to_write: int,
        *,
        quiet: bool = False,
        stream: TextIO | None = None,
        seconds: float | None = None,
        verb: str = "read",
    ) -> None:
        self._stream = stream or sys.stderr
        self._terminal = is_terminal(self._stream)
        self._console: Console | None = None
        self._seconds = seconds or (FRAME_SECONDS if self._terminal else LINE_SECONDS)
        self._meter = Meter(to_read, to_write, verb=verb)
        self._progress: Progress | None = None
        self._closed = threading.Event()
        self._writing = threading.RLock()  # held while the line is drawn or a text is printed above it
        self._line = ""  # the line on the terminal
        self._thread = None if quiet else threading.Thread(target=self._draw_loop, name="progress", daemon=True)

    def __call__(self, progress: Progress) -> None:
        """Store the newest progress, which the next update shows."""
        self._progress = progress

    def print_above(self, text: str) -> None:
        """Print a text on a line of its own, above the progress on a terminal."""
        with self._writing, contextlib.suppress(OSError):  # a message must not end the merge
            clear = "\r\x1b[K" if self._line else ""
            self._stream.write(f"{clear}{clean(text)}\n{self._line}")
            self._stream.flush()

    def __enter__(self) -> Display:
        if self._thread is not None:
            if self._terminal:
                self._console = make_console(self._stream)  # imports rich before the merge allocates memory
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._closed.set()
        if self._thread is not None:
            self._thread.join(timeout=5)  # a paused terminal must not block the end of the merge

    def _draw_loop(self) -> None:
        try:
            while not self._closed.wait(self._seconds):
                self._draw(self._meter.state(self._progress))
            with self._writing:
                if self._line:
                    self._stream.write("\r\x1b[K")
                    self._stream.flush()
                self._line = ""
        except OSError:
            return  # the stream is closed

    def _draw(self, state: State) -> None:
        with self._writing:
            if self._console is None:
                self._stream.write(f"mergeloom: {state.line()}\n")
            else:
                with self._console.capture() as capture:
                    line = draw_line(state, self._console.width - 1, ascii_only=self._console.options.ascii_only)
                    self._console.print(line, end="", no_wrap=True)
                self._line = f"\r{capture.get()}\x1b[K"
                self._stream.write(self._line)
            self._stream.flush()


def draw_line(state: State, width: int, *, ascii_only: bool = False) -> Text:
    """Return the line, with a progress bar on its left if there is room."""
    from rich.text import Text

    line = state.line(width)
    bar = min(_MAX_BAR, width - len(line) - 2)
    if bar < _MIN_BAR:
        return Text(line)
    full = round(bar * state.share)
    done, left = ("=", "-") if ascii_only else ("━", "─")
    return Text.assemble((done * full, "cyan"), (left * (bar - full), "bright_black"), "  ", line)
