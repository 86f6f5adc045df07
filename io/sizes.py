"""Parses and formats sizes in bytes, such as 32GiB."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..errors import UsageError

_UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    **{f"{prefix}{end}": 2 ** (10 * power) for power, prefix in enumerate("KMGT", 1) for end in ("", "I", "IB")},
}
"""The units, in upper case. As in other command lines, a prefix alone is a power of 1024: 8G is 8GiB."""

_LEAST_MEMORY = 1 << 20
"""No memory is smaller than this in bytes."""


@dataclass(frozen=True, slots=True)
class Share:
    """A share of a memory whose size is found out later, such as 50%.

    Args:
        percent: more than 0, up to 100.
    """

    percent: float

    def of(self, nbytes: int) -> int:
        """Return the share of a memory of `nbytes` in bytes."""
        return max(1, int(nbytes * self.percent / 100))


Limit = int | Share
"""A memory limit: a number of bytes, or a share of the memory."""


def parse_size(text: str) -> int:
    """Parse ``5GB``, ``32GiB``, ``32G``, ``1.5TB`` or ``4096`` into bytes. Raises UsageError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*([A-Za-z]*)\s*", text)
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None:
        percent = "; a percentage works only for --max-ram and --max-vram" if "%" in text else ""
        raise UsageError(
            f"invalid size {text!r}: use a number and B, KB, MB, GB, TB, KiB, MiB, GiB or TiB, such as 32GiB{percent}"
        )
    size = int(float(match[1]) * unit)
    if size <= 0:
        raise UsageError(f"invalid size {text!r}: it must be more than 0 bytes")
    return size


def parse_memory(text: str) -> int:
    """Parse a size of memory, as `parse_size`. A small number without a unit is rejected: it lacks its unit."""
    size = parse_size(text)
    if size < _LEAST_MEMORY and not re.search("[A-Za-z]", text):
        raise UsageError(f"invalid size {text!r}: a number without a unit counts bytes; use, for example, {size}GiB")
    return size


def parse_limit(text: str) -> Limit:
    """Parse a memory limit: a size as for `parse_memory`, or a percentage such as ``50%``. Raises UsageError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*%\s*", text)
    if match is None:
        return parse_memory(text)
    percent = float(match[1])
    if not 0 < percent <= 100:
        raise UsageError(f"invalid size {text!r}: a percentage of the memory is more than 0% and at most 100%")
    return Share(percent)


def format_size(nbytes: float, *, up: bool = False) -> str:
    """Format a size with a binary unit and three digits, such as ``3.25GiB``; rounded up if `up` is set."""
    size, units = float(nbytes), ["B", "KiB", "MiB", "GiB", "TiB"]
    while len(units) > 1 and abs(_rounded(size, up)) >= 1024:
        size /= 1024
        del units[0]
    return f"{size:.0f}B" if units[0] == "B" else f"{_rounded(size, up):g}{units[0]}"


def _rounded(size: float, up: bool) -> float:
    """Round a number to three digits, or to a whole number if it has more."""
    step = 1 if abs(size) >= 99.95 else 10 if abs(size) >= 9.995 else 100
    return -(-size * step // 1) / step if up else round(size * step) / step
