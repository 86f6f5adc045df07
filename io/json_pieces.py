"""Encodes JSON in pieces: the text of a manifest or an index has a line for each tensor and is never in memory."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

PIECE_BYTES = 64 << 10
"""Minimum size of each piece in bytes, except for the last one."""


def json_pieces(
    content: Any, *, indent: int | None = None, sort_keys: bool = False, ensure_ascii: bool = True
) -> Iterator[bytes]:
    """Yield the bytes of ``json.dumps(content, ...).encode()`` in pieces of about `PIECE_BYTES`.

    Args:
        content: plain data.
        indent: as for `json.dumps`.
        sort_keys: as for `json.dumps`.
        ensure_ascii: as for `json.dumps`.

    Raises:
        TypeError, ValueError: as for `json.dumps`; pieces may have been yielded before.
    """
    encoder = json.JSONEncoder(indent=indent, sort_keys=sort_keys, ensure_ascii=ensure_ascii)
    piece = bytearray()
    for text in encoder.iterencode(content):
        piece += text.encode()
        if len(piece) >= PIECE_BYTES:
            yield bytes(piece)
            piece.clear()
    if piece:
        yield bytes(piece)


def equals_pieces(data: bytes, pieces: Iterable[bytes]) -> bool:
    """Return whether bytes consist of exactly these pieces."""
    position = 0
    for piece in pieces:
        if not data.startswith(piece, position):
            return False
        position += len(piece)
    return position == len(data)
