"""Finds the outputs of an unfinished merge that the lanes compute again, although their bytes are durable."""

from __future__ import annotations

from collections.abc import Mapping

from ....io.output.digests import BlockDigests
from ...execute.survival import Prefix, compared_nodes
from ...graph.graph import MergeGraph
from .recover import RecoveredState


def reopen_outputs(recovered: RecoveredState, graph: MergeGraph, done: dict[int, int]) -> None:
    """Let the lanes compute again what durable outputs lack: elements that the sums of a node do not cover.

    The bytes are not written again. Tensors that are computed together are continued together.

    Args:
        recovered: recovered data; changed.
        graph: merge graph.
        done: number of bytes of each node that the lanes need not compute; changed.
    """
    for node in compared_nodes(graph) if done else ():
        covered = graph.node_dtype[node].nbytes(recovered.survival.get(node, Prefix()).elements)
        if done.get(node, 0) > covered:
            done[node] = covered
    for node in [node for node in recovered.complete if not is_finished(graph, node, done)]:
        recovered.partial[node] = BlockDigests(graph.nbytes(node), recovered.complete.pop(node))


def is_finished(graph: MergeGraph, node: int, done: Mapping[int, int]) -> bool:
    """Return whether all tensors that are computed together with a node are done."""
    return all(done.get(each, 0) >= graph.nbytes(each) for each in graph.results_with(node))
