"""Formats numbers and names for people: sizes, counts, rates, durations, layer ranges, short lists.

Memory uses binary units (KiB to TiB), like budgets; files and rates use decimal ones (KB to TB).
"""

from __future__ import annotations

from collections.abc import Iterable

from .sizes import format_size


def memory_size(nbytes: int, *, up: bool = False) -> str:
    """Format a memory size: ``1.5GiB``. Rounded up if `up` is set, so the result works as a budget."""
    return format_size(nbytes, up=up)


def data_size(nbytes: float) -> str:
    """Format a file size: ``2.47GB``, with three digits and decimal units."""
    return _scaled(nbytes, ("B", "KB", "MB", "GB", "TB", "PB"))


def rate(nbytes: float, seconds: float) -> str:
    """Format a throughput: ``1.8GB/s``; ``0B/s`` if no time has passed."""
    return f"{data_size(nbytes / seconds if seconds > 0 else 0)}/s"


def big_number(number: int) -> str:
    """Format a count: ``1,235,814,400 (1.24B)``; below 10,000 without the short form."""
    exact = f"{number:,}"
    return exact if number < 10_000 else f"{exact} ({_scaled(number, ('', 'K', 'M', 'B', 'T', 'Q'))})"


def short_number(number: int) -> str:
    """``1.24B``: three figures; the exact number below 10,000."""
    return str(number) if number < 10_000 else _scaled(number, ("", "K", "M", "B", "T", "Q"))


def plural(number: int, noun: str, nouns: str | None = None) -> str:
    """Format a count with its noun: ``1 tensor``, ``12,345 tensors``; `nouns` is the plural if it is irregular."""
    return f"{number:,} {noun if number == 1 else nouns or noun + 's'}"


def duration(seconds: float) -> str:
    """Format a duration: ``0.42 s``, ``8.3 s``, ``42 s``, ``3 min 20 s``, ``2 h 5 min``."""
    if seconds < 9.95:
        return f"{seconds:.2f} s" if seconds < 0.995 else f"{seconds:.1f} s"
    rounded = round(seconds)
    if rounded < 60:
        return f"{rounded} s"
    if rounded < 3600:
        return f"{rounded // 60} min {rounded % 60} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min"


def ranges(numbers: Iterable[int]) -> str:
    """Format integers as ranges: ``0-3, 7`` for 0, 1, 2, 3 and 7."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def listed(names: Iterable[str], most: int = 3) -> str:
    """Format the first few names and the number of the others: ``a, b, c and 4 more``."""
    items = list(names)
    more = f" and {len(items) - most:,} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more


def clean(text: str) -> str:
    """Escape control and unprintable characters except line breaks.

    Names of tensors and files come from untrusted files and may contain terminal escape sequences.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def _scaled(number: float, units: tuple[str, ...]) -> str:
    size = float(number)
    exponent = 0
    while size >= 999.5 and exponent < len(units) - 1:
        size /= 1000
        exponent += 1
    if exponent == 0:
        return f"{size:.0f}{units[0]}"
    decimals = 2 if size < 9.995 else (1 if size < 99.95 else 0)
    text = f"{size:.{decimals}f}"
    return (text.rstrip("0").rstrip(".") if decimals else text) + units[exponent]
