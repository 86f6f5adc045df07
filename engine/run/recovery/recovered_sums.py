"""Recovers the sums over outputs that the journal has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ...execute.survival import Prefix
from ...graph.graph import MergeGraph


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
