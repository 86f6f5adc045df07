"""Allocates disk space ahead of the writers, on file systems in memory, where allocation takes as long as writing.

There the kernel creates and clears the pages of a file when they are allocated. A thread does that while the merge
starts up (importing torch takes a second), so the writers find the pages ready.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from ..platform import reserve_space
from ..task_group import TaskGroup

_STEP_BYTES = 16 << 20  # a step blocks the writers of the same file


class Preallocator:
    """Allocates ranges of files, one after the other, in a thread.

    Args:
        ranges: file, offset and size in bytes of each range.
    """

    def __init__(self, ranges: Sequence[tuple[Path, int, int]]) -> None:
        self._ranges = ranges
        self._group = TaskGroup("preallocate")
        self._group.spawn(self._run)

    def _run(self) -> None:
        for path, offset, nbytes in self._ranges:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            try:
                for start in range(offset, offset + nbytes, _STEP_BYTES):
                    step = min(_STEP_BYTES, offset + nbytes - start)
                    if self._group.cancelled or not reserve_space(descriptor, start, step):
                        return
            finally:
                os.close(descriptor)

    def check(self) -> None:
        """Raise the error of an allocation that has failed, such as a full disk."""
        self._group.check()

    def stop(self) -> None:
        """Stop after the current step, and wait for the thread to end. Errors are left to `check`."""
        self._group.cancel()
        self._group.wait()
