"""Reads headers in the form in which the safetensors library writes them, into columns and without a JSON parser.

The form: no white space inside the JSON, no escapes, the fields in the order dtype, shape, data_offsets, and the
tensors in the order of their bytes. Nearly all files have it. `header` parses the others, and describes what is wrong.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import accumulate
from sys import intern
from typing import NamedTuple

from ..tensors.dtypes import DTYPES
from ..tensors.refs import TensorClass

_STRING = r'"[^"\\\x00-\x1f]*"'
_NUMBER = "(0|[1-9][0-9]{0,17})"  # below 2^63
_METADATA = re.compile(rf'"__metadata__":\{{((?:{_STRING}:{_STRING}(?:,{_STRING}:{_STRING})*)?)\}}(?:,(?=")|\}}\Z)')
_PAIR = re.compile(r'"([^"]*)":"([^"]*)"')
_TENSOR = re.compile(
    rf'"([^"\\\x00-\x1f]*)":\{{"dtype":"([A-Z0-9_]+)","shape":\[([0-9,]*)\],"data_offsets":\[{_NUMBER},{_NUMBER}\]\}}'
    r'(?:,(?=")|\}\Z)'
)
_FIXED = len('"":{"dtype":"","shape":[],"data_offsets":[,]},')
_SHAPE = re.compile(r"(?:(?:0|[1-9][0-9]{0,17})(?:,(?:0|[1-9][0-9]{0,17}))*)?")
_MAX_COUNT = 1 << 64


class Columns(NamedTuple):
    """The tensors of a header in the order of their bytes, which are contiguous.

    Args:
        names: the names, all different.
        classes: the class of each tensor.
        ends: for each tensor, the offset of the first byte after it in the data.
        metadata: the strings in ``__metadata__``.
    """

    names: Sequence[str]
    classes: Sequence[TensorClass]
    ends: Sequence[int]
    metadata: Mapping[str, str]


def parse_columns(raw: bytes | memoryview) -> Columns | None:
    """Parse the JSON of a header; None if it does not have the usual form, whether or not it is valid."""
    try:
        text = str(raw, "utf-8").rstrip(" \t\r\n")
    except UnicodeDecodeError:
        return None
    if text[:1] != "{":
        return None
    begin, metadata = 1, {}
    if text.startswith('"__metadata__"', 1):
        match = _METADATA.match(text, 1)
        if match is None:
            return None
        pairs = _PAIR.findall(match[1])
        begin, metadata = match.end(), dict(pairs)
        if len(metadata) != len(pairs):
            return None
    rows = _TENSOR.findall(text, begin)
    if not rows:
        return None
    names, dtypes, shapes, begins, ends = zip(*rows, strict=True)
    del rows
    # the matches are disjoint, so if they are as long as the text, nothing is between them
    length = len(names) * _FIXED + sum(sum(map(len, column)) for column in (names, dtypes, shapes, begins, ends))
    found = [each for each in map(_class_of, dtypes, shapes) if each is not None]
    if begin + length != len(text) or len(found) != len(names) or "__metadata__" in names:
        return None
    names = tuple(map(intern, names))  # the index and other models have the same names
    expected = list(accumulate([each.nbytes for each in found]))
    if begins[0] != "0" or begins[1:] != ends[:-1] or list(map(int, ends)) != expected or len(set(names)) != len(names):
        return None
    return Columns(names, found, expected, metadata)


@lru_cache(4096)
def _class_of(dtype_name: str, shape_text: str) -> TensorClass | None:
    """The class of tensors with this dtype and these dimensions; None if they are invalid."""
    dtype = DTYPES.get(dtype_name)
    if dtype is None or not _SHAPE.fullmatch(shape_text):
        return None
    shape = tuple(map(int, shape_text.split(","))) if shape_text else ()
    elements = 1
    for dimension in shape:
        elements *= dimension
        if elements >= _MAX_COUNT:
            return None
    bits = elements * dtype.bits
    return None if bits >= _MAX_COUNT or bits % 8 else TensorClass(dtype, shape, bits // 8)
