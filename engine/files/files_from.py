"""Adapts the config.json of the model that `files_from` names to the merged tensors."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from ..graph.build import OutputStack
from .config import stated_layers

_WIDTHS = (
    *("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "n_embd", "n_head"),
    *("n_inner", "d_model", "d_ff", "d_kv", "num_heads", "num_experts", "num_local_experts", "n_routed_experts"),
)
"""Keys that determine tensor shapes. They must be equal in the config and in the merged models."""


def override_config(
    config: Mapping[str, Any], merged: Mapping[str, Any] | None, *, main: tuple[str, ...], head: bool
) -> tuple[dict[str, Any], list[str]]:
    """Adapt a model's config.json to tensors that are merged from other models.

    The vocabulary size is taken from the merged models, and so is the tied head if no head is written.

    Args:
        config: config.json of the named model.
        merged: config.json of the merged models' donor, or None.
        main: path of the section that describes the main stack.
        head: whether a head is written.

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
        if "vocab_size" in other and own.get("vocab_size") != other["vocab_size"]:
            remarks.append(f"vocab_size is {other['vocab_size']} as in the merged models, not {own.get('vocab_size')}")
            own["vocab_size"] = other["vocab_size"]
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


def _section(config: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        config = config.get(key) if isinstance(config, Mapping) else None
    return config if isinstance(config, Mapping) else None
