"""Parses JSON by the rules of serde_json, which are stricter than the standard library's."""

from __future__ import annotations

import json
from math import isinf
from typing import Any, NoReturn

from ..open_source import quoted


class _MalformedError(ValueError):
    """JSON that the standard library accepts but the format does not."""


def parse_strictly(text: str) -> Any:
    """Parse a JSON text. Raises ValueError if it is invalid, and RecursionError if it is nested too deeply."""
    return json.loads(text, object_pairs_hook=_object, parse_int=_integer, parse_float=_real, parse_constant=_constant)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        # Stricter than the library, which takes the last of two tensors or metadata entries of one name: the format
        # disallows duplicate keys, and different readers would see different models.
        seen: set[str] = set()
        duplicate = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise _MalformedError(f"duplicate key {quoted(duplicate)}")
    return document


def _integer(text: str) -> int | float:
    # Like serde_json: -0 and numbers that don't fit 64 bits are floats. This also keeps long digit strings from int().
    return int(text) if len(text) <= 20 and text != "-0" else _real(text)


def _real(text: str) -> float:
    value = float(text)
    if isinf(value):
        raise _MalformedError(f"the number {quoted(text)} is out of range")
    return value


def _constant(text: str) -> NoReturn:
    raise _MalformedError(f"{text} is not valid JSON")
