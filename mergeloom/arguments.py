"""Checks and converts the arguments of the public functions."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from operator import index
from typing import SupportsIndex

from .errors import UsageError
from .io.sizes import Limit, parse_limit, parse_size

Size = int | str
"""A number of bytes, or a string such as ``32GiB``."""


def checked_overrides(overrides: Mapping[str, object]) -> tuple[str, ...]:
    """Convert overrides to those of ``--set``."""
    if not isinstance(overrides, Mapping):
        raise UsageError(f"invalid overrides {overrides!r}: use a dict of values by key")
    from .engine.recipe.overrides import override_text

    return tuple(override_text(key, value) for key, value in overrides.items())


def checked_threads(threads: int | None) -> int | None:
    """Return a number of threads. Raises UsageError if it is less than 1."""
    if threads is None or checked_number("threads", threads) > 0:
        return threads
    raise UsageError(f"invalid threads {threads}: use 1 or more")


def checked_limit(name: str, size: Size | None) -> Limit | None:
    """Convert a memory limit, which may also be a percentage."""
    if size is None:
        return None
    return parse_limit(size) if isinstance(size, str) else checked_bytes(name, size)


def checked_bytes(name: str, size: Size) -> int:
    """Convert the size that was passed as `name` to bytes."""
    if isinstance(size, str):
        return parse_size(size)
    if not isinstance(size, SupportsIndex) or (nbytes := index(size)) <= 0:
        raise UsageError(f"invalid {name} {size!r}: use a positive number of bytes, or a string such as '32GiB'")
    return nbytes


def checked_number(name: str, value: int) -> int:
    """Return the integer that was passed as `name`."""
    if not isinstance(value, SupportsIndex):
        raise UsageError(f"invalid {name} {value!r}: use a whole number")
    return index(value)


def checked_numbers(name: str, values: int | Sequence[int]) -> int | list[int]:
    """Return the integer, or the integers, that were passed as `name`."""
    if isinstance(values, Sequence) and not isinstance(values, str):
        return [checked_number(name, value) for value in values]
    return checked_number(name, values)


def checked_text(name: str, value: str) -> str:
    """Return the string that was passed as `name`."""
    if not isinstance(value, str):
        raise UsageError(f"invalid {name} {value!r}: use a string")
    return value


def checked_path(name: str, value: str | os.PathLike[str]) -> str:
    """Return the path, or the id of a model, that was passed as `name`."""
    path = os.fspath(value) if isinstance(value, (str, os.PathLike)) else None
    if not isinstance(path, str):
        raise UsageError(f"invalid {name} {value!r}: use a string or a path")
    return path


def checked_texts(name: str, values: Iterable[str] | str) -> tuple[str, ...]:
    """Return the string, or the strings, that were passed as `name`."""
    texts = [values] if isinstance(values, str) else list(values)
    return tuple(checked_text(name, text) for text in texts)
