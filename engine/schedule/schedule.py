"""The schedule: in which order the nodes run, in what pieces, and what stays cached until when. A simulation in bytes.

Pure: no torch, no files, no clock. `plan` prints what `make_schedule` returns and `merge` performs it.

A step is one pass of one node over its sources, chunk by chunk. Slot, chunk and tile follow from the budget; the order
of the nodes is the best of a few that are simulated.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace

from ...errors import BudgetError
from ...io.sizes import format_size
from ..graph.graph import Kind, MergeGraph
from .simulate import Simulation, Step, orders
from .tiling import chunk_count, chunk_elements, clusters, length, output_width, tile_length, widest, work_bytes

PAGE = 4096
TILE_ELEMENTS = 1 << 19
"""Elements of a tile on the CPU: its workspace stays in a core's cache."""
DEVICE_TILE_ELEMENTS = 1 << 22
"""Elements of a tile on a device with its own memory."""
SLOT_BYTES = 4 << 20
"""The size of a slot where the budget allows it."""
COPY_SLOT_BYTES = 1 << 20
"""The same where nothing is computed."""
DEVICE_SLOT_BYTES = 32 << 20
"""The same for a device with its own memory, where a chunk is one copy over the bus."""
SMALLEST_SLOT = 64 << 10
WORTH = 0.95
"""Smaller slots are taken where they leave no more than this share of what is read: each piece costs time, too."""
PARTIAL_BYTES = 8 << 20
"""Set aside for each compute thread, for the partial results of reductions."""


@dataclass(frozen=True, slots=True)
class DeviceBudget:
    """A device that computes.

    Args:
        name: such as ``cpu`` or ``cuda:0``.
        vram: how many bytes may be held on it, or None where it computes in host memory.
        threads: compute threads, each with a workspace.
    """

    name: str
    vram: int | None
    threads: int


@dataclass(frozen=True, slots=True)
class Budget:
    """What a schedule has to fit.

    Args:
        ram: the bound on the process's resident memory, in bytes.
        baseline: what the process takes without the engine's buffers, in bytes.
        devices: the devices that compute, at least one.
        held: the most that the process has held so far, in bytes; 0 in a larger program, whose memory it is.
    """

    ram: int
    baseline: int
    devices: tuple[DeviceBudget, ...]
    held: int = 0


@dataclass(frozen=True, slots=True)
class Schedule:
    """What a merge does, step by step, and what it holds, reads and writes.

    Args:
        steps: in the order in which they are dispatched.
        chunk_elements: for each node, the elements in a chunk (bytes, where nothing is computed).
        slot_bytes: the size of a slot, in RAM and on every device.
        ram_slots: slots of the arena in RAM.
        vram_slots: slots of the arena on each device.
        workspace: bytes of workspace of each compute thread, by device.
        tile_elements: the aim for the elements of a compute tile, by device.
        budget: what it was made for.
        bytes_read: tensor bytes read from files, re-reads included.
        bytes_reread: the part of them that had been read before.
        bytes_written: tensor bytes written.
        serial_ram: the most RAM that slots take when the steps run one chunk after another, in bytes.
        fixed_ram: bytes of RAM that are held all the time: the program, and what compute threads need.
        peak_ram: the bound on the process's resident memory, in bytes: baseline, arena and workspaces.
        peak_vram: what is held on the devices, in bytes, the largest of them.
        minimum_ram: the smallest RAM budget that works, in bytes, and the node that needs it.
        minimum_vram: the smallest VRAM budget that works, in bytes; 0 where no device has its own memory.
    """

    steps: list[Step]
    chunk_elements: list[int]
    slot_bytes: int
    ram_slots: int
    vram_slots: tuple[int, ...]
    workspace: tuple[int, ...]
    tile_elements: tuple[int, ...]
    budget: Budget
    bytes_read: int
    bytes_reread: int
    bytes_written: int
    uploaded: int
    serial_ram: int
    fixed_ram: int
    peak_ram: int
    peak_vram: int
    minimum_ram: int
    minimum_ram_node: int | None
    minimum_vram: int

    def span(self, graph: MergeGraph, node: int, chunk: int) -> tuple[int, int]:
        """The first element of a chunk and how many it has (bytes, where nothing is computed)."""
        elements = self.chunk_elements[node]
        start = chunk * elements
        return start, min(elements, length(graph, node) - start)

    def chunks(self, graph: MergeGraph, node: int) -> int:
        """How many chunks a node's tensors have; 0 for a tensor without elements."""
        return chunk_count(graph, node, self.chunk_elements[node])


@dataclass(slots=True)
class _Need:
    """The least that any schedule of a graph takes."""

    slot: int = SMALLEST_SLOT
    slot_node: int | None = None
    largest: int = 0  # bytes of the widest tensor of a node
    window: int = 1
    workspace: int = 0
    workspace_node: int | None = None
    allocated: int = 0  # bytes of a compute thread besides its workspace


