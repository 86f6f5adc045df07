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


def recipe_of(option: str, weights: Sequence[float], *, within: str = "", **more: Any) -> dict[str, Any]:
    """A linear merge of the models with an option, in float32.

    Args:
        option: name of the option.
        weights: weights of `a` and `b`.
        within: directory of the models, with a slash.
        more: other entries of the recipe.
    """
    models = [
        {"model": within + name, "parameters": {"weight": weight}} for name, weight in zip("ab", weights, strict=True)
    ]
    return {
        "merge_method": "linear",
        "base_model": f"{within}a",
        "models": models,
        "tokenizer": _within(OPTIONS[option], within),
        "dtype": "float32",
        **more,
    }


def _within(node: Any, within: str) -> Any:
    """A block with the models in a directory."""
    if isinstance(node, dict):
        return {key: _within(value, within) if key != "token" else value for key, value in node.items()}
    return within + node if node in ("a", "b") else node
