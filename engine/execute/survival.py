"""Collects the sums that tell how much of a change survives rounding, see `methods.kernel.reduction.survival`.

Chunks bring a sum for each block of elements, in any order. The sums over a tensor's first elements are kept exactly,
as expansions: a few numbers that do not overlap. They do not depend on the chunks, so an interrupted merge continues
with the ones that the journal has.
"""

from __future__ import annotations

import math
import threading
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from ...methods.kernel.reduction.survival import SUMS
from ..graph.graph import MergeGraph

Expansion = tuple[float, ...]
"""Numbers whose exact sum is the value; NaN alone if it is not finite."""
_NOT_FINITE = (math.nan,)


@dataclass(frozen=True, slots=True)
class Prefix:
    """The sums over the first elements of a tensor.

    Args:
        elements: number of elements.
        sums: expansion of each sum.
    """

    elements: int = 0
    sums: tuple[Expansion, ...] = ((),) * SUMS

    def extended(self, elements: int, blocks: Sequence[Sequence[float]]) -> Prefix:
        """The sums up to an element, with those of the blocks before it."""
        pairs = zip(self.sums, blocks, strict=True)
        return Prefix(elements, tuple(expansion((*before, *more)) for before, more in pairs))


def expansion(values: Sequence[float]) -> Expansion:
    """The exact sum of numbers as an expansion, the largest number first."""
    parts: list[float] = []
    try:
        while (rest := math.fsum((*values, *(-part for part in parts)))) != 0:
            if not math.isfinite(rest):
                return _NOT_FINITE
            parts.append(rest)
    except (OverflowError, ValueError):
        return _NOT_FINITE
    return tuple(parts)


@dataclass(slots=True)
class _Tensor:
    """The sums of a tensor in progress.

    Args:
        newest: sums over all elements before the first one that is missing.
        journaled: number of elements of the sums that `durable` returned last.
        earlier: sums up to where other chunks ended, which may be journaled later, in order.
        waiting: sums of chunks beyond it: first element -> the element after the last one, and sums of blocks.
    """

    newest: Prefix = field(default_factory=Prefix)
    journaled: int = 0
    earlier: list[Prefix] = field(default_factory=list)
    waiting: dict[int, tuple[int, Sequence[Sequence[float]]]] = field(default_factory=dict)


class SurvivalSums:
    """The sums of all nodes with by-products. Thread-safe.

    Args:
        graph: graph of the merge.
        known: sums of earlier runs, by node.
        journaled: whether `durable` is called for what is written.
    """

    def __init__(
        self, graph: MergeGraph, known: Mapping[int, Prefix] | None = None, *, journaled: bool = False
    ) -> None:
        self._graph = graph
        self._journaled = journaled
        self._lock = threading.Lock()
        self._tensors: dict[int, _Tensor] = {}
        self._totals: array[float] | None = None  # of all nodes, one after another; made for the first one
        for node, prefix in (known or {}).items():
            self._tensors[node] = _Tensor(prefix, prefix.elements)
            self._complete(node, prefix)

    def add(self, node: int, first: int, elements: int, blocks: Sequence[Sequence[float]]) -> None:
        """Add the sums of the blocks of a chunk; those that are known are ignored.

        Args:
            node: node.
            first: index of the chunk's first element.
            elements: number of elements.
            blocks: for each sum, that of each block.
        """
        size = block_elements(self._graph, node)
        with self._lock:
            if self.total(node) is not None:
                return
            tensor = self._tensors.setdefault(node, _Tensor())
            tensor.waiting[first] = first + elements, blocks
            while begin := [start for start in tensor.waiting if start <= tensor.newest.elements]:
                end, sums = tensor.waiting.pop(begin[0])
                before = tensor.newest
                if end > before.elements:
                    skipped = (before.elements - begin[0]) // size
                    tensor.newest = before.extended(end, [each[skipped:] for each in sums])
                    tensor.earlier += [before] if self._journaled and before.elements else []
            self._complete(node, tensor.newest)

    def durable(self, node: int, elements: int) -> Prefix | None:
        """The newest sums over no more than the first elements of a node, which are durable; older ones are forgotten.

        None if these were returned before.
        """
        with self._lock:
            tensor = self._tensors.get(node)
            if tensor is None:
                return None
            if elements >= self._graph.elements(node) and self.total(node) is not None:
                del self._tensors[node]
            covered = [each for each in (*tensor.earlier, tensor.newest) if each.elements <= elements]
            tensor.earlier = [each for each in tensor.earlier if each.elements > elements]
            if not covered or covered[-1].elements <= tensor.journaled:
                return None
            tensor.journaled = covered[-1].elements
            return covered[-1]

    def total(self, node: int) -> tuple[float, ...] | None:
        """Each sum over all elements of a node, rounded once; None if they are not complete."""
        if self._totals is None or math.isinf(self._totals[node * SUMS]):
            return None
        return tuple(self._totals[node * SUMS : (node + 1) * SUMS])

    def _complete(self, node: int, prefix: Prefix) -> None:
        """Keep the totals of a node if its newest sums are over all elements."""
        if prefix.elements < self._graph.elements(node):
            return
        if self._totals is None:
            self._totals = array("d", [-math.inf]) * (SUMS * len(self._graph.nodes()))
        for place, parts in enumerate(prefix.sums, node * SUMS):
            self._totals[place] = math.fsum(parts)
        if not self._journaled or self._tensors[node].journaled == prefix.elements:
            del self._tensors[node]


def compared_nodes(graph: MergeGraph) -> Iterator[int]:
    """Yield the nodes whose output is compared with the base and has elements."""
    operations = [operation.kernel is not None and bool(operation.kernel.byproducts) for operation in graph.operations]
    for node, operation in enumerate(graph.node_operation) if any(operations) else ():
        if operations[operation] and graph.elements(node):
            yield node


def has_sums(graph: MergeGraph, node: int) -> bool:
    """Return whether the output of a node is compared with the base."""
    kernel = graph.operation(node).kernel
    return kernel is not None and bool(kernel.byproducts)


def block_elements(graph: MergeGraph, node: int) -> int:
    """The number of elements in a block of the sums of a node."""
    kernel = graph.operation(node).kernel
    assert kernel is not None
    block: int = kernel.byproducts[0].value.block
    return block
