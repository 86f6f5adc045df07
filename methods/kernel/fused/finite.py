"""Finds NaNs and infinities in stored numbers, at the speed of the memory."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from .assembly import Function
from .compiler import library
from .formats import STORED, Format, Integers
from .rows import address

_PART = 1 << 20
"""Elements that are looked at one by one at a time, which bounds the memory."""


def finite(data: Any, dtype: str) -> bool:
    """Whether no element is NaN or infinite.

    Args:
        data: buffer of the elements.
        dtype: their dtype by its name in a safetensors header.
    """
    form = STORED[dtype]
    count = memoryview(data).nbytes * 8 // form.bits
    if not count or isinstance(form, Integers):
        return True
    table = np.array([address(data), count], np.int64)
    return not library(_assembly(form), ("any_nonfinite",)).functions["any_nonfinite"](table.ctypes.data)


def count_nonfinite(data: Any, dtype: str) -> int:
    """The number of elements that are NaN or infinite; see `finite`."""
    form = STORED[dtype]
    if isinstance(form, Integers):
        return 0
    bits = np.frombuffer(data, f"u{form.bits // 8}")
    total = 0
    for start in range(0, len(bits), _PART):
        part = bits[start : start + _PART]
        if form.negative_zero:
            part = part & bits.dtype.type((1 << (form.bits - 1)) - 1)
            total += int(np.count_nonzero(part > form.largest))
        else:
            total += int(np.count_nonzero(part == form.nan))
    return total


def prepare(dtype: str) -> None:
    """Compile what `finite` needs, or load it from the cache directory."""
    form = STORED[dtype]
    if not isinstance(form, Integers):
        library(_assembly(form), ("any_nonfinite",))


@functools.cache
def _assembly(form: Format) -> str:
    """``any_nonfinite(table) -> i32`` for a table of an address and a number of elements."""
    type = form.stored
    segment = Function("segment", "i32", [("ptr noalias", "values"), ("i64", "count")])
    with segment.loop("%count", carried=[("i32", "0")]) as (i, (found,), following):
        bits = segment.load("%values", i, type)
        if form.negative_zero:
            magnitude = segment.value(f"and {type} {bits}, {(1 << (form.bits - 1)) - 1}")
            test = segment.value(f"icmp ugt {type} {magnitude}, {form.largest}")
        else:
            test = segment.value(f"icmp eq {type} {bits}, {form.nan - (1 << form.bits)}")
        following.append(segment.value(f"or i32 {found}, {segment.value(f'zext i1 {test} to i32')}"))
    text = segment.text(f"i32 {following[0]}")
    f = Function("any_nonfinite", "i32", [("ptr", "table")], exported=True)
    result = f.value(f"call i32 @segment(ptr {f.load('%table', 0, 'ptr')}, i64 {f.load('%table', 1, 'i64')})")
    return text + f.text(f"i32 {result}")
