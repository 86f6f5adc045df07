"""Says where an unknown key belongs, since many are known elsewhere, and what to write for a missing one."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Mapping

from .entries.block_format import BLOCKS
from .nodes import Keys, Node

STAGE_KEYS = (
    *("merge_method", "base_model", "models", "slices", "modules", "parameters", "dtype", "out_dtype"),
    *("tokenizer_source", "tokenizer", "chat_template", "name", "save", "files_from", "non_layer", "allow_nonfinite"),
    *("allow_vocabulary_mismatch", "tensors_from"),
)
"""The keys at the top level of a stage."""

CONTENTS = ("models", "slices", "modules")
"""The keys of a stage that list what is merged; a stage has one of them."""

MISSING = {
    "merge_method": ": write, for example, `merge_method: linear`; `mergeloom methods` lists all methods",
    "layer_range": ": write `layer_range: [first layer, layer after the last]`, or list complete models under `models` "
    "instead of `slices`",
    "model": ": write a directory or a Hub id after `model:`",
    "value": ": write `{filter: mlp, value: 0.5}`, for example, or only a number",
    "sources": ": list the models of the slice below it: `sources: [{model: ..., layer_range: [0, 8]}]`",
}
"""What to write for a missing entry."""

_TOKENIZER_KEYS = {
    "pad_to_multiple_of": "`tokenizer: {source: ..., pad_to_multiple_of: ...}`",
    "tokens": "`tokenizer: {source: ..., tokens: ...}`",
}
_WINDOWS = frozenset(("layers", "layer_range"))
_CONTENTS = frozenset(("model", "models", "slices"))
_ADAPTER = re.compile(r"(lora|adapter|peft)(?![a-z])|loras$|adapters$")
_TOP = "write it at the top level of the recipe"
_HINTS = {"pattern": "did you mean `filter`?", "out_path": "give the stage a `name` that other stages can refer to"}
_QUANTIZED = re.compile(r"i?q\d\w*|u?int\d+|w\da\d+|nf4|(mx)?fp[48]|(float|f)8\w*|gguf|gptq|awq|exl\d|bnb.*")
_FP8 = re.compile(r"fp8\w*|(float|f)8_?e4m3\w*")
_DTYPE_NICKNAMES = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32"}
_OTHER_FILES = {
    "weight_map": "the index of a model's shards",
    "model_type": "a model's config.json",
    "architectures": "a model's config.json",
    "tokenizer_class": "a model's tokenizer_config.json",
}


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that `name` is most likely a misspelling of, or None."""
    lowercase = {other.lower(): other for other in known}
    matches = difflib.get_close_matches(name.lower().replace("-", "_"), list(lowercase), n=1, cutoff=0.65)
    return lowercase[matches[0]] if matches else None


def names_adapter(key: str, node: Node) -> bool:
    """Whether an unknown key asks for a LoRA adapter."""
    return _ADAPTER.match(key.lower()) is not None and node.value not in (None, "", False, (), {})


def other_file(keys: Collection[str]) -> str | None:
    """The error for a file that isn't a recipe, by its top-level keys; None if it may be one."""
    if any(nearest(key, ("merge_method", *CONTENTS)) for key in keys):
        return None
    what = next((f"this is {name}, not a recipe" for key, name in _OTHER_FILES.items() if key in keys), None)
    return what or (None if not keys or any(key in STAGE_KEYS for key in keys) else "this is not a recipe")


def dtype_advice(name: str, known: Collection[str]) -> str:
    """What to write instead of an unknown dtype."""
    if (close := _DTYPE_NICKNAMES.get(name.lower()) or nearest(name, known)) is not None:
        return f"did you mean `{close}`?"
    listed = f"use one of {', '.join(known)}"
    if _FP8.fullmatch(name.lower()):
        return f"{listed}; for FP8, set `out_dtype: {BLOCKS}`"
    quantized = _QUANTIZED.fullmatch(name.lower())
    return f"{listed}; for other quantized models, quantize the merged one with another tool" if quantized else listed


def list_advice(value: object, what: str) -> str:
    """What to write instead of a text or a mapping where a list is expected."""
    if what.startswith("models") and isinstance(value, (str, Mapping)):
        first = re.split(r"[,;\s]+", value.strip())[0] if isinstance(value, str) else ""
        return f"; write one line for each model, such as `- model: {first or '...'}`"
    return ""


def key_advice(key: str, keys: Mapping[str, Node], known: Collection[str], path: Keys) -> str | None:
    """Where to write a key that is unknown in its mapping but known elsewhere; None if it isn't.

    Args:
        key: the unknown key.
        keys: the entries of the mapping.
        known: the known keys of the mapping, which identify its kind.
        path: keys that lead to the mapping, empty for the only stage of a recipe.
    """
    if key == "out_path" and not path:
        return "OUT on the command line is the directory of the merged model"
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
    if key == "rename":
        return "write it next to the name of a model: `- model: ...` and below it `rename: [[prefix, replacement]]`"
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
