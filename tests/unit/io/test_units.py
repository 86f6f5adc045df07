"""Formatting of sizes, counts, durations, ranges and names."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergeloom.io.sizes import parse_size
from mergeloom.io.units import big_number, clean, data_size, duration, listed, memory_size, plural, ranges, rate


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0B"),
        (999, "999B"),
        (1000, "1KB"),
        (999_600, "1MB"),
        (2_471_645_608, "2.47GB"),
        (10**9, "1GB"),
        (141_107_412_992, "141GB"),
        (1_350_000_000_000, "1.35TB"),
        (10**18, "1000PB"),
    ],
)
def test_data_size(nbytes: int, text: str) -> None:
    assert data_size(nbytes) == text


@given(st.integers(1, 10**14))
def test_memory_sizes_parse_as_options(nbytes: int) -> None:
    assert parse_size(data_size(nbytes)) == pytest.approx(nbytes, rel=0.006)
    assert parse_size(memory_size(nbytes, up=True)) >= nbytes


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.00 s"),
        (0.424, "0.42 s"),
        (0.999, "1.0 s"),
        (8.31, "8.3 s"),
        (9.99, "10 s"),
        (59.6, "1 min 0 s"),
        (200, "3 min 20 s"),
        (3599.7, "1 h 0 min"),
        (7500, "2 h 5 min"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_numbers() -> None:
    assert big_number(38) == "38"
    assert big_number(1_235_814_400) == "1,235,814,400 (1.24B)"
    assert big_number(681_000_000_000) == "681,000,000,000 (681B)"
    assert rate(3 * 10**9, 2) == "1.5GB/s"
    assert rate(1, 0) == "0B/s"
    assert plural(1, "tensor") == "1 tensor"
    assert plural(12_345, "tensor") == "12,345 tensors"


def test_ranges() -> None:
    assert ranges([7, 0, 1, 2, 3, 3]) == "0-3, 7"
    assert ranges([]) == ""


def test_listed() -> None:
    assert listed("abc") == "a, b, c"
    assert listed("abcde") == "a, b, c and 2 more"


@given(st.text())
def test_clean_escapes_terminal_sequences(text: str) -> None:
    cleaned = clean(text)
    assert all(c.isprintable() or c == "\n" for c in cleaned)
    cleaned.encode()
    if text.isprintable():
        assert cleaned == text
