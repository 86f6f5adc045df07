"""Copies a small file so that the target is either complete and durable or unchanged."""

from __future__ import annotations

import os
from pathlib import Path

from ...errors import CheckpointError
from ..os_errors import explain
from ..platform import create_file, make_directory, remove, rename, sync_data, sync_directory, write_at

_CHUNK = 1 << 20


def copy_file(source: Path, target: Path) -> int:
    """Copy a file's bytes, so that `target` is either whole and durable or as it was before; its size in bytes.

    Raises:
        CheckpointError: `source` can't be read.
        DiskSpaceError: there is no room.
        EnvironmentFailure: the disk got in the way otherwise.
    """
    temporary = target.with_name(f".{target.name}.partial")
    try:
        stream = source.open("rb")
    except OSError as error:
        raise CheckpointError(f"{source}: can't be read: {error.strerror}") from error
    with stream:
        try:
            make_directory(target.parent)
            descriptor = create_file(temporary)
            try:
                nbytes = 0
                while data := stream.read(_CHUNK):
                    write_at(descriptor, data, nbytes)
                    nbytes += len(data)
                sync_data(descriptor)
            finally:
                os.close(descriptor)
            rename(temporary, target)
            sync_directory(target.parent)
        except OSError as error:
            raise explain(error, target, f"copying {source}") from error
        finally:
            remove(temporary)
    return nbytes
