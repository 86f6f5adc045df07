"""The least that a merge has to do: read its inputs once, in order, and write as many bytes as its output has.

    python -S benchmarks/floor.py OUT BYTES THREADS INPUT...

Each thread takes the next 4 MiB of an input or of the output, in the order of a merge, and reads or writes them with a
buffer of its own. Prints the seconds as JSON.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Iterator

PIECE = 4 << 20


def pieces(sizes: list[int], output: int) -> Iterator[tuple[int, int, int]]:
    """The file, offset and size of each piece, in the order of a merge; the output is file -1."""
    for offset in range(0, max([*sizes, output]), PIECE):
        for file, size in (*enumerate(sizes), (-1, output)):
            if offset < size:
                yield file, offset, min(PIECE, size - offset)


def main() -> None:
    """The command line."""
    directory, size, threads, *inputs = sys.argv[1:]
    os.makedirs(directory, exist_ok=True)  # noqa: PTH103  importing pathlib would take longer than this
    began = time.monotonic()
    sources = [os.open(path, os.O_RDONLY) for path in inputs]
    target = os.open(f"{directory}/output", os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
    left = pieces([os.fstat(source).st_size for source in sources], int(size))
    lock = threading.Lock()

    def work() -> None:
        buffer = memoryview(bytearray(PIECE))
        while True:
            with lock:
                file, offset, count = next(left, (-1, 0, 0))
            if not count:
                return
            if file < 0:
                os.pwrite(target, buffer[:count], offset)
            else:
                os.preadv(sources[file], [buffer[:count]], offset)

    running = [threading.Thread(target=work) for _ in range(int(threads))]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    print(json.dumps({"seconds": time.monotonic() - began}))


if __name__ == "__main__":
    main()
