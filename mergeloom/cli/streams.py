"""Guards the standard streams: one that is closed or full must not end a merge, or look like a bug."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO

from ..errors import EnvironmentFailure

_DESCRIPTORS = (0, 1, 2)


class StdoutFailure(EnvironmentFailure):
    """Standard output can't be written, for example because its disk is full."""


class _Guard:
    """A text stream whose failures are an error of ours, or are ignored; for everything else it is the stream itself.

    Args:
        stream: the stream.
        ignore: whether to drop what can't be written.
    """

    def __init__(self, stream: TextIO, *, ignore: bool) -> None:
        self._stream = stream
        self._ignore = ignore

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write a text. Raises BrokenPipeError if the reader is gone, otherwise StdoutFailure."""
        with self._translating():
            return self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Write what is buffered. Raises like `write`."""
        with self._translating():
            self._stream.flush()

    @contextlib.contextmanager
    def _translating(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if self._ignore:
                return
            if isinstance(error, BrokenPipeError):
                raise
            raise StdoutFailure(f"standard output can't be written ({error.strerror or error})") from error


@contextlib.contextmanager
def guarded_streams() -> Iterator[None]:
    """Guard stdout and stderr, and flush them at the end.

    A closed stream discards what is written. If stdout can't be written, writing raises StdoutFailure, or
    BrokenPipeError if the reader of a pipe is gone. What can't be written to stderr is dropped: a message must not end
    a merge of hours.
    """
    _fill_descriptors()
    saved = sys.stdout, sys.stderr
    streams: list[Any] = [stream if stream is not None else _null(number) for number, stream in enumerate(saved, 1)]
    for stream in streams:
        if hasattr(stream, "reconfigure"):  # replace characters that the terminal can't encode
            stream.reconfigure(errors="replace")
    guards: list[Any] = [_Guard(stream, ignore=stream is streams[1]) for stream in streams]
    sys.stdout, sys.stderr = guards
    try:
        yield
    finally:
        sys.stdout, sys.stderr = streams
        for stream in streams:
            discard_unwritable(stream)


def discard_unwritable(stream: TextIO) -> None:
    """Flush a stream; if it fails, discard the rest, which the interpreter would otherwise fail to flush at exit."""
    try:
        stream.flush()
    except OSError:
        null = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        os.dup2(null, stream.fileno())
        os.close(null)


def _fill_descriptors() -> None:
    """Open /dev/null as each standard stream that is closed, or the next file opened would become that stream."""
    for number in _DESCRIPTORS:
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)  # the lowest free descriptor
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
            os.set_inheritable(number, True)


def _null(number: int) -> TextIO:
    """Return a text stream for the descriptor of a stream that was closed when the process started."""
    stream: TextIO = os.fdopen(number, "w", encoding="utf-8", closefd=False)
    return stream
