"""Groups the layers of a model by the tensors that they store, and finds tensors that only some layers store.

Layers are of one kind if the tensors of one are among those of the other: T5's first layer also stores the relative
positions that all layers use, and two of Zamba2's layers also store the blocks that all hybrid layers use. An attention
layer and a Mamba layer are of different kinds, since each has tensors that the other lacks.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .inputs import Model
from .layer_keys import LAYER_INDICES, LAYER_INDICES_FROM_1, LEADING, NOT_PER_LAYER, PER_LAYER
from .roles import is_buffer

_PROJECTION = re.compile(r"_proj\.weight$")
_NORM = re.compile(r"^(?:input|post_attention)_layernorm\.weight$")
"""Norms that no architecture omits in its first layer. ModernBERT's first layer has no ``attn_norm``."""
_KEYS_AND_VALUES = re.compile(r"(?:^|\.)(?:[kv]_(?:proj|norm)|kv_\w+)\.")
"""Tensors that the last layers may take from the layers before them."""


@dataclass(frozen=True, slots=True)
class LayerKind:
    """Layers of one kind.

    Args:
        layers: numbers of the layers, in order.
        stored: for each tensor that only some of them store, by the part of the name after the layer's number, the
            numbers of the layers that store it.
        matrices: those of these tensors that have two dimensions or more.
        stated: sets of layers that config.json names, by a list of their numbers or a count of the first or last ones.
    """

    layers: tuple[int, ...]
    stored: Mapping[str, frozenset[int]]
    matrices: frozenset[str]
    stated: frozenset[frozenset[int]]

    def expected(self, rest: str, ordinal: int) -> bool | None:
        """Whether the layer of this kind with that ordinal number stores a tensor; None if the model doesn't show it.

        Beyond the model's last layer, it is what the layers before it have in common.
        """
        if ordinal < len(self.layers):
            return self.layers[ordinal] in self.stored[rest]
        storing = [layer in self.stored[rest] for layer in self.layers]
        if storing == sorted(storing, reverse=True):
            return False  # only the first layers store it
        if storing == sorted(storing):
            return True
        return None if 2 * sum(storing) == len(storing) else 2 * sum(storing) > len(storing)

    def shared(self) -> dict[str, frozenset[int]]:
        """The tensors that at most half of the layers store, so the others probably use them, too.

        Layers that store a norm, but no matrix that others lack, keep it for themselves: RWKV's first layer does.
        """
        sharing = {self.stored[rest] for rest in self.matrices if 2 * len(self.stored[rest]) <= len(self.layers)}
        return {rest: layers for rest, layers in self.stored.items() if layers in sharing}

    def incomplete(self) -> Iterator[tuple[tuple[int, ...], str]]:
        """Each tensor that a few layers probably lack by mistake, and these layers, in order.

        A few layers lack a tensor by design if config.json names them, if they recur with a period, or if they are the
        last layers and lack only keys and values, which they take from the layers before them.
        """
        lacking: dict[tuple[int, ...], list[str]] = {}
        for rest, layers in self.stored.items():
            lacking.setdefault(tuple(layer for layer in self.layers if layer not in layers), []).append(rest)
        for absent, rests in lacking.items():
            if frozenset(absent) in self.stated or len(self.layers) < 3:
                continue
            if len(absent) == 1:
                yield from ((absent, rest) for rest in rests if self._lone(absent[0], rest))
            elif self._few(absent, rests):
                yield from ((absent, rest) for rest in rests if rest in self.matrices or _NORM.search(rest))

    def _lone(self, layer: int, rest: str) -> bool:
        """Whether a tensor is suspicious that only one layer lacks.

        In some architectures, the first or the last layer lacks a norm, but no projection. A last layer that lacks one
        may use those of the layers before it; it is suspicious only if there are more of them than Zamba2's two.
        """
        first = layer == self.layers[0]
        if self.layers[0] < layer < self.layers[-1] or (first and _NORM.search(rest)):
            return True
        return bool(_PROJECTION.search(rest)) and (first or len(self.layers) > 3)

    def _few(self, layers: Sequence[int], rests: Sequence[str]) -> bool:
        """Whether layers are too few, and too irregular, to lack tensors by design.

        Args:
            layers: the layers, at least two.
            rests: all tensors that exactly these layers lack.
        """
        ordinals = [self.layers.index(layer) for layer in layers]
        count, total = len(ordinals), len(self.layers)
        if ordinals[-1] - ordinals[0] == count - 1:  # neighbours, as after a damaged file
            is_end = ordinals[-1] == total - 1
            if ordinals[0] == 0 or (is_end and all(_KEYS_AND_VALUES.search(rest) for rest in rests)):
                return False
            return 4 * count <= total
        period = ordinals[1] - ordinals[0]
        return 8 * count <= total and ordinals != list(range(ordinals[0] % period, total, period))


