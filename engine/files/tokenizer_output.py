"""The tokenizer files that a merge changes: with further tokens, with another chat template, or with both."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...io.small_files import read_json, read_small
from ..model.vocabularies.added_tokens import AddedToken, with_added_tokens
from .chat_templates import CONFIG, FILE

_MAIN = "tokenizer.json"
_ADDED = "added_tokens.json"


def changed_tokenizer_files(directory: Path, new: Sequence[AddedToken], template: str | None) -> dict[str, bytes]:
    """Return the changed tokenizer files by name; the others are copied.

    The tokens are appended to tokenizer.json, whose other bytes stay as they are, and to the lists that other files
    have of them. Without tokenizer.json, tokenizer_config.json lists them, for the tokenizer's class to add.

    Args:
        directory: directory of the tokenizer's model.
        new: tokens to add.
        template: chat template that replaces the tokenizer's, or None. It is written to chat_template.jinja and to
            tokenizer_config.json, because versions of transformers read one or the other.
    """
    files: dict[str, bytes] = {}
    config: Any = read_json(directory / CONFIG)
    changed: dict[str, Any] | None = None
    if new:
        has_main = (directory / _MAIN).is_file()
        if has_main:
            text = read_small(directory / _MAIN).decode()
            files[_MAIN] = with_added_tokens(text, list(new)).encode()
        if (directory / _ADDED).is_file():
            rows = {**read_json(directory / _ADDED), **{token.text: token.row for token in new}}
            files[_ADDED] = _json(rows)
        known = config if isinstance(config, dict) else {}
        if not has_main or "added_tokens_decoder" in known:
            decoder = {**(known.get("added_tokens_decoder") or {}), **{str(each.row): _entry(each) for each in new}}
            changed = {**known, "added_tokens_decoder": decoder}
    if template is not None:
        files[FILE] = template.encode()
        if changed is not None or isinstance(config, dict):
            changed = {**(changed or config), "chat_template": template}
    if changed is not None:
        files[CONFIG] = _json(changed)
    return files


def _entry(token: AddedToken) -> dict[str, Any]:
    """The entry of a token in ``added_tokens_decoder``."""
    return {"content": token.text, **dict(sorted(token.flags.items()))}


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode(errors="surrogatepass")
