"""Sizes and memory limits on the command line, and how sizes are printed."""

from __future__ import annotations

import re

import pytest

from mergeloom.errors import UsageError
from mergeloom.io.sizes import Share, format_size, parse_limit, parse_memory, parse_size


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("4096", 4096),
        ("5B", 5),
        ("8G", 8 << 30),
        ("8g", 8 << 30),
        ("8Gi", 8 << 30),
        ("8GiB", 8 << 30),
        ("8 GB", 8 * 10**9),
        ("512M", 512 << 20),
        ("2K", 2048),
        ("1T", 1 << 40),
        (".5KiB", 512),
        ("1.5tb", 1_500_000_000_000),
    ],
)
def test_sizes(text: str, nbytes: int) -> None:
    assert parse_size(text) == nbytes
    assert parse_limit(text if re.search("[A-Za-z]", text) else f"{text}B") == nbytes


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "3 potatoes", "8GBs", "1,5GB", "50%%", "nan", "1e9"])
def test_invalid_sizes(text: str) -> None:
    with pytest.raises(UsageError, match="use a number and B, KB, MB, GB, TB"):
        parse_limit(text)


def test_memory_needs_a_unit_if_it_is_small() -> None:
    assert parse_limit("1048576") == parse_limit("1MiB") == 1 << 20
    assert parse_limit("100B") == 100
    for parse in (parse_limit, parse_memory):
        with pytest.raises(UsageError, match="invalid size '16': .* counts bytes; use, for example, 16GiB"):
            parse("16")


def test_a_percentage_is_a_limit_but_not_a_size() -> None:
    assert parse_limit("50%") == Share(50)
    assert parse_limit(" 12.5 % ").of(1000) == 125  # type: ignore[union-attr]
    with pytest.raises(UsageError, match="a percentage works only for --max-ram and --max-vram"):
        parse_size("50%")


@pytest.mark.parametrize("text", ["0%", "101%"])
def test_invalid_percentages(text: str) -> None:
    with pytest.raises(UsageError, match="more than 0% and at most 100%"):
        parse_limit(text)


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (1023, "1023B"),
        (1024, "1KiB"),
        (1300, "1.27KiB"),
        (12_650, "12.4KiB"),
        (1023.7 * 1024, "1MiB"),
        (3.256 * 2**30, "3.26GiB"),
        (284.4 * 2**20, "284MiB"),
        (2000 * 2**40, "2000TiB"),
    ],
)
def test_memory_sizes_have_three_digits(nbytes: float, text: str) -> None:
    assert format_size(nbytes) == text


def test_rounding_up_never_shows_less() -> None:
    assert format_size(3.251 * 2**30, up=True) == "3.26GiB"
    assert format_size(1023.1 * 2**20, up=True) == "1GiB"
