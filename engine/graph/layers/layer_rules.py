"""Adds the tensors of a layer to the graph: those at once of which earlier layers have the same names and classes.

Nearly all tensors of a mixture of experts are in such layers. What depends on the classes of the tensors alone is the
same for all of them.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from itertools import accumulate, chain, groupby, repeat
from operator import attrgetter
from sys import intern
from typing import NamedTuple

from ....io.tensors.table import TensorTable
from ...model.inputs import BoundSlice, Model
from ...model.logical import LogicalTensors
from ..columns.reads import StoredTensors
from ..columns.repeats import Piece
from ..graph import MergeGraph
from ..pieces import Pieces
from ..rules import TensorRules
from ..tensor_sources import TensorSources


class _Stored(NamedTuple):
    """What the tensors of a layer are stored as in one model.

    Args:
        classes: the class of each tensor; None if its parts are not in a table.
        tensors: the stored tensors: all parts of one tensor after those of another.
        firsts: for each tensor, the number of its first part in `tensors`.
    """

    classes: Sequence[int | None]
    tensors: StoredTensors
    firsts: Sequence[int]

    def some(self, numbers: range) -> _Stored:
        """The same of consecutive tensors of the layer."""
        first, classes = self.firsts[numbers.start], self.classes[numbers.start : numbers.stop]
        end = self.firsts[numbers.stop] if numbers.stop < len(self.firsts) else len(self.tensors.rows)
        own = slice(first, end)
        tensors = self.tensors._replace(names=self.tensors.names[own], rows=self.tensors.rows[own])
        return _Stored(classes, tensors, [each - first for each in self.firsts[numbers.start : numbers.stop]])


class _Layer(NamedTuple):
    """A layer whose nodes depend on the classes of its tensors, and otherwise only on its slice.

    Args:
        keys: what the nodes of each tensor depend on; None if it depends on more than that.
        beginning: beginning of the names of the output tensors, up to the layer's number.
        rests: the rests of these names.
        names: the names, but for those of parts.
        sources: what the tensors are stored as in each source of the slice.
    """

    keys: Sequence[Hashable]
    beginning: str
    rests: Sequence[str]
    names: Sequence[str]
    sources: Sequence[_Stored]


_Parts = tuple[tuple[int, int], ...]


class _Known(NamedTuple):
    """A tensor that others are like.

    Args:
        piece: what it adds to the graph.
        parts: for each read, the number of the source, and that of the tensor's part.
        rests: for each output, the name without the layer's beginning; empty if it only has the tensor's own name.
        random: numbers of the nodes in the piece that need a random key.
    """

    piece: Piece
    parts: _Parts
    rests: tuple[str, ...]
    random: tuple[int, ...]


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
        self._parts: dict[_Parts, _Parts] = {}  # those of known tensors, which are stored once if they are equal
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
        keys = repeat(None, len(tensors)) if layer is None else layer.keys
        are_known = [key is not None and key in self._known for key in keys]
        added = list(zip(tensors.values(), *sources, strict=True))
        begin = 0
        for is_known, run in groupby(are_known):
            numbers = range(begin, begin := begin + len(list(run)))
            if layer is not None and is_known and self._repeat(layer, numbers, group):
                continue
            for number in numbers:
                self._add(part, added[number], t, group, layer, number)

    def _add(
        self,
        part: BoundSlice,
        names: tuple[str | None, ...],
        t: float,
        group: int,
        layer: _Layer | None,
        number: int,
    ) -> None:
        """Add the tensor with a number in its layer. `names` has its name in the output, and in each source."""
        before, remarks = self._graph.counts(), self._rules.remarks
        name, own_names = names[0] or "", names[1:]
        taken = self._tensors_from and self._tensors_from.add(self._rules, name, part.models, own_names, group)
        if not taken:
            self._rules.add(part, name, own_names, t, group, copied=part.is_copied)
        key = None if layer is None else layer.keys[number]
        # other parameters than constant ones differ between tensors
        alike = part.parameters.constant is not None and remarks == self._rules.remarks
        if layer is not None and alike and key is not None and key not in self._known:
            self._learn(layer, number, before)

    def _repeat(self, layer: _Layer, numbers: range, group: int) -> bool:
        """Add known tensors of a layer if none of them is in the graph; return whether they were added."""
        known = [self._known[layer.keys[number]] for number in numbers]
        sources = [each.some(numbers) for each in layer.sources]
        tensors = [each.tensors for each in sources]
        if not all(map(self._graph.reads.are_new, tensors)):
            return False
        names, rests_of = layer.names[numbers.start : numbers.stop], layer.rests[numbers.start : numbers.stop]
        own_names = names
        if any(each.rests for each in known):  # the names of most tensors are in memory already
            rests = [each.rests or (rest,) for each, rest in zip(known, rests_of, strict=True)]
            names = [intern(layer.beginning + rest) for own in rests for rest in own]
        if not self._rules.written.add_all(names):
            return False
        before = accumulate((len(each.rows) for each in tensors), initial=0)
        starts = [[first + own for own in each.firsts] for first, each in zip(before, sources, strict=False)]
        order, end = list[int](), 0
        for parts, alike in groupby(known, attrgetter("parts")):
            begin, end = end, end + len(list(alike))
            columns = [[start + part for start in starts[source][begin:end]] for source, part in parts]
            order += chain.from_iterable(zip(*columns, strict=True))
        keys, node = dict[int, int](), 0
        for name, each in zip(own_names, known, strict=True) if self._random else ():
            for number in each.random:
                keys[node + number] = self._rules.random_key(name)
            node += len(each.piece.nodes)
        self._pieces.repeat([each.piece for each in known], tensors, order, names, keys, group)
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
        for source, (_, tensors, firsts) in enumerate(layer.sources):
            end = firsts[number + 1] if number + 1 < len(firsts) else None
            own = enumerate(tensors.names[firsts[number] : end])
            parts |= {(tensors.model, name): (source, place) for place, name in own}
        reads = [(graph.read_models[read], graph.read_names[read]) for read in piece.reads]
        if parts.keys() >= set(reads):
            random = tuple([place for place, node in enumerate(piece.nodes) if _is_random(graph, node)])
            rests = tuple([intern(name.removeprefix(layer.beginning)) for name in names])
            rests = () if rests == (layer.rests[number],) else rests
            own_parts = tuple(map(parts.__getitem__, reads))
            own_parts = self._parts.setdefault(own_parts, own_parts)
            self._known[layer.keys[number]] = _Known(piece, own_parts, rests, random)
            self._random = self._random or bool(random)

    def _layer(
        self, part: BoundSlice, tensors: Mapping[str, str], sources: Sequence[Sequence[str | None]]
    ) -> _Layer | None:
        """A layer of tensors that all sources store in tables; None if other facts about its tensors matter."""
        names, rests = list(tensors.values()), list(tensors)
        beginning = names[0].removesuffix(rests[0]) if names else ""
        if not names or names != [beginning + rest for rest in rests] or self._rules.dtypes.blocks is not None:
            return None
        found = list(map(_stored, part.models, sources))
        stored = [each for each in found if each is not None]
        if len(stored) < len(found) or len({each.tensors.model for each in stored}) < len(stored):
            return None
        classes = zip(*[each.classes for each in stored], strict=True)
        dtypes = [self._rules.dtypes.key(name, ()) for name in names]  # without blocks, shapes don't matter
        keys = zip(repeat(part), rests, dtypes, classes, strict=False)
        return _Layer([None if None in key[-1] else key for key in keys], beginning, rests, names, stored)


def _stored(model: Model, names: Sequence[str | None]) -> _Stored | None:
    """What the tensors of a layer are stored as in a model; None if it has adapters, no table, or lacks one of them."""
    tensors, known = model.tensors, [name for name in names if name is not None]
    if len(known) < len(names) or model.quantized or not model.has_files:
        return None
    if isinstance(tensors, TensorTable):
        rows = tensors.rows(known)
        own = StoredTensors(model.number, tensors, known, rows)
        return _Stored(list(tensors.class_numbers(rows)), own, range(len(rows)))
    found = tensors.stored_rows(known) if isinstance(tensors, LogicalTensors) else None
    if found is None or not isinstance(tensors, LogicalTensors) or tensors.table is None:
        return None
    parts = list(map(tensors.table.names.__getitem__, found.rows))
    return _Stored(found.classes, StoredTensors(model.number, tensors.table, parts, found.rows), found.firsts)


def _is_random(graph: MergeGraph, node: int) -> bool:
    kernel = graph.operation(node).kernel
    return kernel is not None and kernel.random
