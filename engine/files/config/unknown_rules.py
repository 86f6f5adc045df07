"""Finds keys of config.json that are unknown, and look like rules for layers: periods, patterns, lists of layers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ...model.layer_keys import (
    FAMILIES,
    LAYER_INDICES,
    LAYER_INDICES_FROM_1,
    LEADING,
    NOT_PER_LAYER,
    PER_LAYER,
    PERIODS,
)
from ...model.layers import COUNT_KEYS

_PERIOD = re.compile(
    r"(?:^|_)(?:every|period|periodicity|interval|freq|frequency|steps?|cycle|pattern|share_factor|sharing"
    r"|per_(?:layer_)?(?:group|block|stage)|layers_per_\w+|alternat\w*|interleav\w*|repeat\w*|mod|modulo)(?:_|$)"
)
_LEADING = re.compile(
    r"(?:^|_)(?:first|last|leading|trailing|dense|skip|start|end)_(?:\w+_)?(?:layers?|blocks?)(?:_|$)"
)
_PATTERN = re.compile(r"pattern|types?$|kinds?$|layout|schedule|order$|cycle|(?:^|_)mask$")
_TWO_LETTERS = re.compile(r"pattern|layout|schedule")
"""Names of patterns that can be written in lowercase, such as ``lgl``."""
_INDICES = re.compile(r"layer|block|idxs?$|indexes$|indices$")
_GROUPS = re.compile(r"layer|block|group|shar|reuse")
"""Names of lists of lists of layers."""
_NUMBERS = re.compile(r"\d{1,6}(?:, ?\d{1,6})+")
_OTHER = re.compile(
    r"time_step|^num_(?:train|inference)|train|warmup|logging|save_|eval_|vision|image|patch|conv|fps|temporal|audio|hop"
    r"|nextn|mtp|model_type|position_embedding|dtype|attn_type$|attention_type$|^ffn_type$|hidden|act_fn"
    r"|^out_|token_interval|feature_layer|spatial|sampling|backbone_config|no_repeat|quantization|compression|^_"
)
"""Names that have one of these words for another reason."""

_KNOWN = frozenset(
    {
        *(*PER_LAYER, *LAYER_INDICES, *LAYER_INDICES_FROM_1, *LEADING, *COUNT_KEYS),
        *(family.list_key for family in FAMILIES.values()),
        *("attention_types", "block_types", "kv_source_layers", "moe_layer_end_index", "num_kv_shared_layers"),
        *("per_layer_config", "linear_attn_config", "hidden_size_per_layer_input"),
        "rescale_every",  # RWKV scales weights by powers of two against overflow, and the values back
    }
)


def unknown_rules(section: Mapping[str, Any], before: int, source: Sequence[int]) -> Iterator[tuple[str, Any]]:
    """Find unknown keys whose value does not describe the moved layers as it describes the donor's.

    Args:
        section: section of the donor's config.json that describes the layers.
        before: number of layers in the donor.
        source: layer of the donor that each layer of the output is.

    Yields:
        Name and value.
    """
    for name, value in section.items():
        is_known = name in _KNOWN or (name in PERIODS and isinstance(value, int))
        if is_known or _OTHER.search(name) or (NOT_PER_LAYER.search(name) and not _INDICES.search(name)):
            continue
        if isinstance(value, Mapping) and name.endswith("_config"):
            if not any(key in value for key in COUNT_KEYS):  # otherwise it describes other layers
                yield from ((f"{name}.{key}", found) for key, found in unknown_rules(value, before, source))
        elif not isinstance(value, bool) and _fails(name, value, before, source):
            yield name, value


def _fails(name: str, value: Any, before: int, source: Sequence[int]) -> bool:
    """Whether a value looks like a rule that the moved layers do not follow."""
    if isinstance(value, int):
        if _PERIOD.search(name):
            return 1 < value <= before and not _keeps(value, source)
        return bool(_LEADING.search(name)) and 0 < value < before and not _keeps_first(value, source)
    if isinstance(value, str) and not _NUMBERS.fullmatch(value):
        is_pattern = _is_pattern(name, value)
        if is_pattern or (len(value) == before > 3 and re.fullmatch(r"[A-Z*\-]+|[01]+", value) is not None):
            return len(value) >= before or not _keeps(len(value), source)
        return False
    is_period = isinstance(value, list) and bool(_PATTERN.search(name)) and 1 < len(value) < before
    if is_period and all(isinstance(entry, (str, int)) for entry in value) and 1 < len(set(value)) < max(len(value), 3):
        return not _keeps(len(value), source)
    if isinstance(value, list) and len(value) == before:  # it is handled as one entry per layer
        return False
    layers = _layers(name, value)
    if not all(isinstance(entry, int) and not isinstance(entry, bool) and 0 <= entry <= before for entry in layers):
        return False
    return len(set(layers)) == len(layers) > 0 and _moves(layers, before, source)


def _is_pattern(name: str, text: str) -> bool:
    """Whether a text is a pattern with one character per layer, such as ``MMA``, ``0001`` or ``lgl``."""
    if _TWO_LETTERS.search(name) and re.fullmatch(r"[a-z]+", text) and text not in ("all", "off"):
        return len(set(text)) == 2
    return bool(_PATTERN.search(name)) and re.fullmatch(r"[A-Z*|\-]{2,}|[01]{2,}", text) is not None


def _layers(name: str, value: Any) -> Sequence[Any]:
    """The numbers of layers that a value may list: a list, the text ``0,3,7``, numbers as keys, or groups of layers."""
    if isinstance(value, list) and value and all(isinstance(entry, list) for entry in value):
        return [number for entry in value for number in entry] if _GROUPS.search(name) else []
    if not _INDICES.search(name):
        return []
    if isinstance(value, str):
        return [int(number) for number in value.split(",")]
    if isinstance(value, Mapping):
        return [int(key) for key in value] if all(str(key).isdecimal() for key in value) else []
    return value if isinstance(value, list) else []


def _keeps(period: int, source: Sequence[int]) -> bool:
    return all((new - old) % period == 0 for new, old in enumerate(source))


def _keeps_first(count: int, source: Sequence[int]) -> bool:
    """Whether exactly the first layers of the output are some of the donor's first `count` layers."""
    return all((old < count) == (new < count) for new, old in enumerate(source))


def _moves(layers: Sequence[int], before: int, source: Sequence[int]) -> bool:
    """Whether any of the layers has another number in the output, or none, whether numbers start at 0 or at 1."""
    return any(
        [new + first for new, old in enumerate(source) if old + first in layers]
        != [layer for layer in sorted(layers) if layer - first < before]
        for first in (0, 1)
    )
