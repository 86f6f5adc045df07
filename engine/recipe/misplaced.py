"""Says where an unknown key belongs, since many are known elsewhere, and what to write for a missing one."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Mapping

from .nodes import Node

STAGE_KEYS = (
    *("merge_method", "base_model", "models", "slices", "modules", "parameters", "dtype", "out_dtype"),
    *("tokenizer_source", "tokenizer", "chat_template", "name", "save", "files_from", "non_layer", "allow_nonfinite"),
    "allow_vocabulary_mismatch",
)
"""The keys at the top level of a stage."""

MISSING = {
    "layer_range": ": write `layer_range: [first layer, layer after the last]`, or list complete models under `models` "
    "instead of `slices`",
    "model": ": write `model:` and a directory or a Hub id (in quotes, if its name is null)",
    "sources": ": list the models of the slice below it: `sources: [{model: ..., layer_range: [0, 8]}]`",
}
"""What to write for a missing entry."""

_TOKENIZER_KEYS = {
    "pad_to_multiple_of": "`tokenizer: {source: base, pad_to_multiple_of: ...}`",
    "tokens": "`tokenizer: {source: base, tokens: ...}`",
}
_WINDOWS = frozenset(("layers", "layer_range"))
_CONTENTS = frozenset(("model", "models", "slices"))
_ADAPTER = re.compile(r"(lora|adapter|peft)(?![a-z])|loras$|adapters$")
_TOP = "write it at the top level of the recipe"
_HINTS = {"pattern": "did you mean `filter`?", "out_path": "give the stage a `name` that other stages can refer to"}


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that `name` is most likely a misspelling of, or None."""
    lowercase = {other.lower(): other for other in known}
    matches = difflib.get_close_matches(name.lower().replace("-", "_"), list(lowercase), n=1, cutoff=0.65)
    return lowercase[matches[0]] if matches else None


def names_adapter(key: str, node: Node) -> bool:
    """Whether an unknown key asks for a LoRA adapter."""
    return _ADAPTER.match(key.lower()) is not None and node.value not in (None, "", False, (), {})


def key_advice(key: str, keys: Mapping[str, Node], known: Collection[str]) -> str | None:
    """Where to write a key that is unknown in its mapping but known elsewhere; None if it isn't.

    Args:
        key: the unknown key.
        keys: the entries of the mapping.
        known: the known keys of the mapping, which identify its kind.
    """
    if key in _HINTS:
        return _HINTS[key]
    if "model" in known and key == "revision" and isinstance(keys[key].value, (str, int, float)):
        model = keys["model"].value if "model" in keys else None
        return f"write `model: {model if isinstance(model, str) else 'owner/name'}@{keys[key].value}`"
    if key in _WINDOWS:
        if "layer_range" in known:
            return "write `layer_range: [first layer, layer after the last]`"
        if "model" in known:
            return "`models` lists complete models: use `slices` for ranges of layers"
        return "write `layer_range` next to each `model` in the `sources` of a slice"
    if key == "merge_method" and "merge_method" not in known:
        return "only a stage has a method: write a separate stage with a `name`, and use that name as a `model`"
    if "sources" in known and key in _CONTENTS:
        return "list the models of a slice under `sources`"
    if key == "sources":
        return "write it in a list under `slices`: `- sources: [...]`"
    if "filter" in known and key == "model":
        return "a condition holds for all models: write the value in the `parameters` of this model"
    if key in _TOKENIZER_KEYS:
        return f"write it under `tokenizer`: {_TOKENIZER_KEYS[key]}"
    if key in STAGE_KEYS and "merge_method" not in known:
        return _TOP
    return None


def parameter_advice(name: str) -> str | None:
    """Where to write a key that stands under `parameters` but isn't a parameter; None for any other name."""
    if name in ("filter", "value"):
        return "write it below the name of a parameter: `weight: [{filter: mlp, value: 0.5}, {value: 1}]`"
    if name in _WINDOWS:
        return "write `layer_range` next to each `model` in the `sources` of a slice"
    if name in ("model", "revision"):
        return "`parameters` holds values: write `model` in a list under `models`"
    return _TOP if name in STAGE_KEYS else None
