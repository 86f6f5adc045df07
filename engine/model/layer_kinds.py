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
from .roles import is_buffer

_PROJECTION = re.compile(r"_proj\.weight$")


@dataclass(frozen=True, slots=True)
class LayerKind:
    """Layers of one kind.

    Args:
        layers: numbers of the layers, in order.
        stored: for each tensor that only some of them store, by the part of the name after the layer's number, the
            numbers of the layers that store it.
        matrices: those of these tensors that have two dimensions or more.
    """

    layers: tuple[int, ...]
    stored: Mapping[str, frozenset[int]]
    matrices: frozenset[str]

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

    def lone(self) -> Iterator[tuple[int, str]]:
        """Each layer that alone lacks a tensor of all other layers, and that tensor.

        In some architectures, the first or the last layer lacks a norm, but no projection. A last layer that lacks one
        may use those of the layers before it; it is suspicious only if there are more of them than Zamba2's two.
        """
        for rest, layers in self.stored.items():
            lacking = set(self.layers) - layers
            if len(lacking) == 1 and len(self.layers) > 2:
                layer = lacking.pop()
                is_inner = self.layers[0] < layer < self.layers[-1]
                if is_inner or (_PROJECTION.search(rest) and (layer == self.layers[0] or len(self.layers) > 3)):
                    yield layer, rest


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
        if len(distinct) < 2 or _explained(_section(model.checkpoint.config, main.config_path), sets):
            return
        for group in _nested(list(distinct)):
            counts: Counter[str] = Counter()
            for tensors in group:
                counts.update(dict.fromkeys(tensors, distinct[tensors]))
            layers = tuple(layer for layer, tensors in enumerate(sets) if tensors in group)
            partial = sorted(rest for rest, count in counts.items() if count < len(layers) and not is_buffer(rest))
            stored = {rest: frozenset(layer for layer in layers if rest in sets[layer]) for rest in partial}
            tensors_of = model.checkpoint.tensors
            shapes = {rest: tensors_of[model.by_layer[stack, min(own)][rest]].shape for rest, own in stored.items()}
            matrices = frozenset(rest for rest, shape in shapes.items() if len(shape) > 1)
            kind = LayerKind(layers, stored, matrices)
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
    """For each layer its entry in a list, or whether a list of layer numbers contains it; the same for other values."""
    if isinstance(value, (list, str)) and len(value) >= count:
        return [json.dumps(entry, sort_keys=True) for entry in value[:count]]
    if isinstance(value, list) and ("layer" in key or key.endswith("idxs")):
        return [str(layer in value) for layer in range(count)]
    return [""] * count
