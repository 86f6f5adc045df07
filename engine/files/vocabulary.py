"""A model's vocabulary, from its tokenizer's files: which token stands for which row of the embeddings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import CheckpointError
from ...io.output.digests import file_digest
from ...io.small_files import read_json, read_small

_TEXTS = ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
_OPAQUE = (".tiktoken", "tekken.json")
"""Files whose tokens are bytes, not text: they are compared as they are."""
_BROKEN = (ValueError, TypeError, KeyError, AttributeError, IndexError, StopIteration)


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The tokens of a tokenizer.

    Args:
        file: the one that holds most of them.
        rows: the row of each token.
        digest: of `file`, where its tokens have no text: `rows` then holds added tokens only.
    """

    file: Path
    rows: Mapping[str, int]
    digest: str | None = None


def read_vocabulary(directory: Path) -> Vocabulary | None:
    """The vocabulary of the tokenizer in a model's directory; None where there is none.

    Read are tokenizer.json, else vocab.json, vocab.txt or a SentencePiece model, and the tokens that added_tokens.json
    and tokenizer_config.json add to them.

    Raises:
        CheckpointError: where a file can't be read, or is not what its name says.
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
            rows = _of_tokenizer(read_json(main))
        elif main.name == "vocab.json":
            rows = _of_mapping(read_json(main))
        elif main.name == "vocab.txt":
            lines = read_small(main).decode().removesuffix("\n").split("\n")
            rows = {line.removesuffix("\r"): row for row, line in enumerate(lines)}
        else:
            rows = {piece: row for row, piece in enumerate(_pieces(read_small(main)))}
        return Vocabulary(main, _added(directory, main) | rows, digest)
    except _BROKEN as error:
        raise CheckpointError(
            f"{directory}: its tokenizer's files are not what their names say ({type(error).__name__}: {error}): "
            "download them again"
        ) from error


def same_files(first: Path, second: Path) -> bool:
    """Whether two directories have their vocabulary in the same bytes, so that it need not be parsed to be compared."""
    ours, theirs = _main_file(first), _main_file(second)
    if ours is None or theirs is None or ours.name != theirs.name:
        return False
    if ours.stat().st_size != theirs.stat().st_size or file_digest(ours) != file_digest(theirs):
        return False
    try:
        return _added(first, ours) == _added(second, theirs)
    except _BROKEN:
        return False  # `read_vocabulary` says what is wrong


def difference(first: Vocabulary, second: Vocabulary, names: tuple[str, str]) -> str | None:
    """How two vocabularies differ, in words; None where every token has the same row in both.

    Args:
        first: one of them.
        second: the other.
        names: whose they are.
    """
    if first.digest != second.digest:
        if first.digest is None or second.digest is None:
            return (
                f"{names[0]} has {first.file.name} and {names[1]} has {second.file.name}, which can't be compared: "
                "let both have tokenizer.json"
            )
        return f"{first.file.name} differs between {names[0]} and {names[1]}"
    if first.rows == second.rows:
        return None
    moved = [token for token, row in first.rows.items() if second.rows.get(token) != row]
    new = [token for token in second.rows if token not in first.rows]
    token = min((*moved, *new), key=lambda text: first.rows.get(text, second.rows.get(text, 0)))
    places = " and ".join(
        f"row {found.rows[token]} in {name}" if token in found.rows else f"no row in {name}"
        for found, name in zip((first, second), names, strict=True)
    )
    others = len(moved) + len(new) - 1
    more = f", and {others:,} other{'s differ' if others > 1 else ' differs'} as well" if others else ""
    return f"token {token!r} has {places}{more}"


def _main_file(directory: Path) -> Path | None:
    """The file that holds most of a vocabulary."""
    names = [*_TEXTS, *sorted(file.name for file in directory.glob("*") if file.name.endswith(_OPAQUE))]
    return next((directory / name for name in names if (directory / name).is_file()), None)


def _of_tokenizer(content: Mapping[str, Any]) -> dict[str, int]:
    """The tokens of a tokenizer.json (the tokenizers library's format)."""
    vocabulary = content["model"]["vocab"]
    if isinstance(vocabulary, list):  # Unigram: pairs of token and score
        rows = {str(entry[0]): row for row, entry in enumerate(vocabulary)}
    else:
        rows = _of_mapping(vocabulary)
    return rows | {str(token["content"]): _row(token["id"]) for token in content.get("added_tokens") or ()}


def _of_mapping(content: Mapping[str, Any]) -> dict[str, int]:
    return {token: _row(row) for token, row in content.items()}


def _row(value: object) -> int:
    """A token's row, which may be text where it is a key. Raises ValueError: JSON has numbers that are no row."""
    if isinstance(value, (int, str)):
        return int(value)
    raise ValueError(f"a row of {value!r}")


def _added(directory: Path, main: Path) -> dict[str, int]:
    """The tokens that are beside the vocabulary's main file; a tokenizer.json has those of added_tokens.json itself."""
    rows = {} if main.name == "tokenizer.json" else _of_mapping(read_json(directory / "added_tokens.json") or {})
    config = read_json(directory / "tokenizer_config.json") or {}
    decoder = config.get("added_tokens_decoder") or {}
    return rows | {str(token["content"]): _row(row) for row, token in decoder.items()}


def _pieces(data: bytes) -> Iterator[str]:
    """The pieces of a SentencePiece model: field 1 of the message, of which each has its text in field 1."""
    for number, piece in _fields(data):
        if number == 1:
            yield next(value for field, value in _fields(piece) if field == 1).decode()


def _fields(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The fields of a protocol buffers message that hold bytes; others are passed over."""
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
                raise ValueError("a field ends past the end")
            yield key >> 3, data[place : place + length]
            place += length
        else:
            raise ValueError(f"wire type {kind}")


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
            raise ValueError("a number of more than 64 bits")
