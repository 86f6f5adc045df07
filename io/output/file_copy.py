"""Copies a small file atomically and durably: the target is either complete or unchanged."""

from __future__ import annotations

import os
from pathlib import Path

from ..os_errors import translate_os_error, translating_read_errors
from ..platform import create_file, make_directory, remove, rename, sync_data, sync_directory, write_at

_CHUNK = 1 << 20


def copy_file(source: Path, target: Path) -> int:
    """Copy a file atomically and durably, and return its size in bytes.

    Raises:
        CheckpointError: `source` is missing or not readable.
        DiskSpaceError: the disk is full.
        EnvironmentFailure: reading or writing failed otherwise.
    """
    temporary = target.with_name(f".{target.name}.partial")
    with translating_read_errors(source):
        stream = source.open("rb")
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
            raise translate_os_error(error, target, f"copying {source}") from error
        finally:
            remove(temporary)
    return nbytes
