"""Reads a model's vocabulary, which maps tokens to rows of the embeddings, from its tokenizer files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import CheckpointError
from ...io.companions import read_json, read_small
from ...io.output.digests import file_digest

_TEXTS = ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
_OPAQUE = (".tiktoken", "tekken.json")
"""Files whose tokens are bytes instead of text. They are compared by digest."""
_BROKEN = (ValueError, TypeError, KeyError, AttributeError, IndexError, StopIteration)


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The tokens of a tokenizer.

    Args:
        file: file that contains most of the tokens.
        rows: row of each token.
        digest: digest of `file` if its tokens are bytes; `rows` then contains only added tokens.
    """

    file: Path
    rows: Mapping[str, int]
    digest: str | None = None


def read_vocabulary(directory: Path) -> Vocabulary | None:
    """Read the vocabulary of the tokenizer in a model directory; None if there is no tokenizer.

    The tokens come from tokenizer.json, else from vocab.json, vocab.txt or a SentencePiece model, and in addition from
    added_tokens.json and tokenizer_config.json.

    Raises:
        CheckpointError: a file cannot be read or has an invalid format.
    """
    main = _main_file(directory)
    if main is None:
        return None
    rows: dict[str, int] = {}
    digest = None
    try:
        if main.name.endswith(_OPAQUE):
            digest = file_digest(main)
        elif main.name == "tokenizer.json":
            rows = _tokenizer_json_rows(read_json(main))
        elif main.name == "vocab.json":
            rows = _mapping_rows(read_json(main))
        elif main.name == "vocab.txt":
            lines = read_small(main).decode().removesuffix("\n").split("\n")
            rows = {line.removesuffix("\r"): row for row, line in enumerate(lines)}
        else:
            rows = {piece: row for row, piece in enumerate(_pieces(read_small(main)))}
        return Vocabulary(main, _added(directory, main) | rows, digest)
    except _BROKEN as error:
        raise CheckpointError(
            f"{directory}: invalid tokenizer files ({type(error).__name__}: {error}): download them again"
        ) from error


def same_files(first: Path, second: Path) -> bool:
    """Whether the vocabulary files of two directories are identical, which avoids parsing them for a comparison."""
    ours, theirs = _main_file(first), _main_file(second)
    if ours is None or theirs is None or ours.name != theirs.name:
        return False
    if ours.stat().st_size != theirs.stat().st_size or file_digest(ours) != file_digest(theirs):
        return False
    try:
        return _added(first, ours) == _added(second, theirs)
    except _BROKEN:
        return False  # `read_vocabulary` reports the error


def difference(first: Vocabulary, second: Vocabulary, names: tuple[str, str]) -> str | None:
    """Describe how two vocabularies differ; None if every token has the same row in both.

    Args:
        first: first vocabulary.
        second: second vocabulary.
        names: names of the two models.
    """
    if first.digest != second.digest:
        if first.digest is None or second.digest is None:
            return (
                f"{names[0]} has {first.file.name} and {names[1]} has {second.file.name}, which cannot be compared: "
                "add tokenizer.json to both"
            )
        return f"{first.file.name} differs between {names[0]} and {names[1]}"
    if first.rows == second.rows:
        return None
    moved = [token for token, row in first.rows.items() if second.rows.get(token) != row]
    new = [token for token in second.rows if token not in first.rows]
    token = min((*moved, *new), key=lambda text: first.rows.get(text, second.rows.get(text, 0)))
    rows = " and ".join(
        f"row {vocabulary.rows[token]} in {name}" if token in vocabulary.rows else f"no row in {name}"
        for vocabulary, name in zip((first, second), names, strict=True)
    )
    others = len(moved) + len(new) - 1
    more = f", and {others:,} other{'s differ' if others > 1 else ' differs'} as well" if others else ""
    return f"token {token!r} has {rows}{more}"


def _main_file(directory: Path) -> Path | None:
    """The file that contains most of the vocabulary."""
    names = [*_TEXTS, *sorted(file.name for file in directory.glob("*") if file.name.endswith(_OPAQUE))]
    return next((directory / name for name in names if (directory / name).is_file()), None)


def _tokenizer_json_rows(content: Mapping[str, Any]) -> dict[str, int]:
    """The rows of a tokenizer.json, the format of the tokenizers library."""
    vocabulary = content["model"]["vocab"]
    if isinstance(vocabulary, list):  # Unigram: pairs of token and score
        rows = {str(entry[0]): row for row, entry in enumerate(vocabulary)}
    else:
        rows = _mapping_rows(vocabulary)
    return rows | {str(token["content"]): _row(token["id"]) for token in content.get("added_tokens") or ()}


def _mapping_rows(content: Mapping[str, Any]) -> dict[str, int]:
    return {token: _row(row) for token, row in content.items()}


def _row(value: object) -> int:
    """Convert a row number, which is a string if it is a JSON key. Raises ValueError for any other value."""
    if isinstance(value, (int, str)):
        return int(value)
    raise ValueError(f"invalid row {value!r}")


def _added(directory: Path, main: Path) -> dict[str, int]:
    """The rows of tokens outside the main file. A tokenizer.json includes those of added_tokens.json."""
    rows = {} if main.name == "tokenizer.json" else _mapping_rows(read_json(directory / "added_tokens.json") or {})
    config = read_json(directory / "tokenizer_config.json") or {}
    decoder = config.get("added_tokens_decoder") or {}
    return rows | {str(token["content"]): _row(row) for row, token in decoder.items()}


def _pieces(data: bytes) -> Iterator[str]:
    """Yield the pieces of a SentencePiece model: field 1 of the message, whose own field 1 is the text."""
    for number, piece in _fields(data):
        if number == 1:
            yield next(value for field, value in _fields(piece) if field == 1).decode()


def _fields(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield the number and content of the length-delimited fields of a protocol buffers message."""
    place = 0
    while place < len(data):
        key, place = _varint(data, place)
        kind = key & 7
        if kind == 0:
            _, place = _varint(data, place)
        elif kind in (1, 5):
            place += 8 if kind == 1 else 4
        elif kind == 2:
            length, place = _varint(data, place)
            if place + length > len(data):
                raise ValueError("field extends past the end of the message")
            yield key >> 3, data[place : place + length]
            place += length
        else:
            raise ValueError(f"unknown wire type {kind}")


def _varint(data: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
        shift += 7
        if shift > 63:
            raise ValueError("varint of more than 64 bits")
