"""Reserving space ahead of the writers, where that takes as long as writing: in file systems that lie in memory.

There the pages of a file are made and cleared when they are reserved. A thread does that while the merge is getting
ready (importing torch takes a second), so that the writers find them.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from pathlib import Path

from ..platform import reserve_space

_STEP = 16 << 20  # writers to the same file wait for a step at the most


class Preallocator:
    """Reserves ranges of files, one after the other, on a thread of its own.

    Args:
        ranges: file, offset and size of each.

    Attributes:
        error: what went wrong, such as that there is no room; None so far.
    """

    def __init__(self, ranges: Sequence[tuple[Path, int, int]]) -> None:
        self.error: OSError | None = None
        self._ranges = ranges
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="reserve", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            for path, offset, nbytes in self._ranges:
                descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
                try:
                    for start in range(offset, offset + nbytes, _STEP):
                        if self._stopped or not reserve_space(descriptor, start, min(_STEP, offset + nbytes - start)):
                            return
                finally:
                    os.close(descriptor)
        except OSError as error:
            self.error = error

    def stop(self) -> None:
        """End it, wherever it is."""
        self._stopped = True
        self._thread.join()