def make_schedule(
    graph: MergeGraph, budget: Budget, *, slot_bytes: int | None = None, done: Mapping[int, int] | None = None
) -> Schedule:
    """The schedule of a graph within a budget.

    Args:
        graph: what to make.
        budget: what to fit.
        slot_bytes: the size of a slot; found from the budget where it isn't given.
        done: nodes that an earlier run has begun or finished, with the bytes that need not be written again.

    Raises:
        BudgetError: where the budget is too small, with the smallest that works and the tensor that needs it.
    """
    aims = tuple(TILE_ELEMENTS if device.vram is None else DEVICE_TILE_ELEMENTS for device in budget.devices)
    finished = {node for node, nbytes in (done or {}).items() if nbytes >= graph.nbytes(node)}
    needs = [_needs(graph, aim, finished) for aim in aims]
    separate = [device.vram is not None for device in budget.devices]
    need = needs[0]
    host_workspace = sum(
        device.threads * (_needs_workspace(need_) + need_.allocated + PARTIAL_BYTES)
        for device, need_, own in zip(budget.devices, needs, separate, strict=True)
        if not own and need_.workspace
    )
    fixed = budget.baseline + host_workspace
    minimum_ram = max(fixed + need.window * need.slot, budget.held)
    minimum_vram = max(
        (
            need_.window * need_.slot + device.threads * _needs_workspace(need_)
            for device, need_, own in zip(budget.devices, needs, separate, strict=True)
            if own
        ),
        default=0,
    )
    _refuse_too_small(graph, budget, need, minimum_ram, minimum_vram)
    room = budget.ram - fixed
    rooms = [
        device.vram - device.threads * _needs_workspace(need_)
        for device, need_ in zip(budget.devices, needs, strict=True)
        if device.vram is not None
    ]
    preferred = DEVICE_SLOT_BYTES if any(separate) else SLOT_BYTES if need.workspace else COPY_SLOT_BYTES
    devices = _assign_devices(graph, len(budget.devices))
    slot = slot_bytes or _choose_slot(need, [room, *rooms], budget, preferred)
    smallest = slot if slot_bytes else max(need.slot, min(slot, preferred // 4))
    chosen = attempt = _Attempt(graph, slot, room, rooms, separate, devices, need.window, done or {})
    left = attempt.left
    unique = sum(graph.reads[read].nbytes for read in {r for node in left for r in graph.node_sources[node]})
    # what doesn't stay is read again: smaller slots leave more room for it, since fewer bytes are on their way
    while attempt.best.bytes_read > unique and attempt.slot // 2 >= smallest:
        attempt = _Attempt(graph, attempt.slot // 2, room, rooms, separate, devices, need.window, done or {})
        if attempt.best.bytes_read < WORTH * chosen.best.bytes_read:
            chosen = attempt
    best, slot, chunks, first = chosen.best, chosen.slot, chosen.chunks, chosen.first
    lookahead = 4 + 2 * sum(device.threads for device in budget.devices)
    used_slots = min(chosen.ram_slots, best.demand, best.peak + best.resident + lookahead * need.window)
    used_vram = tuple(
        min(count, best.demand, peak + best.resident + lookahead * need.window) if own else 0
        for count, peak, own in zip(chosen.device_slots, best.vram_peaks, separate, strict=True)
    )
    vram_held = [
        count * slot + device.threads * _needs_workspace(need_)
        for count, device, need_, own in zip(used_vram, budget.devices, needs, separate, strict=True)
        if own
    ]
    written = sum(graph.nbytes(output.node) for output in graph.outputs if output.node in left)
    written -= sum(
        min(first[output.node] * chunks[output.node] * output_width(graph, output.node), graph.nbytes(output.node))
        for output in graph.outputs
        if output.node in left and output.node in first
    )
    return Schedule(
        steps=best.steps,
        chunk_elements=chunks,
        slot_bytes=slot,
        ram_slots=used_slots,
        vram_slots=used_vram,
        workspace=tuple(_needs_workspace(need_) for need_ in needs),
        tile_elements=aims,
        budget=budget,
        bytes_read=best.bytes_read,
        bytes_reread=max(0, best.bytes_read - unique),
        bytes_written=written,
        uploaded=best.uploaded,
        serial_ram=best.peak * slot,
        fixed_ram=fixed,
        peak_ram=max(fixed + used_slots * slot, budget.held),
        peak_vram=max(vram_held, default=0),
        minimum_ram=minimum_ram,
        minimum_ram_node=need.slot_node if need.slot_node is not None else need.workspace_node,
        minimum_vram=minimum_vram,
    )


class _Attempt:
    """The best order for one size of slot.

    Args:
        graph: what to make.
        slot: its bytes.
        room: bytes for slots in RAM.
        rooms: the same on each device with its own memory.
        separate: which devices have one.
        devices: of each node.
        window: slots that a step takes at least.
        done: as for `make_schedule`.
    """

    def __init__(
        self,
        graph: MergeGraph,
        slot: int,
        room: int,
        rooms: Sequence[int],
        separate: Sequence[bool],
        devices: list[int],
        window: int,
        done: Mapping[int, int],
    ) -> None:
        self.slot = slot
        self.chunks = chunk_elements(graph, slot)
        self.ram_slots = room // slot
        sizes = iter(rooms)
        self.device_slots = tuple(next(sizes) // slot if own else 0 for own in separate)
        self.first = _first_chunks(graph, self.chunks, done)
        self.left = {n for n in graph if self.first.get(n, 0) < max(1, chunk_count(graph, n, self.chunks[n]))}
        tried = []
        for order in orders(graph):
            simulation = Simulation(graph, self.chunks, self.ram_slots, self.device_slots, devices, window, self.first)
            simulation.run([node for node in order if node in self.left] if done else order)
            tried.append(simulation)
        self.best = min(tried, key=lambda simulation: (simulation.bytes_read, simulation.peak))


def _first_chunks(graph: MergeGraph, chunks: Sequence[int], done: Mapping[int, int]) -> dict[int, int]:
    """The first chunk that each begun node still has to write. Nodes that share sources are finished or begun anew."""
    shared = {node for cluster in clusters(graph) for node in cluster} if done else set()
    first = {}
    for node, nbytes in done.items():
        count = max(1, chunk_count(graph, node, chunks[node]))
        if nbytes >= graph.nbytes(node):
            first[node] = count
        elif node not in shared:
            first[node] = nbytes // (chunks[node] * output_width(graph, node))
    return {node: chunk for node, chunk in first.items() if chunk}


def _needs_workspace(need: _Need) -> int:
    return -(-need.workspace // PAGE) * PAGE


def _needs(graph: MergeGraph, aim: int, finished: Container[int]) -> _Need:
    """The smallest slot, window and workspace that every node that is left fits."""
    need = _Need()
    for node in graph:
        if node in finished:
            continue
        operation = graph.operation(node)
        sources = len(set(graph.node_sources[node]))
        need.largest = max(need.largest, length(graph, node) * widest(graph, node))
        need.window = max(need.window, sources + (operation.kind is not Kind.COPY))
        if operation.kernel is None:
            continue
        elements = length(graph, node)
        alignment = min(operation.kernel.alignment, elements) * widest(graph, node)
        if alignment > need.slot:
            need.slot = -(-alignment // PAGE) * PAGE
            need.slot_node = node
        tile = min(tile_length(graph, node, aim), elements)
        workspace = operation.kernel.workspace(tile, work_bytes(graph, node))
        measured = graph.footprints.get(node)
        if measured is not None:
            workspace = max(workspace, measured.workspace.at(tile))
            need.allocated = max(need.allocated, -(-measured.allocated.at(tile) // PAGE) * PAGE)
        if workspace > need.workspace:
            need.workspace = workspace
            need.workspace_node = node
    return need


def _refuse_too_small(graph: MergeGraph, budget: Budget, need: _Need, minimum_ram: int, minimum_vram: int) -> None:
    node = need.slot_node if need.slot_node is not None else need.workspace_node
    if node is None and len(graph.node_sources):
        node = max(graph, key=lambda n: len(graph.node_sources[n]))
    reason = "" if node is None else f", which {graph.label(node)} needs"
    if budget.ram < minimum_ram:
        raise BudgetError(
            f"the merge does not fit {format_size(budget.ram)} of RAM: the smallest budget that works is "
            f"{format_size(minimum_ram, up=True)}{reason} ({format_size(budget.baseline)} of it for the program "
            f"itself); give --max-ram {format_size(minimum_ram, up=True)} or more"
        )
    for device in budget.devices:
        if device.vram is not None and device.vram < minimum_vram:
            raise BudgetError(
                f"the merge does not fit {format_size(device.vram)} on {device.name}: the smallest budget that works "
                f"is {format_size(minimum_vram, up=True)}{reason}; give --max-vram "
                f"{format_size(minimum_vram, up=True)} or more, or --device cpu"
            )


def _choose_slot(need: _Need, rooms: Sequence[int], budget: Budget, preferred: int) -> int:
    """The largest slot, up to the preferred one, that leaves every thread something to work on while others read."""
    depth = 2 + sum(device.threads for device in budget.devices)
    slot = max(SMALLEST_SLOT, 1 << max(0, need.largest - 1).bit_length())
    slot = min(preferred, slot)
    while slot > need.slot and min(rooms) // slot < need.window * depth:
        slot //= 2
    return max(slot, need.slot)


def _assign_devices(graph: MergeGraph, count: int) -> list[int]:
    """The device of each node, balanced by bytes; nodes that share sources go to one device."""
    if count == 1:
        return [0] * len(graph.node_sources)
    together = {node: cluster[0] for cluster in clusters(graph) for node in cluster}
    load = [0] * count
    homes: dict[int, int] = {}
    devices = []
    for node in graph:
        group = together.get(node, node)
        home = homes.setdefault(group, load.index(min(load)))
        load[home] += graph.nbytes(node) + sum(graph.reads[read].nbytes for read in graph.node_sources[node])
        devices.append(home)
    return devices


def shrink(budget: Budget, device: str, vram: int) -> Budget:
    """The budget with less memory on one device."""
    devices = tuple(replace(each, vram=vram) if each.name == device else each for each in budget.devices)
    return replace(budget, devices=devices)
