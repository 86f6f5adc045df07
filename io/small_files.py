"""Reads the small files of a model directory, such as config.json and tokenizer files, with a limit on their size."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .open_source import open_source, read_range

MAX_SMALL_BYTES = 64 << 20
"""The default limit on the size of a small file, in bytes."""


def read_json(
    file: Path,
    limit: int = MAX_SMALL_BYTES,
    *,
    required: bool = False,
    hook: Callable[[list[tuple[str, Any]]], Any] | None = None,
) -> Any:
    """Read a JSON file.

    Args:
        file: the file.
        limit: the maximum size of the file in bytes.
        required: whether a missing file is an error; otherwise the result is None.
        hook: the ``object_pairs_hook`` of the JSON parser. A ValueError that it raises makes the file invalid.

    Raises:
        CheckpointError: the file is required and missing, not readable, too large, or not valid JSON.
        EnvironmentFailure: reading failed.
    """
    if not required and not file.is_file():
        return None
    return parse_json(file, read_small(file, limit), hook)


def parse_json(file: Path, raw: bytes, hook: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """Parse the content of a JSON file; see `read_json`. Raises CheckpointError if it is not valid."""
    try:
        return json.loads(raw.decode(), object_pairs_hook=hook)
    except RecursionError:
        raise CheckpointError(f"{file}: is not valid JSON (nested too deeply): download it again") from None
    except ValueError as error:  # not UTF-8, not JSON, or an integer with thousands of digits
        raise CheckpointError(f"{file}: is not valid JSON ({error}): download it again") from None


def read_small(file: Path, limit: int = MAX_SMALL_BYTES) -> bytes:
    """Read all bytes of a file of at most `limit` bytes.

    Raises:
        CheckpointError: the file is missing, not readable, or larger than the limit.
        EnvironmentFailure: reading failed.
    """
    with open_source(file) as (descriptor, nbytes):
        check_size(file, nbytes, limit)
        return read_range(descriptor, 0, nbytes, file=file)


def check_size(file: Path, nbytes: int, limit: int) -> None:
    """Raise CheckpointError for a file of more than `limit` bytes."""
    if nbytes > limit:
        raise CheckpointError(f"{file}: has {nbytes:,} bytes, more than the limit of {limit:,}: download it again")
