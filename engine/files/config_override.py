"""A config.json from another model than the merged ones: what of it must follow the merged tensors all the same."""

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
"""Keys that shapes follow from: where they differ, the tensors don't fit the config."""


def override_config(
    config: Mapping[str, Any], merged: Mapping[str, Any] | None, *, main: tuple[str, ...], head: bool
) -> tuple[dict[str, Any], list[str]]:
    """A named model's config.json, for tensors that come from others.

    The size of the vocabulary follows the tensors, and whether the head is tied where none is written.

    Args:
        config: the named model's.
        merged: the config.json of the model that the tensors are named after; None where it has none.
        main: the keys that lead to the part of a config that is about the main stack.
        head: whether a head is written.

    Returns:
        The config, and what the user should know about it.

    Raises:
        ValueError: where the tensors can't fit it; the text goes on after the model's name.
    """
    adopted = copy.deepcopy(dict(config))
    if merged is None:
        return adopted, []
    remarks = []
    if config.get("model_type") != merged.get("model_type"):
        remarks.append(
            f"its model_type is {config.get('model_type')}, and that of the merge {merged.get('model_type')}"
        )
    for path in ((), main) if main else ((),):
        own, other = _section(adopted, path), _section(merged, path)
        if own is None or other is None:
            raise ValueError(f"has no {'.'.join(main)} in its config.json, where the merged models have one")
        for key in _WIDTHS:
            if key in own and key in other and own[key] != other[key] and not isinstance(own[key], list):
                raise ValueError(f"has {key} {own[key]} in its config.json, and the merged models have {other[key]}")
        if "vocab_size" in other and own.get("vocab_size") != other["vocab_size"]:
            remarks.append(f"vocab_size follows the merged models: {other['vocab_size']}, not {own.get('vocab_size')}")
            own["vocab_size"] = other["vocab_size"]
        if not head:
            own.pop("tie_word_embeddings", None)
            own |= {key: other[key] for key in ("tie_word_embeddings",) if key in other}
    return adopted, remarks


def override_stack(
    stack: OutputStack, config: Mapping[str, Any], levels: Iterable[tuple[int, tuple[int, ...]]]
) -> OutputStack:
    """A stack of the output as a named model's config.json counts its layers.

    Args:
        stack: as the merged models have it.
        config: the named model's.
        levels: what the output's layers were in the donor, in the donor's donor and so on: how many layers it has, and
            which of them each is. The first with as many as the named model has holds.
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
