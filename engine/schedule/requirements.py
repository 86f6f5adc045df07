"""The memory that every schedule of a graph requires: slot size, slots for one step, and workspace."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from ..graph.extents import length, most_made, staged_bytes
from ..graph.graph import Kind, MergeGraph
from .tiling import alignment_of, common_alignment, connected, tile_length, widest, work_bytes

PAGE = 4096
SMALLEST_SLOT = 64 << 10


@dataclass(slots=True)
class Requirements:
    """The smallest slot, window and workspace that every node fits.

    Args:
        slot: smallest size of a slot in bytes.
        slot_node: node that requires that slot size, or None if any node would do with the smallest one.
        largest: size of the largest tensor in bytes.
        window: number of slots that the node with the most sources takes for one chunk.
        workspace: workspace of a compute thread in bytes, a multiple of the page size.
        workspace_node: node that requires that workspace, or None if nothing is computed.
        allocated: bytes that a compute thread allocates in addition to its workspace.
        computes: whether any node has a kernel.
        reduces: whether any kernel has passes whose partial results are kept.
    """

    slot: int = SMALLEST_SLOT
    slot_node: int | None = None
    largest: int = 0
    window: int = 1
    workspace: int = 0
    workspace_node: int | None = None
    allocated: int = 0
    computes: bool = False
    reduces: bool = False

    @property
    def node(self) -> int | None:
        """The node that determines the minimum budget, if one does."""
        return self.slot_node if self.slot_node is not None else self.workspace_node


def requirements(
    graph: MergeGraph, tile_elements: int, finished: Collection[int], *, separate: bool = False
) -> Requirements:
    """Return the requirements of the nodes that are not finished.

    Args:
        graph: graph to schedule.
        tile_elements: preferred number of elements in a compute tile.
        finished: nodes that an earlier run has written.
        separate: whether the device has its own memory, where torch takes the workspace that kernels declare; the
            compiled loops of the CPU take what `footprints` says.
    """
    result = Requirements()
    nodes: Iterable[int] = graph.class_nodes
    if finished:
        classes = graph.node_class
        nodes = {classes[node]: node for node in reversed(graph.nodes()) if node not in finished}.values()
    for node in sorted(nodes):
        operation = graph.operation(node)
        if operation.kind is Kind.RESULT:
            continue
        places = graph.places(node)
        result.largest = max(result.largest, length(graph, node) * widest(graph, node))
        result.window = max(result.window, len(places) + (operation.kind is not Kind.COPY) * len(graph.results(node)))
        alignment = alignment_of(graph, node)
        if graph.access_numbers(node):
            staged = max(staged_bytes(graph, node, place, alignment) for place in places)
            _grow(result, staged, node)
        if operation.kernel is None:
            continue
        result.computes = True
        result.reduces |= operation.kernel.reductions > 0
        elements = length(graph, node)
        _grow(result, max(alignment * widest(graph, node), most_made(graph, node, alignment)), node)
        tile = min(tile_length(graph, node, tile_elements), elements)
        workspace = operation.kernel.workspace(tile, work_bytes(graph, node)) if separate else 0
        measured = graph.footprints.get(graph.node_class[node])
        if measured is not None:
            workspace = max(workspace, measured.workspace.at(tile))
            result.allocated = max(result.allocated, _page_aligned(measured.allocated.at(tile)))
        if workspace > result.workspace:
            result.workspace = workspace
            result.workspace_node = node
    classes, known = graph.node_class, set[tuple[int, int]]()
    for group in connected(graph):
        alignment = common_alignment(graph, group)
        for node in group:
            if (classes[node], alignment) in known:
                continue
            known.add((classes[node], alignment))
            staged = max(staged_bytes(graph, node, place, alignment) for place in graph.places(node))
            made = most_made(graph, node, alignment)
            _grow(result, max(staged, made, alignment * widest(graph, node)), node)
    result.workspace = _page_aligned(result.workspace)
    return result


def _grow(result: Requirements, nbytes: int, node: int) -> None:
    """Require slots that hold a number of bytes."""
    if nbytes > result.slot:
        result.slot = _page_aligned(nbytes)
        result.slot_node = node


def _page_aligned(nbytes: int) -> int:
    return -(-nbytes // PAGE) * PAGE
