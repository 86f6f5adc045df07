"""The options of a recipe's ``tokenizer`` block, on models `a` and `b` of a pair."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_TOKENS: dict[str, Any] = {
    "<s>": {"source": "b", "force": True},
    "</s>": {"source": {"kind": "zero"}, "force": True},
    "<y>": {"source": {"kind": "model_token", "model": "a", "token": "</s>"}},
    "<|im_start|>": {"source": {"kind": "model_token", "model": "b", "token_id": 5}, "force": True},
    "<new>": {"source": {"kind": "model_token", "model": "a", "token": "<s>"}},
    "<none>": {"source": {"kind": "zero"}},
}

OPTIONS: dict[str, dict[str, Any]] = {
    "union": {"source": "union"},
    "source base": {"source": "base"},
    "source b": {"source": "b"},
    "union, padded": {"source": "union", "pad_to_multiple_of": 64},
    "base, padded": {"source": "base", "pad_to_multiple_of": 48},
    "union, with tokens": {"source": "union", "tokens": _TOKENS},
    "base, with tokens": {"source": "base", "tokens": _TOKENS, "pad_to_multiple_of": 8},
}
"""The block by a name of its own."""


def recipe_of(option: str, weights: Sequence[float], **more: Any) -> dict[str, Any]:
    """A linear merge of the models with an option, in float32."""
    models = [{"model": name, "parameters": {"weight": weight}} for name, weight in zip("ab", weights, strict=True)]
    return {
        "merge_method": "linear",
        "base_model": "a",
        "models": models,
        "tokenizer": OPTIONS[option],
        "dtype": "float32",
        **more,
    }
