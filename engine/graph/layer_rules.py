"""Adds the tensors of a layer to the graph: at once, if earlier layers have tensors of the same names and classes.

Nearly all tensors of a mixture of experts are in such layers. What depends on the classes of the tensors alone is the
same for all of them.
"""

from __future__ import annotations

from array import array
from collections.abc import Hashable, Mapping, Sequence
from itertools import chain, repeat
from typing import NamedTuple

from ...io.tensors.table import TensorTable
from ..model.inputs import BoundSlice
from ..model.roles import is_buffer
from .columns.reads import StoredTensors
from .graph import MergeGraph
from .rules import TensorRules
from .tensor_sources import TensorSources


class _Layer(NamedTuple):
    """A layer whose nodes depend on the classes of its tensors, and otherwise only on its slice.

    Args:
        keys: what each node depends on.
        names: names of the output tensors.
        tensors: tensors of each source of the slice, in the order of `names`.
    """

    keys: Sequence[Hashable]
    names: Sequence[str]
    tensors: Sequence[StoredTensors]


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
        self._nodes: dict[Hashable, int] = {}  # by key, one such node
        self._random = False  # whether any of them is random

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
        before = self._counts()
        for name, *own_names in zip(tensors.values(), *sources, strict=True):
            taken = self._tensors_from and self._tensors_from.add(self._rules, name, part.models, own_names, group)
            if not taken:
                self._rules.add(part, name, own_names, t, group, copied=part.is_copied)
        # other parameters than constant ones differ between tensors
        if layer is not None and part.parameters.constant is not None:
            self._learn(layer, before)

    def _repeat(self, layer: _Layer, group: int) -> bool:
        """Add a layer if all of its tensors are as in earlier ones, and none of them is in the graph."""
        like, graph = list(map(self._nodes.get, layer.keys)), self._graph
        if None in like or not all(map(graph.reads.are_new, layer.tensors)):
            return False
        if not self._rules.written.add_all(layer.names):
            return False
        nodes, keys = array("I", [node for node in like if node is not None]), [0] * len(like)
        for number, node in enumerate(nodes) if self._random else ():
            if _is_random(graph, node):
                keys[number] = self._rules.random_key(layer.names[number])
        graph.outputs.extend(layer.names, graph.repeat_nodes(nodes, layer.tensors, keys), group)
        return True

    def _learn(self, layer: _Layer, before: tuple[int, int, int]) -> None:
        """Remember the nodes of a layer that was just added, if each tensor has its own node of its own reads.

        Args:
            layer: the layer.
            before: what `_counts` returned before the layer was added.
        """
        graph = self._graph
        reads, nodes, outputs = map(range, before, self._counts())
        if not len(nodes) == len(outputs) == len(layer.names) == len(reads) / len(layer.tensors):
            return
        sources = chain.from_iterable(map(graph.node_sources.__getitem__, nodes))
        in_order = list(sources) == list(reads) and list(graph.outputs.nodes[outputs.start :]) == list(nodes)
        if not in_order or any(map(is_buffer, layer.names, map(graph.shape, nodes))):
            return
        self._nodes.update(zip(layer.keys, nodes, strict=True))
        self._random = self._random or any(_is_random(graph, node) for node in nodes)

    def _layer(
        self, part: BoundSlice, tensors: Mapping[str, str], sources: Sequence[Sequence[str | None]]
    ) -> _Layer | None:
        """A layer of stored tensors that all sources have; None if other facts about its tensors matter."""
        stored: list[StoredTensors] = []
        for model, own in zip(part.models, sources, strict=True):
            if not isinstance(model.tensors, TensorTable) or model.quantized or None in own:
                return None
            names = [name for name in own if name is not None]
            stored.append(StoredTensors(model.number, model.tensors, names, model.tensors.rows(names)))
        if not tensors or len({each.model for each in stored}) < len(stored):
            return None
        numbers = (each.table.class_numbers(each.rows) for each in stored)
        names = list(tensors.values())
        keys = zip(repeat(part), tensors, map(self._rules.dtypes.key, names), *numbers)
        return _Layer(list(keys), names, stored)

    def _counts(self) -> tuple[int, int, int]:
        """The numbers of reads, nodes and outputs."""
        return len(self._graph.reads), len(self._graph.node_operation), len(self._graph.outputs)


def _is_random(graph: MergeGraph, node: int) -> bool:
    kernel = graph.operation(node).kernel
    return kernel is not None and kernel.random
