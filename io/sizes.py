"""Parses and formats sizes in bytes, such as 32GiB."""

from __future__ import annotations

import re

from ..errors import UsageError

_UNITS = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}


def parse_size(text: str) -> int:
    """Parse ``5GB``, ``32GiB``, ``1.5TB`` or ``4096`` into bytes. Raises UsageError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = _UNITS.get((match[2] or "B").upper()) if match else None
    if match is None or unit is None:
        raise UsageError(
            f"invalid size {text!r}: use a number and B, KB, MB, GB, TB, KiB, MiB, GiB or TiB, such as 32GiB"
        )
    size = int(float(match[1]) * unit)
    if size <= 0:
        raise UsageError(f"invalid size {text!r}: it must be more than 0 bytes")
    return size


def format_size(nbytes: float, *, up: bool = False) -> str:
    """Format a size with a binary unit and two or three digits, such as ``3.2GiB``; rounded up if `up` is set."""
    size, units = float(nbytes), ["B", "KiB", "MiB", "GiB", "TiB"]
    while abs(size) >= 1024 and len(units) > 1:
        size /= 1024
        del units[0]
    if units[0] == "B":
        return f"{size:.0f}B"
    step = 1 if size >= 100 else 10
    rounded = -(-size * step // 1) / step if up else round(size * step) / step
    return f"{rounded:g}{units[0]}"
