"""The size of the process: what grows with the merge, and how `plan` and `merge` agree on the rest.

Two processes that do the same differ by a few hundred KiB of resident memory. Rounding alone cannot hide that: sizes
near a multiple of the step fall on both of its sides. So the first process rounds up with a margin and stores the
result in the user's cache directory. Later processes for the same recipe and versions take over the stored size if it
fits.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...version import __version__
from ..graph.graph import MergeGraph
from ..schedule.step_list import step_list_bytes

MAX_STORED = 256
"""Maximum number of stored sizes; the oldest are dropped."""

SCHEDULES = 5
"""Number of schedules that exist at one time, at most: that of the plan, that for OUT, and three while a resumed merge
plans the steps that are left (the best one, the best one for a slot size, and the one that is simulated)."""
OUTPUT_BYTES = 1024
"""RAM of each output tensor after the plan, in bytes: destinations, digests, records and the manifest. Measured: merges
of 2,000 to 33,000 tensors of three models took 1,400 to 1,900 bytes for each of them and its three reads."""
READ_BYTES = 384
"""RAM of each input tensor after the plan, in bytes: digests, and the records of a merge that is resumed. Measured:
1,800 to 2,200 bytes for each output tensor of a resumed merge and its three reads."""


@dataclass(frozen=True, slots=True)
class GraphSize:
    """The numbers that the memory of a merge grows with.

    Args:
        reads: number of input tensors.
        outputs: number of output tensors.
        steps: number of steps of the schedule.
        sources: number of sources of all steps.
    """

    reads: int
    outputs: int
    steps: int
    sources: int

    @classmethod
    def of(cls, graph: MergeGraph) -> GraphSize:
        """Return the size of a graph."""
        steps = sources = 0
        for number, count in Counter(graph.node_class).items():
            node = graph.class_nodes[number]
            passes = graph.operation(node).passes
            steps += passes * count
            sources += passes * len(graph.node_sources[node]) * count
        return cls(len(graph.reads), len(graph.outputs), steps, sources)

    def nbytes(self, *, separate: bool = False) -> int:
        """Return the RAM that a merge takes for them after the process was measured, in bytes.

        Args:
            separate: whether a device with its own memory computes.
        """
        steps = step_list_bytes(self.steps, self.sources, separate=separate)
        return SCHEDULES * steps + self.outputs * OUTPUT_BYTES + self.reads * READ_BYTES


def size_key(*parts: object) -> str:
    """Return the key of a process that runs with these versions of Python, mergeloom and what it computes with.

    Args:
        parts: everything else that its memory depends on, such as the recipe's text.
    """
    libraries = [getattr(sys.modules.get(name), "__version__", None) for name in ("torch", "llvmlite")]
    text = json.dumps([__version__, platform.python_version(), *libraries, *parts], default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def rounded(size: int, step: int) -> int:
    """Round a size up to a multiple of `step`, both in bytes."""
    return -(-size // step) * step


def agreed_sizes(measured: Sequence[int], step: int, key: str) -> tuple[int, ...]:
    """Return rounded sizes that are equal in all processes with one key, at least those measured.

    Without a cache directory that can be read and written, each process rounds for itself.

    Args:
        measured: measured sizes in bytes.
        step: the sizes are rounded up to a multiple of this, in bytes, with a quarter step as a margin.
        key: see `size_key`.
    """
    stored = _read()
    known = stored.get(key, ())
    if len(known) == len(measured) and all(
        size <= old <= size + 2 * step for size, old in zip(measured, known, strict=True)
    ):
        return known
    sizes = tuple(rounded(size + step // 4, step) for size in measured)
    stored.pop(key, None)
    _write(dict(list(stored.items())[1 - MAX_STORED :]) | {key: sizes})
    return sizes


def _file() -> Path:
    directory = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # noqa: PTH111  Path's raises
    return Path(directory) / "mergeloom" / "process-sizes.json"


def _read() -> dict[str, tuple[int, ...]]:
    """Read the stored sizes, the oldest first; none if the file is missing or damaged."""
    try:
        content = json.loads(_file().read_text())
        return {str(key): tuple(int(size) for size in sizes) for key, sizes in content.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _write(sizes: dict[str, tuple[int, ...]]) -> None:
    """Store the sizes, atomically. A cache directory that cannot be written is not an error."""
    file = _file()
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=file.parent, prefix=file.name)
        with os.fdopen(descriptor, "w") as stream:
            json.dump(sizes, stream)
        Path(name).replace(file)
