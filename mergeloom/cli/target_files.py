"""Files that the user names for mergeloom to write: a report, a page. The only way in which a command writes one."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import stat
import sys
from pathlib import Path

from ..errors import EnvironmentFailure, MergeloomError, UsageError

_OURS = (
    # `merge --report`: the same keys in the same order since 0.1.0
    re.compile(rb'\{\s*"output": \{\s*"tensors": \d+,\s*"parameters": \d+,\s*"bytes": \d+,'),
    # `plan --html`: the generator is named in the head since 0.1.0
    re.compile(
        rb'<!doctype html>\s*<html lang="en">\s*<head>\s*(?:<meta [^>]*>\s*)*<meta name="generator" content="mergeloom '
    ),
)
_BEGINNING_BYTES = 4096
_STANDARD_STREAMS = re.compile(r"/dev/(?:(stdout)|stderr|fd/([12]))|/proc/self/fd/([12])")


class TargetFile:
    """A file to write, checked before the work whose result goes into it.

    A new file is created. An existing one is replaced only if it begins like a report or a page of mergeloom's; links
    to it are followed. A named pipe and the process's own standard output and error are written to. Anything else is
    refused.

    Args:
        option: the option that names the file, for messages.
        path: the file.

    Raises:
        UsageError: the file can't be written, or must not be.
    """

    def __init__(self, option: str, path: str) -> None:
        self._name = f"{option} {path}"
        self._path = Path(path)
        self._stream = _standard_stream(path)
        self._check(UsageError)

    def write(self, text: str, note: str = "") -> None:
        """Write all of the file; a regular file is replaced as a whole, or not at all.

        Args:
            text: the content.
            note: added to the message of a failure.

        Raises:
            EnvironmentFailure: the file can't be written, or something else was put in its place since it was checked.
        """
        data = text.encode()
        try:
            if self._stream is not None:
                _write_stream(self._stream, data)
            elif self._check(EnvironmentFailure):
                _write_pipe(self._path, data)
            else:
                _replace(self._path.resolve(), data)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise EnvironmentFailure(f"{self._name}: can't be written ({error.strerror}){note}") from error
        except MergeloomError as error:
            raise EnvironmentFailure(f"{error}{note}") from error

    def _check(self, refusal: type[MergeloomError]) -> bool:
        """Whether the file is a named pipe. Raises `refusal` where it can't or must not be written."""
        if self._stream is not None:
            return False
        try:
            status = self._path.stat() if os.path.lexists(self._path) else None
            if status is not None and stat.S_ISFIFO(status.st_mode):
                return True
            problem = _obstacle(self._path, status)
        except FileNotFoundError:
            problem = "is a broken link; choose another file"
        except OSError as error:
            problem = f"can't be looked up ({error.strerror})"
        if problem:
            raise refusal(f"{self._name}: {problem}")
        return False


def _obstacle(path: Path, status: os.stat_result | None) -> str:
    """Why a file must not be created or replaced; empty where it may."""
    if status is not None:
        if not stat.S_ISREG(status.st_mode):
            kind = "a directory" if stat.S_ISDIR(status.st_mode) else "a device or a socket"
            return f"is {kind}; choose another file"
        if not _is_ours(path):
            return "exists, and is not a report or a page of mergeloom's; choose another file, or remove it"
    directory = path.resolve().parent
    if not directory.is_dir():
        return f"there is no directory {directory}"
    if not os.access(directory, os.W_OK | os.X_OK):
        return f"can't be written: {directory} is not writable"
    return ""


def _is_ours(path: Path) -> bool:
    with path.open("rb") as stream:
        beginning = stream.read(_BEGINNING_BYTES)
    return any(pattern.match(beginning) for pattern in _OURS)


def _standard_stream(path: str) -> int | None:
    """The descriptor of the process's own standard output or error that a path names; None for any other path."""
    match = _STANDARD_STREAMS.fullmatch(path)
    if match is None:
        return None
    return 1 if match[1] else int(match[2] or match[3] or 2)


def _write_stream(descriptor: int, data: bytes) -> None:
    """Write to a standard stream itself: to open its path would begin at the start of a file that it goes to."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    _write_all(descriptor, data)


def _write_pipe(path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)  # waits for a reader
    try:
        if not stat.S_ISFIFO(os.fstat(descriptor).st_mode):
            raise OSError(0, "it is not a named pipe any more")
        _write_all(descriptor, data)
    finally:
        os.close(descriptor)


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _replace(path: Path, data: bytes) -> None:
    """Give a regular file a new content, or create it: under another name in its directory first, then renamed."""
    mode = stat.S_IMODE(path.stat().st_mode) if path.exists() else None
    temporary = path.with_name(f".mergeloom-{secrets.token_hex(8)}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        try:
            _write_all(descriptor, data)
            if mode is not None:
                os.fchmod(descriptor, mode)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        temporary.rename(path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        raise
