"""Adapts config.json to the other models that a recipe takes files from: by `files_from` or `tokenizer_source`."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from ...graph.build import OutputStack
from .rearrange import stated_layers

_WIDTHS = (
    *("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "n_embd", "n_head"),
    *("n_inner", "d_model", "d_ff", "d_kv", "num_heads", "num_experts", "num_local_experts", "n_routed_experts"),
)
"""Keys that determine tensor shapes. They must be equal in the config and in the merged models."""

_TOKEN_IDS = ("eos_token_id", "bos_token_id", "pad_token_id")
_TOKEN_SECTIONS: tuple[tuple[str, ...], ...] = ((), ("text_config",))


def override_config(
    config: Mapping[str, Any], merged: Mapping[str, Any] | None, *, main: tuple[str, ...], head: bool, rows: int | None
) -> tuple[dict[str, Any], list[str]]:
    """Adapt a model's config.json to tensors that are merged from other models.

    The vocabulary size is taken from the merged models, and so is the tied head if no head is written.

    Args:
        config: config.json of the named model.
        merged: config.json of the merged models' donor, or None.
        main: path of the section that describes the main stack.
        head: whether a head is written.
        rows: number of rows of the output's embeddings, if the recipe asks for others than `merged` states, or None.

    Returns:
        The adapted config and remarks for the user.

    Raises:
        ValueError: the tensors do not match the config; the message continues a sentence that starts with the model.
    """
    override = copy.deepcopy(dict(config))
    if merged is None:
        return override, []
    remarks = []
    if config.get("model_type") != merged.get("model_type"):
        remarks.append(
            f"its model_type is {config.get('model_type')}, but the merged models have {merged.get('model_type')}"
        )
    for path in ((), main) if main else ((),):
        own, other = _section(override, path), _section(merged, path)
        if own is None or other is None:
            raise ValueError(f"has no {'.'.join(main)} in its config.json, but the merged models have one")
        for key in _WIDTHS:
            if key in own and key in other and own[key] != other[key] and not isinstance(own[key], list):
                raise ValueError(f"has {key} {own[key]} in its config.json, but the merged models have {other[key]}")
        if "vocab_size" in other and own.get("vocab_size") != (size := rows or other["vocab_size"]):
            if rows is None:
                remarks.append(f"vocab_size is {size} as in the merged models, not {own.get('vocab_size')}")
            own["vocab_size"] = size
        if not head:
            own.pop("tie_word_embeddings", None)
            own |= {key: other[key] for key in ("tie_word_embeddings",) if key in other}
    return override, remarks


def override_stack(
    stack: OutputStack, config: Mapping[str, Any], levels: Iterable[tuple[int, tuple[int, ...]]]
) -> OutputStack:
    """Map the layers of an output stack to those of the model that `files_from` names.

    Args:
        stack: stack with the layer indices of the donor.
        config: config.json of the named model.
        levels: number of layers and index of each output layer in the donor, in the donor's donor, and so on. The first
            entry with the named model's number of layers is used.
    """
    section = _section(config, stack.donor.config_path) or {}
    count = stated_layers(section, stack.donor.config_key) or stack.donor.count
    layers = len(stack.sources)
    own = tuple(range(layers)) if count == layers else stack.sources
    sources = next((sources for number, sources in levels if number == count), own)
    return replace(stack, donor=replace(stack.donor, count=count), sources=sources)


def follow_tokenizer(config: Mapping[str, Any], other: Mapping[str, Any] | None) -> dict[str, Any]:
    """Take the ids of the end, beginning and padding tokens from the model that provides the tokenizer.

    Ids that this model does not state stay as they are.

    Args:
        config: config.json of the output.
        other: config.json of the tokenizer's model, or None.
    """
    followed = copy.deepcopy(dict(config))
    sections = [section for path in _TOKEN_SECTIONS if (section := _section(followed, path)) is not None]
    others = [section for path in _TOKEN_SECTIONS if (section := _section(other, path)) is not None]
    for key in _TOKEN_IDS:
        value = next((section[key] for section in others if section.get(key) is not None), None)
        if value is not None:
            for section in [each for each in sections if key in each] or sections[:1]:
                section[key] = value
    return followed


def _section(config: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        config = config.get(key) if isinstance(config, Mapping) else None
    return config if isinstance(config, Mapping) else None
