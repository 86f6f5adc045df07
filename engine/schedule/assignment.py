"""Assigns the nodes of a graph to the devices that compute."""

from __future__ import annotations

from ..graph.graph import MergeGraph
from .tiling import clusters


def assign_devices(graph: MergeGraph, count: int) -> list[int]:
    """Return the device of each node, balanced by bytes; connected nodes go to one device."""
    if count == 1:
        return [0] * len(graph.node_sources)
    together = {node: cluster[0] for cluster in clusters(graph) for node in cluster}
    load = [0] * count
    targets: dict[int, int] = {}
    devices = []
    for node in graph:
        group = together.get(node, node)
        target = targets.setdefault(group, load.index(min(load)))
        load[target] += graph.nbytes(node) + sum(map(graph.value_nbytes, graph.node_sources[node]))
        devices.append(target)
    return devices
