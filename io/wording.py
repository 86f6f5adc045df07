"""Numbers and names in words: sizes, counts, rates, times and layer ranges as reports and progress show them.

Memory is in KiB to TiB, as budgets are given; files and rates are in KB to TB, as disks and the Hub count.
"""

from __future__ import annotations

from collections.abc import Iterable

from .sizes import format_size


def memory_size(nbytes: int, *, up: bool = False) -> str:
    """``1.5GiB``; rounded up where `up` is set, so that it can be given as a budget."""
    return format_size(nbytes, up=up)


def data_size(nbytes: float) -> str:
    """``2.47GB``: three figures, decimal units."""
    return _scaled(nbytes, ("B", "KB", "MB", "GB", "TB", "PB"))


def rate(nbytes: float, seconds: float) -> str:
    """``1.8GB/s``; ``0B/s`` where no time has passed."""
    return f"{data_size(nbytes / seconds if seconds > 0 else 0)}/s"


def big_number(number: int) -> str:
    """``1,235,814,400 (1.24B)``; only the first where that is short."""
    return f"{number:,}" if number < 10_000 else f"{number:,} ({short_number(number)})"


def short_number(number: int) -> str:
    """``1.24B``: three figures; the exact number below 10,000."""
    return str(number) if number < 10_000 else _scaled(number, ("", "K", "M", "B", "T", "Q"))


def plural(number: int, noun: str, nouns: str | None = None) -> str:
    """``1 tensor``, ``12,345 tensors``; `nouns` is the plural where an s doesn't make it."""
    return f"{number:,} {noun if number == 1 else nouns or noun + 's'}"


def duration(seconds: float) -> str:
    """``0.42 s``, ``8.3 s``, ``42 s``, ``3 min 20 s``, ``2 h 5 min``."""
    if seconds < 9.95:
        return f"{seconds:.2f} s" if seconds < 0.995 else f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min"


def ranges(numbers: Iterable[int]) -> str:
    """``0-3, 7`` for 0, 1, 2, 3 and 7."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def listed(names: Iterable[str], most: int = 3) -> str:
    """The first few names, and how many more there are."""
    found = list(names)
    more = f" and {len(found) - most:,} more" if len(found) > most else ""
    return ", ".join(found[:most]) + more


def clean(text: str) -> str:
    """`text` with everything that a terminal would obey, or can't show, escaped; line breaks stay.

    Names of tensors and files come from others, and may hold anything.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def _scaled(number: float, units: tuple[str, ...]) -> str:
    size = float(number)
    place = 0
    while size >= 999.5 and place < len(units) - 1:
        size /= 1000
        place += 1
    if place == 0:
        return f"{size:.0f}{units[0]}"
    figures = 2 if size < 9.995 else (1 if size < 99.95 else 0)
    text = f"{size:.{figures}f}"
    return (text.rstrip("0").rstrip(".") if figures else text) + units[place]
