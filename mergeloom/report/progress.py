"""How far a merge is, while it runs: a line that is redrawn on a terminal, a line now and then anywhere else.

The engine calls back with its counters, and a thread of its own draws them: whoever pauses a terminal pauses the
display, not the merge.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TextIO

from ..io.units import data_size, duration, rate
from .sections import is_terminal, make_console

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from ..engine.execute.tasks import Progress

FRAME_SECONDS = 0.2
"""How often the line on a terminal is drawn."""
LINE_SECONDS = 10.0
"""How often a line is printed where there is no terminal."""
WINDOW_SECONDS = 20.0
"""Over how long the rate is taken."""
_SHORTEST_BAR, _LONGEST_BAR = 8, 24


@dataclass(frozen=True, slots=True)
class State:
    """What is shown.

    Args:
        read: bytes so far.
        written: bytes so far.
        to_read: bytes in all.
        to_write: bytes in all.
        per_second: bytes read and written a second, of late.
        left: seconds until the end at this rate; None where nothing tells.
        verb: what is done with what is read.
        checked: bytes of an unfinished merge that were checked.
        to_check: bytes of it in all, while it is being checked; else 0.
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

    @property
    def share(self) -> float:
        """From 0 to 1."""
        if self.to_check:
            return self.checked / self.to_check
        total = self.to_read + self.to_write
        return min(1.0, (self.read + self.written) / total) if total else 1.0

    @property
    def done(self) -> bool:
        """Whether all bytes were moved."""
        return self.read + self.written >= self.to_read + self.to_write

    def parts(self) -> list[str]:
        """The line in parts, the most important first."""
        if self.to_check:
            share = f"{int(100 * self.share):3d}%"
            return [share, "checking the unfinished merge", f"{data_size(self.checked)} of {data_size(self.to_check)}"]
        if self.read + self.written == 0 and not self.done:
            return ["  0%", "starting"]
        writes = self.to_write > 0
        if self.done:
            moved = [f"{self.verb} {data_size(self.read)}", *([f"written {data_size(self.written)}"] if writes else [])]
            return ["100%", "waiting for the disk", *moved]
        return [
            f"{int(100 * self.share):3d}%",
            "time left unknown" if self.left is None else f"{_rounded(self.left)} left",
            rate(self.per_second, 1),
            f"{self.verb} {data_size(self.read)} of {data_size(self.to_read)}",
            *([f"written {data_size(self.written)} of {data_size(self.to_write)}"] if writes else []),
        ]

    def line(self, width: int | None = None) -> str:
        """As much of it as fits `width` characters; all of it where that is None."""
        parts = self.parts()
        while width is not None and len(parts) > 1 and len("  ".join(parts)) > width:
            parts.pop()
        return "  ".join(parts)


def _rounded(seconds: float) -> str:
    return duration(seconds) if seconds >= 59.5 else f"{max(1, round(seconds))} s"


class Meter:
    """Turns the engine's counters into what is shown.

    Args:
        to_read: bytes in all.
        to_write: bytes in all.
        clock: in seconds.
        verb: what is done with what is read.
    """

    def __init__(
        self, to_read: int, to_write: int, clock: Callable[[], float] = time.monotonic, verb: str = "read"
    ) -> None:
        self._totals = (to_read, to_write)
        self._verb = verb
        self._clock = clock
        self._samples: deque[tuple[float, int]] = deque([(clock(), 0)])

    def state(self, progress: Progress | None) -> State:
        """How far it is now."""
        now = self._clock()
        read, written = (progress.bytes_read, progress.bytes_written) if progress is not None else (0, 0)
        if read + written == 0:
            self._samples.clear()  # the rate begins with the first byte, not while libraries are loaded
        self._samples.append((now, read + written))
        while len(self._samples) > 2 and self._samples[1][0] <= now - WINDOW_SECONDS:
            self._samples.popleft()
        then, before = self._samples[0]
        per_second = (read + written - before) / (now - then) if now > then else 0.0
        missing = max(0, sum(self._totals) - read - written)
        left = missing / per_second if per_second else None
        checked, to_check = (progress.bytes_checked, progress.bytes_to_check) if progress is not None else (0, 0)
        return State(read, written, *self._totals, per_second, left, self._verb, checked, to_check)


class Display:
    """Shows the progress of one merge, or download, from entering it to leaving it; give it to `merge` as `notify`.

    Args:
        to_read: bytes in all.
        to_write: bytes in all.
        quiet: show nothing.
        stream: stderr by default.
        seconds: between two drawings; by default as fits the stream.
        verb: what is done with what is read.
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
        self._left = threading.Event()
        self._thread = None if quiet else threading.Thread(target=self._draw_on, name="progress", daemon=True)

    def __call__(self, progress: Progress) -> None:
        """Take note of the engine's counters: an object that it goes on counting in."""
        self._progress = progress

    def __enter__(self) -> Display:
        if self._thread is not None:
            if self._terminal:
                self._console = make_console(self._stream)  # rich is imported here, before the merge takes memory
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._left.set()
        if self._thread is not None:
            self._thread.join(timeout=5)  # a paused terminal must not keep the merge from ending

    def _draw_on(self) -> None:
        try:
            while not self._left.wait(self._seconds):
                self._draw(self._meter.state(self._progress))
            if self._console is not None:
                self._clear_line()
        except OSError:
            return  # nobody is there any more who would look

    def _draw(self, state: State) -> None:
        if self._console is None:
            self._stream.write(f"mergeloom: {state.line()}\n")
        else:
            with self._console.capture() as capture:
                self._console.print(drawing(state, self._console.width - 1), end="", no_wrap=True)
            self._stream.write(f"\r{capture.get()}\x1b[K")
        self._stream.flush()

    def _clear_line(self) -> None:
        self._stream.write("\r\x1b[K")
        self._stream.flush()


def drawing(state: State, width: int) -> Text:
    """The line with a bar before it where there is room for one."""
    from rich.text import Text

    line = state.line(width)
    bar = min(_LONGEST_BAR, width - len(line) - 2)
    if bar < _SHORTEST_BAR:
        return Text(line)
    full = round(bar * state.share)
    return Text.assemble(("━" * full, "cyan"), ("─" * (bar - full), "bright_black"), "  ", line)
