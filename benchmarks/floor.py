"""The least that a merge has to do: read its inputs once, in order, and write as many bytes as its output has.

    python -S benchmarks/floor.py OUT BYTES INPUT...

One thread, 1 MiB at a time. Prints the seconds of reading and of writing as JSON.
"""

from __future__ import annotations

import json
import os
import sys
import time

PIECE = 1 << 20


def read(path: str, buffer: bytearray) -> None:
    """Read a file to its end, into the same buffer again and again."""
    descriptor = os.open(path, os.O_RDONLY)
    while os.readv(descriptor, [buffer]):
        pass
    os.close(descriptor)


def write(path: str, size: int, buffer: bytes) -> None:
    """Write a file of `size` bytes, from the same buffer again and again."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    left = size
    while left:
        left -= os.write(descriptor, memoryview(buffer)[: min(left, PIECE)])
    os.close(descriptor)


def main() -> None:
    """The command line."""
    directory, size, *inputs = sys.argv[1:]
    began = time.monotonic()
    for path in inputs:
        read(path, bytearray(PIECE))
    between = time.monotonic()
    os.makedirs(directory, exist_ok=True)  # noqa: PTH103  importing pathlib would take longer than this
    write(f"{directory}/output", int(size), os.urandom(PIECE))
    print(json.dumps({"read": between - began, "write": time.monotonic() - between}))


if __name__ == "__main__":
    main()
