"""JSON in pieces has the same bytes as in one string, and is never in memory completely."""

from __future__ import annotations

import json
import tracemalloc
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergeloom.io.json_pieces import PIECE_BYTES, equals_pieces, json_pieces

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=20,
)


@settings(max_examples=200, deadline=None)
@given(values, st.sampled_from([None, 1, 2]), st.booleans(), st.booleans())
def test_the_bytes_are_those_of_dumps(content: Any, indent: int | None, sort_keys: bool, ensure_ascii: bool) -> None:
    options: dict[str, Any] = {"indent": indent, "sort_keys": sort_keys, "ensure_ascii": ensure_ascii}
    assert b"".join(json_pieces(content, **options)) == json.dumps(content, **options).encode()


def test_long_text_comes_in_pieces() -> None:
    content = {f"tensor {number}": "é" * 30 for number in range(20_000)}
    tracemalloc.start()
    sizes = [len(piece) for piece in json_pieces(content, indent=1, ensure_ascii=False)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sum(sizes) == len((json.dumps(content, indent=1, ensure_ascii=False)).encode())
    assert all(PIECE_BYTES <= size < 2 * PIECE_BYTES for size in sizes[:-1])
    assert peak < 8 * PIECE_BYTES < sum(sizes)


@pytest.mark.parametrize(
    ("pieces", "equal"),
    [([b"ab", b"c"], True), ([b"abc"], True), ([b"ab"], False), ([b"abc", b"d"], False), ([b"ab", b"d"], False)],
)
def test_pieces_are_compared(pieces: list[bytes], equal: bool) -> None:
    assert equals_pieces(b"abc", pieces) == equal
    assert equals_pieces(b"", [])
