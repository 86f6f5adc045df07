"""Reads a model's vocabulary, which maps tokens to rows of the embeddings, from its tokenizer files."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ....errors import CheckpointError
from ....io.output.digests import file_digest
from ....io.small_files import read_json, read_small

_TEXTS = (
    *("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model", "spm.model"),
    *("sentencepiece.model", "sentencepiece.bpe.model"),
)
_OPAQUE = (".tiktoken", "tiktoken.model", "tekken.json")
"""Files whose tokens are bytes instead of text."""
_TIKTOKEN = re.compile(rb"[A-Za-z0-9+/]+=* \d+\r?\n")
"""A line of a tiktoken file, which Llama 3 calls tokenizer.model."""
_ADDED = re.compile(r'(?<!\\)"added_tokens"\s*:\s*\[')
_NUMBERS = re.compile(rb'":\s*(\d{1,9})\b')
_PAIRS = re.compile(rb'"vocab"\s*:\s*\[')
_PAIR = re.compile(rb'\[\s*"')
_NAMED = 8
"""Maximum number of further tokens that a difference names."""
_EXTRA_IDS = 100
"""Number of tokens that T5's tokenizer adds if its settings don't say."""
_BROKEN = (ValueError, TypeError, KeyError, AttributeError, IndexError, StopIteration)


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The tokens of a tokenizer.

    Args:
        file: file that contains most of the tokens.
        rows: row of each token that is text.
        digest: digest of `file` if its tokens are bytes; `rows` then contains only added tokens.
        byte_rows: row of each token of `file` if its tokens are bytes, by their Python notation; empty if unknown.
    """

    file: Path
    rows: Mapping[str, int]
    digest: str | None = None
    byte_rows: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Difference:
    """A difference between two vocabularies.

    Args:
        text: description, which names the models and the first tokens.
        tokens: the tokens whose rows differ, ordered by row.
        rows: number of rows that differ; 0 if the vocabularies cannot be compared.
        compared: number of rows that were compared.
    """

    text: str
    tokens: tuple[str, ...] = ()
    rows: int = 0
    compared: int = 0

    @property
    def unrelated(self) -> bool:
        """Whether so many rows differ that the two tokenizers number their tokens independently.

        Fine-tunes rename or add at most a few hundred of 100,000 tokens, and tokenizers that were trained independently
        differ in nearly all rows, even if most tokens are the same. A tenth lies between the two.
        """
        return self.rows > max(8, self.compared // 10) or 2 * self.rows > self.compared > 0


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
    with _explaining(directory):
        rows: dict[str, int] = {}
        if main.name == "tokenizer.json":
            rows = _tokenizer_json_rows(read_json(main))
        elif main.name == "vocab.json":
            rows = _mapping_rows(read_json(main))
        elif main.name == "vocab.txt":
            lines = read_small(main).decode().removesuffix("\n").split("\n")
            rows = {line.removesuffix("\r"): row for row, line in enumerate(lines)}
        elif main.name.endswith(_OPAQUE) or _TIKTOKEN.match(read_small(main)):
            return Vocabulary(main, _added(directory, main.name), file_digest(main), _byte_rows(main))
        else:
            pieces = list(_pieces(read_small(main)))
            if not pieces:
                raise ValueError(f"{main.name} has no tokens")
            rows = {piece: row for row, piece in enumerate(pieces)}
            return Vocabulary(
                main, _implied_rows(directory, main.name, len(pieces)) | _added(directory, main.name) | rows
            )
        return Vocabulary(main, _added(directory, main.name) | rows)


def added_tokens(directory: Path) -> dict[str, int]:
    """The rows of the tokens that were added to a tokenizer, special ones included, without parsing its other tokens.

    Raises:
        CheckpointError: a file cannot be read or has an invalid format.
    """
    main = _main_file(directory)
    with _explaining(directory):
        rows = _added(directory, "" if main is None else main.name)
        if main is not None and main.name == "tokenizer.json":
            data = read_small(main).decode()
            start = _ADDED.search(data)
            if start is not None:
                tokens, _ = json.JSONDecoder().raw_decode(data, start.end() - 1)
                rows |= {str(token["content"]): _row(token["id"]) for token in tokens}
        return rows


def last_row(directory: Path) -> int:
    """An upper bound of the rows of a tokenizer's tokens, without parsing its files; -1 if there are none.

    Raises:
        CheckpointError: a file cannot be read or has an invalid format.
    """
    main = _main_file(directory)
    if main is None:
        return -1
    with _explaining(directory):
        bounds = [-1, *_added(directory, main.name).values()]
        if main.suffix == ".json":
            data = read_small(main)
            bounds += map(int, _NUMBERS.findall(data))
            if (pairs := _PAIRS.search(data)) is not None:
                bounds.append(len(_PAIR.findall(data, pairs.end())) - 1)
        elif main.name == "vocab.txt":
            bounds.append(read_small(main).removesuffix(b"\n").count(b"\n"))
        elif not main.name.endswith(_OPAQUE) and not _TIKTOKEN.match(data := read_small(main)):
            count = sum(number == 1 for number, _ in _fields(data))
            bounds += (count - 1, *_implied_rows(directory, main.name, count).values())
        return max(bounds)


def equal_added_tokens(first: Path, second: Path, main: str) -> bool:
    """Whether the tokens outside the main file, which has the name `main`, are the same in two directories."""
    try:
        return _added(first, main) == _added(second, main)
    except _BROKEN:
        return False  # `read_vocabulary` reports the error


def difference(
    first: Vocabulary, second: Vocabulary, names: tuple[str, str], rows: int | None = None
) -> Difference | None:
    """Compare two vocabularies; None if every token has the same row in both.

    Args:
        first: first vocabulary.
        second: second vocabulary.
        names: names of the two models.
        rows: number of rows of the embeddings; tokens beyond them have no row and are not compared.
    """
    numbering = {_numbering(first), _numbering(second)}
    if len(numbering) > 1:
        return Difference(
            f"{names[0]} has {first.file.name} and {names[1]} has {second.file.name}, which cannot be compared: "
            "add tokenizer.json to both"
        )
    if first.digest != second.digest and not (first.byte_rows and second.byte_rows):
        return Difference(f"{first.file.name} differs between {names[0]} and {names[1]}")
    ours, theirs = (
        {token: row for token, row in (*each.rows.items(), *each.byte_rows.items()) if rows is None or row < rows}
        for each in (first, second)
    )
    if ours == theirs:
        return None
    moved = [token for token, row in ours.items() if theirs.get(token) != row]
    new = [token for token in theirs if token not in ours]
    tokens = sorted((*moved, *new), key=lambda text: ours.get(text, theirs.get(text, 0)))
    return Difference(
        _described(ours, theirs, tokens, names),
        tuple(tokens),
        len({each[text] for text in tokens for each in (ours, theirs) if text in each}),
        len({*ours.values(), *theirs.values()}),
    )


def _described(
    ours: Mapping[str, int], theirs: Mapping[str, int], tokens: Iterable[str], names: tuple[str, str]
) -> str:
    """Name the tokens that differ. A row whose token has another name in the other vocabulary is one difference."""
    places = {row: token for token, row in theirs.items() if token not in ours}
    renamed = {token: places[row] for token in tokens if token not in theirs and (row := ours.get(token, -1)) in places}
    hidden = set(renamed.values())
    token, *others = (token for token in tokens if token not in hidden)
    if token in renamed:
        text = f"row {ours[token]} is {token!r} in {names[0]} and {renamed[token]!r} in {names[1]}"
    else:
        where = " and ".join(
            f"row {rows[token]} in {name}" if token in rows else f"no row in {name}"
            for rows, name in zip((ours, theirs), names, strict=True)
        )
        text = f"token {token!r} has {where}"
    if others:
        listed = [f"{each!r} / {renamed[each]!r}" if each in renamed else repr(each) for each in others[:_NAMED]]
        listed += ["..."] * (len(others) > _NAMED)
        text += f", and {len(others):,} other{'s differ' if len(others) > 1 else ' differs'} as well"
        text += f" ({', '.join(listed)})"
    return text


def _numbering(vocabulary: Vocabulary) -> str:
    """The way in which a file determines rows. Vocabularies can be compared only if it is the same."""
    name = vocabulary.file.name
    if vocabulary.digest is not None:
        return "tekken" if name == "tekken.json" else "tiktoken"
    # XLM-R, mBART, CamemBERT and NLLB store their pieces in another order than their rows
    return name if name == "sentencepiece.bpe.model" else "rows"


@contextmanager
def _explaining(directory: Path) -> Iterator[None]:
    """Turn the errors of an invalid tokenizer file into a CheckpointError."""
    try:
        yield
    except _BROKEN as error:
        raise CheckpointError(
            f"{directory}: invalid tokenizer files ({type(error).__name__}: {error}): download them again"
        ) from error


def main_file_name(names: Collection[str]) -> str | None:
    """The name of the file that contains most of the vocabulary, among the files of a directory; None if missing."""
    opaque = sorted(name for name in names if name.endswith(_OPAQUE))
    return next((name for name in (*_TEXTS, *opaque) if name in names), None)


def _main_file(directory: Path) -> Path | None:
    """The file that contains most of the vocabulary."""
    name = main_file_name({file.name for file in directory.glob("*") if file.is_file()})
    return None if name is None else directory / name


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


def _added(directory: Path, main: str) -> dict[str, int]:
    """The rows of tokens outside the main file. A tokenizer.json includes those of added_tokens.json."""
    rows = {} if main == "tokenizer.json" else _mapping_rows(read_json(directory / "added_tokens.json") or {})
    config = read_json(directory / "tokenizer_config.json") or {}
    decoder = config.get("added_tokens_decoder") or {}
    return rows | {str(token["content"]): _row(row) for row, token in decoder.items()}


def _implied_rows(directory: Path, main: str, pieces: int) -> dict[str, int]:
    """The rows of the tokens that the tokenizer's class appends to those of a SentencePiece model, without a file."""
    if main == "spm.model":  # DeBERTa
        return {"[MASK]": pieces}
    if main != "spiece.model":
        return {}
    config = read_json(directory / "tokenizer_config.json") or {}
    count = config.get("extra_ids")
    if count is None and str(config.get("tokenizer_class")).startswith("T5Tokenizer"):
        count = _EXTRA_IDS
    elif count is None:
        listed = (read_json(directory / "special_tokens_map.json") or {}).get("additional_special_tokens") or ()
        count = sum(str(token).startswith("<extra_id_") for token in listed)
    if not isinstance(count, int) or not 0 <= count < 10_000:
        raise ValueError(f"invalid extra_ids {count!r}")
    return {f"<extra_id_{number}>": pieces + count - 1 - number for number in range(count)}


def _byte_rows(main: Path) -> dict[str, int]:
    """The rows of a file whose tokens are bytes, which they are numbered by; empty for an unknown format."""
    try:
        if main.name != "tekken.json":
            lines = (line.split() for line in read_small(main).splitlines() if line.strip())
            return {_notation(token): int(rank) for token, rank in lines}
        content = read_json(main)
        special = int(content["config"]["default_num_special_tokens"])
        size = int(content["config"]["default_vocab_size"])
        rows = {_notation(token["token_bytes"]): special + int(token["rank"]) for token in content["vocab"]}
        rows = {token: row for token, row in rows.items() if row < size}
        return rows | {str(token["token_str"]): int(token["rank"]) for token in content.get("special_tokens") or ()}
    except _BROKEN:
        return {}  # the file is then compared by its digest


def _notation(token: str | bytes) -> str:
    """The Python notation of a token in base64."""
    return repr(base64.b64decode(token, validate=True))[2:-1]


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
