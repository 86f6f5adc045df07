"""What the weight files of any supported format contain: names and classes of tensors, and where they lie."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from ..safetensors.header import Header, parse_header, read_header, read_raw_header
from ..tensors.refs import TensorClass, TensorRef
from ..tensors.views import View
from .torch_names import is_torch_name

if TYPE_CHECKING:
    from ..torch_files.state_dict import TorchFile

SAFETENSORS = "safetensors"
"""Name of the format with a header."""

_THREADS = 8  # to hide the latency of a network file system
_AHEAD = 4 * _THREADS


class Contents(Protocol):
    """The tensors of one file in columns, ordered by offset."""

    @property
    def names(self) -> Sequence[str]:
        """The names, interned."""

    @property
    def classes(self) -> Sequence[TensorClass]:
        """The class of each tensor."""

    @property
    def offsets(self) -> Sequence[int]:
        """The position of each tensor's first byte in the file, in bytes."""

    @property
    def metadata(self) -> Mapping[str, str]:
        """Texts that describe the file; empty if there are none."""


class Extras:
    """What files have besides tensors in the order of their shapes; collected while their contents are combined.

    Attributes:
        kind: name of the format, for display.
    """

    def __init__(self) -> None:
        self.kind = SAFETENSORS
        self._files: list[TorchFile] = []

    def collect(self, contents: Iterable[Contents]) -> Iterator[Contents]:
        """Yield the contents of files, and remember what is needed of them."""
        for each in contents:
            if not isinstance(each, Header):
                file = cast("TorchFile", each)  # whose class is only loaded for such files
                self.kind = file.kind
                self._files.append(file)
            yield each

    def remarks(self) -> list[str]:
        """The remarks on all files."""
        return [remark for file in self._files for remark in file.remarks]

    def views(self, tensors: Mapping[str, TensorRef]) -> dict[str, View]:
        """The tensors of a checkpoint that are views, by name."""
        return {
            name: view for file in self._files for name, view in file.views.items() if tensors[name].file == file.file
        }


def read_contents(files: Sequence[Path]) -> Iterator[Contents]:
    """Read where the tensors of files lie, in the order of the files.

    Raises:
        CheckpointError: a file is missing, not readable or damaged.
        EnvironmentFailure: reading failed.
    """
    if files and is_torch_name(files[0].name):
        from ..torch_files.reader import read_torch_file

        return map(read_torch_file, files)
    return _read_headers(files)


def _read_headers(files: Sequence[Path]) -> Iterator[Header]:
    """Read headers in the order of their files, a few at a time in advance: all at once would take more memory.

    Other threads only read: memory that they allocate for parsed headers would not be reused by this one.
    """
    if len(files) == 1:
        yield read_header(files[0])
        return
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="headers") as pool:
        pending: deque[Future[tuple[bytes, int]]] = deque()
        try:
            for number, file in enumerate(files):
                while len(pending) < _AHEAD and number + len(pending) < len(files):
                    pending.append(pool.submit(read_raw_header, files[number + len(pending)]))
                raw, size = pending.popleft().result()
                yield parse_header(raw, size, file=file)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
