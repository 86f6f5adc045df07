"""Tokenizers of 128,256 tokens, as Llama 3.1's, that differ in many tokens and in the order of the rest."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

SIZE = 128_256
SPECIAL = 256


def base_tokens() -> list[str]:
    """The tokens of the first vocabulary, in the order of their rows, without the special ones."""
    return [f"t{number:x}" for number in range(SIZE - SPECIAL)]


def other_tokens(seed: int = 1, share: float = 0.6) -> list[str]:
    """A vocabulary with a share of the first one's tokens, all of them in random rows."""
    generator = random.Random(seed)
    common = base_tokens()[: int(share * (SIZE - SPECIAL))]
    tokens = common + [f"u{number:x}" for number in range(SIZE - SPECIAL - len(common))]
    generator.shuffle(tokens)
    return tokens


def write_tokenizer_json(directory: Path, tokens: Sequence[str], special: str = "<|reserved_{}|>") -> None:
    """Write a tokenizer.json with these tokens, and special ones after them."""
    added = [
        {"id": len(tokens) + number, "content": special.format(number), "single_word": False, "lstrip": False}
        | {"rstrip": False, "normalized": False, "special": True}
        for number in range(SPECIAL)
    ]
    model = {"type": "BPE", "vocab": {text: row for row, text in enumerate(tokens)}, "merges": []}
    content = {"version": "1.0", "added_tokens": added, "normalizer": None, "pre_tokenizer": None, "model": model}
    (directory / "tokenizer.json").write_text(json.dumps(content))