class LayerKinds:
    """The kinds of layers in a stack of a model.

    Layers whose differences follow from a list in config.json have no kinds in common: when layers move, so do the
    entries of the list.

    Args:
        model: the model.
        stack: number of the main stack.
    """

    def __init__(self, model: Model, stack: int) -> None:
        main = model.stack(stack)
        sets = [frozenset(model.by_layer.get((stack, layer), ())) for layer in range(main.count)]
        self.kinds: list[LayerKind] = []
        self._by_tensors: dict[frozenset[str], LayerKind] = {}
        distinct = Counter(sets)
        section = _section(model.checkpoint.config, main.config_path)
        if len(distinct) < 2 or _explained(section, sets):
            return
        stated = frozenset(_stated(section, main.count))
        for group in _nested(list(distinct)):
            counts: Counter[str] = Counter()
            for tensors in group:
                counts.update(dict.fromkeys(tensors, distinct[tensors]))
            layers = tuple(layer for layer, tensors in enumerate(sets) if tensors in group)
            partial = sorted(rest for rest, count in counts.items() if count < len(layers) and not is_buffer(rest))
            stored = {rest: frozenset(layer for layer in layers if rest in sets[layer]) for rest in partial}
            tensors_of = model.tensors
            shapes = {rest: tensors_of[model.by_layer[stack, min(own)][rest]].shape for rest, own in stored.items()}
            matrices = frozenset(rest for rest, shape in shapes.items() if len(shape) > 1)
            kind = LayerKind(layers, stored, matrices, stated)
            self._by_tensors |= dict.fromkeys(group, kind)
            if stored:
                self.kinds.append(kind)

    def of(self, tensors: frozenset[str]) -> LayerKind | None:
        """The kind of a layer with these tensors; None if no layer of the model is like it, or all are alike."""
        if not self.kinds:
            return None
        if tensors not in self._by_tensors:
            kind = next((k for known, k in self._by_tensors.items() if known <= tensors or tensors <= known), None)
            if kind is None:
                return None
            self._by_tensors[tensors] = kind
        return self._by_tensors[tensors]


def _nested(sets: Sequence[frozenset[str]]) -> list[set[frozenset[str]]]:
    """Group sets: each set of a group contains, or is contained in, another one of the group."""
    groups: list[set[frozenset[str]]] = []
    for tensors in sets:
        near = [group for group in groups if any(tensors < other or other < tensors for other in group)]
        groups = [group for group in groups if group not in near]
        groups.append({tensors}.union(*near))
    return groups


def _section(config: Mapping[str, Any] | None, path: Sequence[str]) -> Mapping[str, Any]:
    section: Any = config or {}
    for key in path:
        section = section.get(key) if isinstance(section, Mapping) else None
    return section if isinstance(section, Mapping) else {}


def _explained(section: Mapping[str, Any], sets: Sequence[frozenset[str]]) -> bool:
    """Whether layers with equal entries in a list of config.json store the same tensors.

    If no list alone explains the layers, all lists together may: DeepSeek-V4's attention follows from one, its experts
    from another.
    """
    lists = {key: _entries(key, value, len(sets)) for key, value in section.items()}
    stated = [entries for key, entries in lists.items() if isinstance(section[key], list) and len(set(entries)) > 1]
    together = list(zip(*(entries for entries in stated if len(set(entries)) < len(sets)), strict=True))
    return any(_explains(entries, sets) for entries in lists.values()) or (
        2 * len(set(together)) <= len(sets) and _explains(together, sets)
    )


def _explains(entries: Sequence[object], sets: Sequence[frozenset[str]]) -> bool:
    kinds = len(set(entries))
    return 1 < kinds < len(sets) and len({*zip(entries, sets, strict=True)}) == kinds


def _entries(key: str, value: object, count: int) -> list[str]:
    """For each layer its entry in a list, or whether a list of layer numbers contains it; the same for other values.

    A list with an unknown name has one entry per layer if it has exactly as many entries as there are layers.
    """
    if key in PER_LAYER and isinstance(value, (list, str)) and len(value) >= count:
        return [json.dumps(entry, sort_keys=True) for entry in value[:count]]
    if isinstance(value, list) and len(value) == count and not _is_other(key):
        return [json.dumps(entry, sort_keys=True) for entry in value]
    numbers = _numbers(key, value)
    if numbers:
        return [str(layer in numbers) for layer in range(count)]
    return [""] * count


def _is_other(key: str) -> bool:
    """Whether a key lists something else than layers, whatever the length of its list."""
    is_known = key in PER_LAYER or key in LAYER_INDICES or key in LAYER_INDICES_FROM_1
    return not is_known and NOT_PER_LAYER.search(key) is not None


def _numbers(key: str, value: object) -> frozenset[int]:
    """The numbers of the layers that a list names, from 0; empty for other values."""
    if isinstance(value, str) and key in LAYER_INDICES and re.fullmatch(r"\d+(?:,\d+)*", value):
        return frozenset(map(int, value.split(",")))  # Step3's moe_layers_enum
    if not isinstance(value, list) or _is_other(key) or any(type(entry) is not int for entry in value):
        return frozenset()
    return frozenset(entry - (key in LAYER_INDICES_FROM_1) for entry in value)


def _stated(section: Mapping[str, Any], count: int) -> Iterator[frozenset[int]]:
    """The sets of layers that config.json names: those in a list, and the first or last ones by their count."""
    for key, value in section.items():
        if type(value) is int and 0 < value < count and (key in LEADING or key == "num_kv_shared_layers"):
            yield frozenset(range(value))
            yield frozenset(range(count - value, count))
        elif numbers := _numbers(key, value):
            yield numbers
