"""Progress: rates and time left from the engine's counters, redrawn on a terminal or printed as lines."""

from __future__ import annotations

import io
import threading

import pytest

from mergeloom.engine.execute.measurements import Progress
from mergeloom.report.progress import WINDOW_SECONDS, Display, Meter, State, draw_line
from tests.support.waiting import no_hang, wait_until

GB = 10**9


class Clock:
    """Time that a test sets."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_rate_and_time_left() -> None:
    clock, progress = Clock(), Progress()
    meter = Meter(8 * GB, 4 * GB, clock)
    assert meter.state(None).left is None
    clock.now += 3
    progress.bytes_read, progress.bytes_written = 2 * GB, 1 * GB
    state = meter.state(progress)
    assert state.per_second == pytest.approx(GB)
    assert state.left == pytest.approx(9)
    assert state.share == pytest.approx(0.25)
    assert not state.done


def test_the_rate_is_a_recent_average() -> None:
    clock, progress = Clock(), Progress()
    meter = Meter(1000 * GB, 0, clock)
    for second in range(120):
        clock.now += 1
        progress.bytes_read += GB if second < 60 else 3 * GB
        state = meter.state(progress)
    assert state.per_second == pytest.approx(3 * GB)
    assert len(meter._samples) <= WINDOW_SECONDS + 2


def test_a_stalled_merge_has_no_time_left() -> None:
    clock, progress = Clock(), Progress(bytes_read=GB)
    meter = Meter(8 * GB, 4 * GB, clock)
    for _ in range(100):
        clock.now += 1
        state = meter.state(progress)
    assert state.left is None
    assert "time left unknown" in state.line()


def test_nothing_to_move() -> None:
    state = Meter(0, 0, Clock()).state(Progress())
    assert state.share == 1
    assert state.done


@pytest.mark.parametrize("width", range(20, 120, 7))
def test_what_does_not_fit_is_left_out_from_the_right(width: int) -> None:
    state = State(3 * GB, 1 * GB, 8 * GB, 4 * GB, 1.5 * GB, 5.4)
    line = " 33%  5 s left  1.5GB/s  read 3GB of 8GB  written 1GB of 4GB"
    assert state.line() == line
    assert line.startswith(state.line(width))
    assert len(state.line(width)) <= width
    assert draw_line(state, width).cell_len <= width
    assert state.line(width) in draw_line(state, width).plain


def test_before_the_first_byte_it_starts() -> None:
    assert State(0, 0, 8, 4, 0.0, None).line() == "  0%  starting"


def test_an_unfinished_merge_is_checked_before_it_is_resumed() -> None:
    progress = Progress(bytes_checked=3 * GB, bytes_to_check=8 * GB)
    state = Meter(8 * GB, 4 * GB, Clock()).state(progress)
    assert state.line() == " 37%  checking the unfinished merge  3GB of 8GB"
    assert state.line(20) == " 37%"
    assert draw_line(state, 100).plain.count("━") == round(24 * 3 / 8)


def test_after_the_last_byte_it_syncs() -> None:
    assert "syncing" in State(8, 4, 8, 4, 1, 0.0).line()


class Terminal(io.StringIO):
    """A stream that claims to be a terminal."""

    def isatty(self) -> bool:
        """Report a terminal."""
        return True


def shown(stream: io.StringIO, *, quiet: bool = False) -> str:
    """Return what a merge shows that ends after three updates of the display."""
    progress = Progress()
    drawn = 0

    class Counting(Display):
        def _draw(self, state: State) -> None:
            nonlocal drawn
            super()._draw(state)
            drawn += 1

    with Counting(100, 100, stream=stream, quiet=quiet, seconds=0.001) as display:
        display(progress)
        for count in range(1, 4):
            progress.bytes_read += 10
            progress.bytes_written += 10
            wait_until(lambda count=count: quiet or drawn >= count)
    return stream.getvalue()


def test_plain_lines_where_there_is_no_terminal() -> None:
    lines = shown(io.StringIO()).splitlines()
    assert len(lines) > 2
    assert all(line.startswith("mergeloom: ") for line in lines)
    assert not any("\x1b" in line or "\r" in line for line in lines)


def test_one_line_that_is_redrawn_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    text = shown(Terminal())
    assert "\n" not in text
    assert text.count("\r") > 2
    assert text.endswith("\r\x1b[K")  # the line is erased


def test_quiet_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    assert shown(Terminal(), quiet=True) == ""


def test_a_short_merge_prints_no_line() -> None:
    stream = io.StringIO()
    with Display(100, 100, stream=stream) as display:
        display(Progress())
    assert stream.getvalue() == ""


def test_a_paused_terminal_does_not_block_the_merge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    resumed = threading.Event()

    hung = threading.Event()

    class Paused(Terminal):
        def write(self, text: str) -> int:
            hung.set()
            resumed.wait()
            return super().write(text)

    progress = Progress()
    display = Display(100, 100, stream=Paused(), seconds=0.01)
    with no_hang(), display:
        hung.wait()
        for _ in range(1000):
            display(progress)
        resumed.set()


def test_a_stream_that_is_closed_ends_the_display_and_nothing_else() -> None:
    closed = threading.Event()

    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            closed.set()
            raise BrokenPipeError

    with no_hang(), Display(100, 100, stream=Closed(), seconds=0.01) as display:
        display(Progress())
        closed.wait()
        assert display._thread is not None
        display._thread.join()


def test_a_download_shows_no_written_bytes() -> None:
    state = State(3 * GB, 0, 8 * GB, 0, 1.5 * GB, 5.4, "downloaded")
    assert state.line() == " 37%  5 s left  1.5GB/s  downloaded 3GB of 8GB"
    assert State(8, 0, 8, 0, 1, 0.0).line() == "100%  syncing  read 8B"


def test_after_a_resume_the_rate_is_that_of_this_run() -> None:
    clock, progress = Clock(), Progress()
    meter = Meter(80 * GB, 40 * GB, clock)
    meter.state(progress)
    clock.now += 5
    progress.bytes_checked, progress.bytes_to_check = GB, 60 * GB
    assert "checking" in meter.state(progress).line()
    clock.now += 1
    progress = Progress(bytes_read=60 * GB, bytes_written=30 * GB, bytes_earlier=90 * GB)
    state = meter.state(progress)
    assert state.line() == " 75%  resuming"
    assert (state.per_second, state.left) == (0, None)
    clock.now += 2
    progress.bytes_read += 2 * GB
    progress.bytes_written += GB
    state = meter.state(progress)
    assert state.per_second == pytest.approx(1.5 * GB)
    assert state.left == pytest.approx(18)
    assert state.line() == " 77%  18 s left  1.5GB/s  read 62GB of 80GB  written 31GB of 40GB"


def test_a_resume_that_moves_bytes_before_the_first_update_counts_only_those() -> None:
    clock = Clock()
    meter = Meter(80 * GB, 40 * GB, clock)
    meter.state(None)
    clock.now += 1
    state = meter.state(Progress(bytes_read=63 * GB, bytes_written=30 * GB, bytes_earlier=90 * GB))
    assert state.per_second == pytest.approx(3 * GB)


def test_texts_are_printed_above_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    display = Display(100, 100, stream=stream)
    display.print_above("before")
    assert stream.getvalue() == "before\n"
    with display:
        display._draw(Meter(100, 100).state(Progress(bytes_read=50)))
        drawn = stream.getvalue().removeprefix("before\n")
        display.print_above("warning: \x1b[31mred")
        above = stream.getvalue().removeprefix("before\n" + drawn)
    assert above.startswith("\r\x1b[Kwarning: \\x1b[31mred\n" + drawn)
    assert stream.getvalue().endswith("\r\x1b[K")
    display.print_above("after")
    assert stream.getvalue().endswith("\r\x1b[Kafter\n")


def test_a_text_on_a_closed_stream_is_dropped() -> None:
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    Display(100, 100, stream=Closed()).print_above("text")


def test_the_bar_is_ascii_where_the_terminal_is() -> None:
    line = draw_line(Meter(100, 0).state(Progress(bytes_read=50)), 79, ascii_only=True).plain
    assert line.startswith("============------------   50%")
