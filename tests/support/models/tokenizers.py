"""Writes tokenizers with the tokenizers library, as transformers saves them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tokenizers


def write_vocabulary(directory: Path, tokens: Iterable[str], added: Iterable[str] = (), **special: str) -> Path:
    """Write tokenizer.json and tokenizer_config.json.

    Args:
        directory: the model's directory.
        tokens: the tokens of rows 0, 1, 2 and so on.
        added: special tokens that are added in the next rows.
        special: entries of tokenizer_config.json, such as ``eos_token``.
    """
    rows = {token: row for row, token in enumerate(tokens)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(rows, unk_token=next(iter(rows))))
    tokenizer.add_special_tokens(list(added))
    tokenizer.save(str(directory / "tokenizer.json"))
    update_json(directory / "tokenizer_config.json", **special)
    return directory


def update_json(file: Path, **entries: Any) -> None:
    """Set entries of a JSON file, which is created if it is missing; None removes an entry."""
    content = json.loads(file.read_text()) if file.exists() else {}
    content = {key: value for key, value in {**content, **entries}.items() if value is not None}
    file.write_text(json.dumps(content))
