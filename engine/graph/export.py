"""Exports the task graph through networkx: as GraphML or node-link JSON, by layer or tensor by tensor."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from .graph import MergeGraph

if TYPE_CHECKING:
    import networkx

Detail = Literal["layer", "tensor"]
Format = Literal["graphml", "json"]

_LAYER = re.compile(r"^(.*?\.\d+)\.")
"""The part of a tensor's name up to the first number: ``model.layers.3`` of ``model.layers.3.mlp.up_proj.weight``."""


def export_graph(graph: MergeGraph, form: Format, detail: Detail = "layer") -> str:
    """Export the task graph as text for networkx and other graph tools.

    Args:
        graph: the task graph of a plan.
        form: ``graphml``, or ``json`` for networkx's node-link format.
        detail: ``layer`` groups reads, operations and outputs by layer; ``tensor`` exports each of them.
    """
    import networkx

    digraph = to_networkx(graph, detail)
    if form == "json":
        return json.dumps(networkx.node_link_data(digraph, edges="edges"), indent=1) + "\n"
    return "\n".join(networkx.generate_graphml(digraph)) + "\n"


def to_networkx(graph: MergeGraph, detail: Detail = "layer") -> networkx.DiGraph[str]:
    """The task graph as a networkx DiGraph: read nodes -> operation nodes -> output nodes.

    Every node has a ``kind`` (``read``, ``copy``, ``same``, ``merge`` or ``output``), a ``name``, and the ``tensors``
    and ``bytes`` that it represents. Reads also have their ``model``, operations their ``method``.
    """
    import networkx

    grouped: Callable[[str], str] = layer_of if detail == "layer" else str
    digraph: networkx.DiGraph[str] = networkx.DiGraph()

    def add(kind: str, name: str, nbytes: int, **attributes: Any) -> str:
        key = ":".join([kind, *map(str, attributes.values()), name])
        if key not in digraph:
            digraph.add_node(key, kind=kind, name=name, tensors=0, bytes=0, **attributes)
        digraph.nodes[key]["tensors"] += 1
        digraph.nodes[key]["bytes"] += nbytes
        return key

    reads = [
        add("read", grouped(name), ref.nbytes, model=graph.models[model])
        for ref, model, name in zip(graph.reads, graph.read_models, graph.read_names, strict=True)
    ]
    names = [""] * len(graph.node_operation)
    for output in reversed(graph.outputs):
        names[output.node] = output.label
    operations = []
    for node in graph:
        operation = graph.operation(node)
        key = add(operation.kind.value, grouped(names[node]), graph.nbytes(node), method=operation.method)
        digraph.add_edges_from((reads[read], key) for read in graph.node_sources[node])
        operations.append(key)
    for output in graph.outputs:
        digraph.add_edge(operations[output.node], add("output", grouped(output.label), graph.nbytes(output.node)))
    return digraph


def layer_of(name: str) -> str:
    """The layer in a tensor's name, such as ``model.layers.3``; outside the layers, the name itself."""
    match = _LAYER.match(name)
    return match[1] if match else name
