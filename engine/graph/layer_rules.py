"""Adds the tensors of a layer to the graph: at once, if earlier layers have tensors of the same names and classes.

Nearly all tensors of a mixture of experts are in such layers. What depends on the classes of the tensors alone is the
same for all of them.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from itertools import accumulate, repeat
from sys import intern
from typing import NamedTuple

from ...io.tensors.table import TensorTable
from ..model.inputs import BoundSlice, Model
from ..model.logical import LogicalTensors
from .columns.reads import StoredTensors
from .graph import MergeGraph
from .pieces import Piece, Pieces
from .rules import TensorRules
from .tensor_sources import TensorSources


class _Layer(NamedTuple):
    """A layer whose nodes depend on the classes of its tensors, and otherwise only on its slice.

    Args:
        keys: what the nodes of each tensor depend on.
        beginning: beginning of the names of the output tensors, up to the layer's number.
        names: names of the output tensors, but for those of their parts.
        tensors: tensors of each source of the slice, with all parts.
        firsts: for each source and each of `names`, the number of its first part in `tensors`.
    """

    keys: Sequence[Hashable]
    beginning: str
    names: Sequence[str]
    tensors: Sequence[StoredTensors]
    firsts: Sequence[Sequence[int]]


class _Known(NamedTuple):
    """A tensor that others are like.

    Args:
        piece: what it adds to the graph.
        parts: for each read, the number of the source, and that of the tensor's part.
        rests: for each output, the name without the layer's beginning.
        random: numbers of the nodes in the piece that need a random key.
    """

    piece: Piece
    parts: Sequence[tuple[int, int]]
    rests: Sequence[str]
    random: Sequence[int]


class LayerRules:
    """Adds the tensors of layers to a graph.

    Args:
        graph: the graph that receives the tensors.
        rules: adds a single tensor.
        tensors_from: adds the tensors that are copied from a named model; None if there are none.
    """

    def __init__(self, graph: MergeGraph, rules: TensorRules, tensors_from: TensorSources | None) -> None:
        self._graph = graph
        self._rules = rules
        self._tensors_from = tensors_from
        self._known: dict[Hashable, _Known] = {}
        self._random = False  # whether any of them needs a random key
        self._pieces = Pieces(graph)

    def add(
        self,
        part: BoundSlice,
        tensors: Mapping[str, str],
        sources: Sequence[Sequence[str | None]],
        t: float,
        group: int,
    ) -> None:
        """Add the tensors of one layer, each as `TensorRules.add` does.

        Args:
            part: the slice that contains the layer.
            tensors: names of the output tensors, by the part after the layer's number.
            sources: for each source of the slice, its name for each tensor, or None if it lacks the tensor.
            t: position of the layer in a gradient.
            group: group of the outputs (see `graph.Output`).
        """
        layer = None if self._tensors_from or part.is_copied else self._layer(part, tensors, sources)
        if layer is not None and self._repeat(layer, group):
            return
        # other parameters than constant ones differ between tensors
        alike = layer if part.parameters.constant is not None else None
        for number, (name, *own_names) in enumerate(zip(tensors.values(), *sources, strict=True)):
            before, remarks = self._graph.counts(), self._rules.remarks
            taken = self._tensors_from and self._tensors_from.add(self._rules, name, part.models, own_names, group)
            if not taken:
                self._rules.add(part, name, own_names, t, group, copied=part.is_copied)
            if alike is not None and alike.keys[number] not in self._known and remarks == self._rules.remarks:
                self._learn(alike, number, before)

    def _repeat(self, layer: _Layer, group: int) -> bool:
        """Add a layer if all of its tensors are as in earlier ones, and none of them is in the graph."""
        known = [each for each in map(self._known.get, layer.keys) if each is not None]
        if len(known) < len(layer.keys) or not all(map(self._graph.reads.are_new, layer.tensors)):
            return False
        # the names of most tensors are in memory already
        names = [intern(layer.beginning + rest) for each in known for rest in each.rests]
        if not self._rules.written.add_all(names):
            return False
        before = [0, *accumulate(len(each.rows) for each in layer.tensors)]
        starts = [[first + own for own in firsts] for first, firsts in zip(before, layer.firsts, strict=False)]
        order = [starts[source][n] + part for n, each in enumerate(known) for source, part in each.parts]
        keys, node = dict[int, int](), 0
        for name, each in zip(layer.names, known, strict=True) if self._random else ():
            for number in each.random:
                keys[node + number] = self._rules.random_key(name)
            node += len(each.piece.nodes)
        self._pieces.repeat([each.piece for each in known], layer.tensors, order, names, keys, group)
        return True

    def _learn(self, layer: _Layer, number: int, before: tuple[int, int, int]) -> None:
        """Remember a tensor that was just added, if it has its own nodes of its own reads.

        Args:
            layer: the layer.
            number: number of the tensor in the layer.
            before: what `MergeGraph.counts` returned before the tensor was added.
        """
        graph, piece = self._graph, self._pieces.since(before)
        names = [] if piece is None else graph.outputs.names[piece.outputs.start :]
        if piece is None or not all(name.startswith(layer.beginning) for name in names):
            return
        parts: dict[tuple[int, str], tuple[int, int]] = {}
        for source, (each, firsts) in enumerate(zip(layer.tensors, layer.firsts, strict=True)):
            own = each.names[firsts[number] : [*firsts, None][number + 1]]
            parts |= {(each.model, name): (source, place) for place, name in enumerate(own)}
        reads = [(graph.read_models[read], graph.read_names[read]) for read in piece.reads]
        if parts.keys() >= set(reads):
            random = [place for place, node in enumerate(piece.nodes) if _is_random(graph, node)]
            rests = [name.removeprefix(layer.beginning) for name in names]
            self._known[layer.keys[number]] = _Known(piece, list(map(parts.__getitem__, reads)), rests, random)
            self._random = self._random or bool(random)

    def _layer(
        self, part: BoundSlice, tensors: Mapping[str, str], sources: Sequence[Sequence[str | None]]
    ) -> _Layer | None:
        """A layer of tensors that all sources store in tables; None if other facts about its tensors matter."""
        names, rests = list(tensors.values()), list(tensors)
        beginning = names[0].removesuffix(rests[0]) if names else ""
        if not names or any(name != beginning + rest for rest, name in tensors.items()):
            return None
        classes, stored, firsts = [], [], []
        for model, own in zip(part.models, sources, strict=True):
            known = [name for name in own if name is not None]
            found = _stored(model, known) if len(known) == len(own) and not model.quantized else None
            if found is None:
                return None
            for column, each in zip((classes, stored, firsts), found, strict=True):
                column.append(each)
        if len({each.model for each in stored}) < len(stored):
            return None
        keys = zip(repeat(part), rests, map(self._rules.dtypes.key, names), *classes, strict=False)
        return _Layer(list(keys), beginning, names, stored, firsts)


def _stored(model: Model, names: Sequence[str]) -> tuple[Sequence[int], StoredTensors, Sequence[int]] | None:
    """The classes of a model's tensors, the tensors with all parts, and the number of the first part of each.

    None if some of them are not in a table.
    """
    tensors = model.tensors
    if isinstance(tensors, TensorTable):
        rows = tensors.rows(names)
        return list(tensors.class_numbers(rows)), StoredTensors(model.number, tensors, names, rows), range(len(rows))
    found = tensors.stored_rows(names) if isinstance(tensors, LogicalTensors) else None
    if found is None or not isinstance(tensors, LogicalTensors) or tensors.table is None:
        return None
    own = list(map(tensors.table.names.__getitem__, found.rows))
    return found.classes, StoredTensors(model.number, tensors.table, own, found.rows), found.firsts


def _is_random(graph: MergeGraph, node: int) -> bool:
    kernel = graph.operation(node).kernel
    return kernel is not None and kernel.random
