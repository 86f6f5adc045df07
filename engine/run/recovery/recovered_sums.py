"""Recovers the sums over outputs that the journal has, and finds what is computed again for those that it lacks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ....io.output.digests import BlockDigests
from ...execute.survival import Prefix, compared_nodes
from ...graph.graph import MergeGraph

if TYPE_CHECKING:
    from .recover import RecoveredState


def covered_sums(
    journaled: Mapping[int, Sequence[Prefix]], graph: MergeGraph, written: Mapping[int, int]
) -> dict[int, Prefix]:
    """Return for each node the sums over the most elements that are all durable.

    Args:
        journaled: sums that the journal has, by node.
        graph: merge graph.
        written: number of durable bytes of each node.
    """
    found: dict[int, Prefix] = {}
    for node, prefixes in journaled.items():
        nbytes = graph.node_dtype[node].nbytes
        covered = [each for each in prefixes if nbytes(each.elements) <= written.get(node, 0)]
        if covered:
            found[node] = max(covered, key=lambda each: each.elements)
    return found


def reopen_outputs(recovered: RecoveredState, graph: MergeGraph, done: dict[int, int]) -> None:
    """Let the lanes compute again what durable outputs lack: elements that the sums of a node do not cover.

    The bytes are not written again. Tensors that are computed together are continued together.

    Args:
        recovered: recovered data; changed.
        graph: merge graph.
        done: number of bytes of each node that the lanes need not compute; changed.
    """
    for node in compared_nodes(graph):
        covered = graph.node_dtype[node].nbytes(recovered.survival.get(node, Prefix()).elements)
        done[node] = min(done.get(node, 0), covered)
    for node in [node for node in recovered.complete if not is_finished(graph, node, done)]:
        recovered.partial[node] = BlockDigests(graph.nbytes(node), recovered.complete.pop(node))


def is_finished(graph: MergeGraph, node: int, done: Mapping[int, int]) -> bool:
    """Return whether all tensors that are computed together with a node are done."""
    return all(done.get(each, 0) >= graph.nbytes(each) for each in graph.results_with(node))
