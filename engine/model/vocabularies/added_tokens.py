"""The tokens that were added to a tokenizer after its training, with the flags that say how it finds them in a text."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ....io.small_files import read_json, read_small

_LIST = re.compile(r'(?<!\\)"added_tokens"\s*:\s*(?=\[)')


@dataclass(frozen=True, slots=True)
class AddedToken:
    """A token that a tokenizer finds in a text before it splits the rest.

    Args:
        text: text of the token.
        row: row of the token.
        single_word: whether it is only found as a word of its own.
        lstrip: whether it includes the spaces before it.
        rstrip: whether it includes the spaces after it.
        normalized: whether it is found in the normalized text, instead of the text as it is.
        special: whether it is left out when a text is decoded without special tokens.
    """

    text: str
    row: int
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = True
    special: bool = False

    @classmethod
    def of(cls, content: Mapping[str, Any], row: int) -> AddedToken:
        """The token of an entry of ``added_tokens`` or ``added_tokens_decoder``."""
        special = bool(content.get("special", False))
        flags = {key: bool(content.get(key, False)) for key in ("single_word", "lstrip", "rstrip")}
        return cls(
            str(content["content"]), row, **flags, normalized=content.get("normalized", not special), special=special
        )

    @property
    def flags(self) -> dict[str, bool]:
        """The flags by their keys, in the order of the tokenizers library."""
        keys = ("single_word", "lstrip", "rstrip", "normalized", "special")
        return {key: getattr(self, key) for key in keys}


def read_added_tokens(directory: Path, main: str) -> dict[str, AddedToken]:
    """Read the added tokens of a model, by text: those of tokenizer.json, tokenizer_config.json and added_tokens.json.

    Args:
        directory: directory of the model.
        main: name of the file with most of the vocabulary.
    """
    found = {}
    if main == "tokenizer.json":
        found = {str(each["content"]): AddedToken.of(each, int(each["id"])) for each in _listed(directory / main)}
    config = read_json(directory / "tokenizer_config.json")
    decoder = config.get("added_tokens_decoder") if isinstance(config, dict) else None
    for row, each in (decoder or {}).items():
        found.setdefault(str(each["content"]), AddedToken.of(each, int(row)))
    for text, row in (read_json(directory / "added_tokens.json") or {}).items() if main != "tokenizer.json" else ():
        found.setdefault(str(text), AddedToken(str(text), int(row)))
    return found


def _listed(file: Path) -> Iterator[Mapping[str, Any]]:
    """Yield the entries of ``added_tokens`` in a tokenizer.json, without parsing the rest of its megabytes."""
    text = read_small(file).decode()
    if (start := _LIST.search(text)) is not None:
        yield from json.JSONDecoder().raw_decode(text, start.end())[0]


def with_added_tokens(text: str, tokens: list[AddedToken]) -> str:
    """Return a tokenizer.json with tokens appended to ``added_tokens``; all else keeps its bytes.

    Raises:
        ValueError: the file has no list of this name.
    """
    start = _LIST.search(text)
    if start is None:
        raise ValueError("tokenizer.json has no list `added_tokens`")
    listed, end = json.JSONDecoder().raw_decode(text, start.end())
    listed += [{"id": token.row, "content": token.text, **token.flags} for token in tokens]
    written = json.dumps(listed, ensure_ascii=False, indent=2).replace("\n", "\n  ")
    return f"{text[: start.end()]}{written}{text[end:]}"
