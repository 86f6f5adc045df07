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
"""The part of a tensor's name up to its first number: ``model.layers.3`` of ``model.layers.3.mlp.up_proj.weight``."""


def export_graph(graph: MergeGraph, form: Format, detail: Detail = "layer") -> str:
    """The task graph as text that networkx and other graph tools load.

    Args:
        graph: the graph of a plan.
        form: ``graphml``, or ``json`` for networkx's node-link format.
        detail: ``layer`` groups reads, operations and outputs by layer; ``tensor`` keeps each one.
    """
    import networkx

    found = to_networkx(graph, detail)
    if form == "json":
        return json.dumps(networkx.node_link_data(found, edges="edges"), indent=1) + "\n"
    return "\n".join(networkx.generate_graphml(found)) + "\n"


def to_networkx(graph: MergeGraph, detail: Detail = "layer") -> networkx.DiGraph[str]:
    """The task graph as a networkx DiGraph: read nodes -> operation nodes -> output nodes.

    Every node has a ``kind`` (``read``, ``copy``, ``same``, ``merge`` or ``output``), a ``name``, and the ``tensors``
    and ``bytes`` that it stands for. Reads also have their ``model``, operations their ``method``.
    """
    import networkx

    grouped: Callable[[str], str] = layer_of if detail == "layer" else str
    found: networkx.DiGraph[str] = networkx.DiGraph()

    def add(kind: str, name: str, nbytes: int, **attributes: Any) -> str:
        key = ":".join([kind, *map(str, attributes.values()), name])
        if key not in found:
            found.add_node(key, kind=kind, name=name, tensors=0, bytes=0, **attributes)
        found.nodes[key]["tensors"] += 1
        found.nodes[key]["bytes"] += nbytes
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
        found.add_edges_from((reads[read], key) for read in graph.node_sources[node])
        operations.append(key)
    for output in graph.outputs:
        found.add_edge(operations[output.node], add("output", grouped(output.label), graph.nbytes(output.node)))
    return found


def layer_of(name: str) -> str:
    """The layer that a tensor's name belongs to, such as ``model.layers.3``; the name itself outside the layers."""
    match = _LAYER.match(name)
    return match[1] if match else name
