"""Output shards: their description, the disk space that they still need, their index, their validation."""

from __future__ import annotations

import importlib
import json
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...errors import EnvironmentFailure
from ..platform import data_bytes
from .lock import STAGE, WORK


@dataclass(frozen=True, slots=True)
class ShardFile:
    """A shard to write.

    Args:
        name: the final name.
        header: the final header, which is the first bytes of the file.
        nbytes: the size of the file in bytes, including the header.
        computed: ranges (offset, bytes) that need disk space of their own; the other ranges share blocks with sources.
    """

    name: str
    header: bytes
    nbytes: int
    computed: tuple[tuple[int, int], ...]


def missing_space(out: Path, shards: Sequence[ShardFile], shared: int) -> int:
    """Compute the disk space in bytes that the shards of a merge still need.

    Args:
        out: the output directory. An unfinished merge in it may have allocated some of the space.
        shards: all shards of the merge.
        shared: the number of bytes that share blocks with source files once the merge is finished.
    """
    needed = sum(shard.nbytes for shard in shards) - shared
    return max(0, needed - sum(_allocated(out, shard) for shard in shards))


def _allocated(out: Path, shard: ShardFile) -> int:
    """The disk space in bytes that is allocated to ranges of a shard that do not share blocks.

    The system counts shared blocks like all others, so data in ranges that are to be shared is subtracted.
    """
    for path in (out / WORK / STAGE / shard.name, out / shard.name):
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError):
            continue
        try:
            allocated = os.fstat(descriptor).st_blocks * 512
            shared = sum(data_bytes(descriptor, *extent) for extent in _shared_ranges(shard))
        finally:
            os.close(descriptor)
        return max(0, min(allocated, shard.nbytes) - shared)
    return 0


def _shared_ranges(shard: ShardFile) -> list[tuple[int, int]]:
    """The ranges (offset, bytes) of a shard that share blocks with source files: all but the header and `computed`."""
    ends = [len(shard.header), *(offset + nbytes for offset, nbytes in shard.computed)]
    starts = [*(offset for offset, _ in shard.computed), shard.nbytes]
    return [(end, start - end) for end, start in zip(ends, starts, strict=True) if start > end]


def index_bytes(weight_map: Mapping[str, str], total_size: int) -> bytes:
    """Build a ``model.safetensors.index.json``.

    Args:
        weight_map: the shard of each tensor.
        total_size: the size of all tensors in bytes.
    """
    content = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(content, indent=2) + "\n").encode()


def preload_validator() -> None:
    """Import numpy, which `validate_shard` needs, in a thread: the import takes a tenth of a second."""
    threading.Thread(target=importlib.import_module, args=("numpy",), name="preload", daemon=True).start()


def validate_shard(file: Path, name: str) -> None:
    """Check that the safetensors library can open a complete shard.

    Args:
        file: the current path of the shard.
        name: its final name, for the error.

    Raises:
        EnvironmentFailure: the library rejects the shard.
    """
    import safetensors

    try:
        with safetensors.safe_open(file, framework="numpy"):
            return
    except (safetensors.SafetensorError, OSError) as error:
        raise EnvironmentFailure(
            f"{name}: the safetensors library rejects the file that was written ({error}): the disk lost data, or this "
            "is a bug; please report it"
        ) from error
