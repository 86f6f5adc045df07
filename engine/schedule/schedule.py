"""The schedule: the order of the nodes, their chunks, and which chunks stay cached until when.

Pure: no torch, no files, no clock. `plan` prints what `make_schedule` returns, and `merge` executes it.

A step is one pass of one node over its sources, chunk by chunk. The sizes of slots, chunks and tiles follow from the
budget. Several orders of the nodes are simulated, and the best one is kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, field, replace

from ...errors import BudgetError
from ...io.sizes import format_size
from ...methods.kernel.access import TransposedSlice
from ..graph.extents import length
from ..graph.graph import MergeGraph
from .budget import Budget
from .candidate import Candidate, Problem, plan_for_slot
from .requirements import SMALLEST_SLOT
from .step_list import StepList
from .tiling import chunk_count

SLOT_BYTES = 4 << 20
"""Preferred size of a slot."""
COPY_SLOT_BYTES = 1 << 20
"""Preferred size of a slot if nothing is computed."""
DEVICE_SLOT_BYTES = 32 << 20
"""Preferred size of a slot for a device with its own memory, where a chunk is one copy over the bus."""
TURNED_SLOT_BYTES = 64 << 20
"""Preferred size of a slot if matrices are transposed, so the range that a chunk reads of each stored row is long."""
WORTH = 0.95
"""Smaller slots are chosen if they reduce the bytes read at least to this share: each chunk costs time, too."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """The steps of a merge, and the bytes that it holds, reads and writes.

    Args:
        steps: the steps, in the order in which they are dispatched.
        chunk_elements: for each node, the elements in a chunk (bytes, if nothing is computed).
        slot_bytes: size of a slot in bytes, in RAM and on every device.
        ram_slots: number of slots in RAM.
        vram_slots: number of slots on each device; 0 if it computes in RAM.
        workspace: size of a compute thread's workspace in bytes, for each device.
        tile_elements: preferred number of elements in a compute tile, for each device.
        budget: the budget that the schedule fits.
        bytes_read: tensor bytes read from files, re-reads included.
        bytes_reread: tensor bytes that are re-reads.
        bytes_written: tensor bytes written.
        uploaded: bytes copied to the devices.
        serial_ram: peak RAM of the slots in bytes if the steps run one chunk after another.
        partials: RAM set aside for the partial results of reductions in bytes.
        fixed_ram: RAM held all the time in bytes: the program, and the memory of compute threads.
        peak_ram: bound of the process's resident memory in bytes: baseline, arena and workspaces.
        peak_vram: peak memory of the device that holds most in bytes.
        minimum_ram: smallest RAM budget that works, in bytes.
        minimum_ram_node: node that requires it, or None.
        minimum_vram: smallest VRAM budget that works, in bytes; 0 if no device has its own memory.
        again: nodes whose output an earlier run has written, computed again for others that use it.
    """

    steps: StepList = field(repr=False)
    chunk_elements: list[int] = field(repr=False)
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
    partials: int
    fixed_ram: int
    peak_ram: int
    peak_vram: int
    minimum_ram: int
    minimum_ram_node: int | None
    minimum_vram: int
    again: Set[int] = frozenset()

    @property
    def buffer_ram(self) -> int:
        """RAM of the engine's buffers in bytes: the arena, the workspaces and the partial results."""
        workspaces = sum(
            device.threads * workspace
            for device, workspace in zip(self.budget.devices, self.workspace, strict=True)
            if not device.separate
        )
        return self.ram_slots * self.slot_bytes + workspaces + self.partials

    def buffer_vram(self, device: int) -> int:
        """Return the bytes of the engine's buffers in a device's own memory: its arena and its workspaces."""
        threads = self.budget.devices[device].threads
        return self.vram_slots[device] * self.slot_bytes + threads * self.workspace[device]

    def span(self, graph: MergeGraph, node: int, chunk: int) -> tuple[int, int]:
        """Return the first element of a chunk and the number of its elements (bytes, if nothing is computed)."""
        elements = self.chunk_elements[node]
        start = chunk * elements
        return start, min(elements, length(graph, node) - start)

    def chunks(self, graph: MergeGraph, node: int) -> int:
        """Return the number of chunks of a node's tensors; 0 for a tensor without elements."""
        return chunk_count(graph, node, self.chunk_elements[node])

    @classmethod
    def from_candidate(cls, problem: Problem, candidate: Candidate) -> Schedule:
        """Return the schedule of the best candidate, with no more slots than it can use."""
        budget, needs, simulation = problem.budget, problem.needs, candidate.simulation
        slot, window = candidate.slot, needs[0].window
        depth = 2 + sum(device.threads for device in budget.devices)  # chunks that are read, computed or written
        if any(device.separate for device in budget.devices):
            depth *= 2  # they are also uploaded and downloaded
        ahead = simulation.max_step_working_set + window * depth
        ram_slots = min(candidate.ram_slots, simulation.total_slot_demand, simulation.peak + ahead)
        vram_slots = tuple(
            min(count, simulation.total_slot_demand, peak + ahead) if device.separate else 0
            for count, peak, device in zip(candidate.vram_slots, simulation.vram_peaks, budget.devices, strict=True)
        )
        schedule = cls(
            steps=simulation.steps,
            chunk_elements=candidate.chunks,
            slot_bytes=slot,
            ram_slots=ram_slots,
            vram_slots=vram_slots,
            workspace=tuple(need.workspace for need in needs),
            tile_elements=tuple(device.tile_elements for device in budget.devices),
            budget=budget,
            bytes_read=simulation.bytes_read,
            bytes_reread=max(0, simulation.bytes_read - candidate.unique_bytes(problem.graph)),
            bytes_written=candidate.bytes_written(problem.graph),
            uploaded=simulation.uploaded,
            serial_ram=simulation.peak * slot,
            partials=problem.partials,
            fixed_ram=problem.fixed_ram,
            peak_ram=max(problem.fixed_ram + ram_slots * slot, budget.held),
            peak_vram=0,
            minimum_ram=problem.minimum_ram,
            minimum_ram_node=needs[0].node,
            minimum_vram=problem.minimum_vram,
            again=problem.again,
        )
        separate = [number for number, device in enumerate(budget.devices) if device.separate]
        return replace(schedule, peak_vram=max((schedule.buffer_vram(number) for number in separate), default=0))


def make_schedule(
    graph: MergeGraph, budget: Budget, *, slot_bytes: int | None = None, done: Mapping[int, int] | None = None
) -> Schedule:
    """Schedule a graph within a budget.

    Args:
        graph: graph to schedule.
        budget: limits of the schedule.
        slot_bytes: size of a slot in bytes; chosen from the budget if None.
        done: for each node that an earlier run has started or finished, the bytes that it wrote.

    Raises:
        BudgetError: if the budget is too small, with the smallest one that works and the tensor that requires it.
    """
    problem = Problem.of(graph, budget, done or {})
    _refuse_too_small(problem)
    need = problem.needs[0]
    if any(device.separate for device in budget.devices):
        preferred = DEVICE_SLOT_BYTES
    elif any(isinstance(each, TransposedSlice) for operation in graph.operations for each in operation.accesses):
        preferred = TURNED_SLOT_BYTES
    else:
        preferred = SLOT_BYTES if need.computes else COPY_SLOT_BYTES
    slot = slot_bytes or _choose_slot(problem, preferred)
    smallest = slot if slot_bytes else max(need.slot, min(slot, preferred // 4))
    best = plan_for_slot(problem, slot)
    while not best.simulation.fits and slot // 2 >= smallest:  # smaller slots hold the outputs that others use tighter
        slot //= 2
        best = plan_for_slot(problem, slot)
    if not best.simulation.fits:
        raise _too_small_for_outputs(problem, best)
    unique, bytes_read = best.unique_bytes(graph), best.simulation.bytes_read
    # smaller slots keep fewer bytes in flight, which leaves more room for what would be read again
    while bytes_read > unique and slot // 2 >= smallest:
        slot //= 2
        candidate = plan_for_slot(problem, slot)
        bytes_read = candidate.simulation.bytes_read
        if candidate.simulation.fits and bytes_read < WORTH * best.simulation.bytes_read:
            best = candidate
        del candidate  # its steps would take memory while the next ones are simulated
    return Schedule.from_candidate(problem, best)


def _refuse_too_small(problem: Problem) -> None:
    graph, budget, node = problem.graph, problem.budget, problem.needs[0].node
    if node is None and len(graph.node_sources):
        node = max(graph.class_nodes, key=lambda n: len(graph.node_sources[n]))
    reason = "" if node is None else f", required by {graph.label(node)}"
    minimum_ram, minimum_vram = problem.minimum_ram, problem.minimum_vram
    if budget.ram < minimum_ram:
        raise BudgetError(
            f"the merge does not fit {format_size(budget.ram)} of RAM: the smallest budget that works is "
            f"{format_size(minimum_ram, up=True)}{reason} ({format_size(budget.baseline)} for the program "
            f"itself); use --max-ram {format_size(minimum_ram, up=True)} or more"
        )
    for device in budget.devices:
        if device.vram is not None and device.vram < minimum_vram:
            raise BudgetError(
                f"the merge does not fit {format_size(device.vram)} on {device.name}: the smallest budget that works "
                f"is {format_size(minimum_vram, up=True)}{reason}; use --max-vram "
                f"{format_size(minimum_vram, up=True)} or more, or --device cpu"
            )


def _too_small_for_outputs(problem: Problem, candidate: Candidate) -> BudgetError:
    """Return the error for RAM that cannot hold the outputs that other nodes use."""
    needed = problem.fixed_ram + candidate.simulation.peak * candidate.slot
    return BudgetError(
        f"the merge does not fit {format_size(problem.budget.ram)} of RAM: intermediate tensors stay in RAM, which "
        f"takes {format_size(needed, up=True)}; use --max-ram {format_size(needed, up=True)} or more"
    )


def _choose_slot(problem: Problem, preferred: int) -> int:
    """Return the largest slot size, up to the preferred one, that leaves slots to read ahead for every thread."""
    need = problem.needs[0]
    depth = 2 + sum(device.threads for device in problem.budget.devices)
    ram, devices = problem.slot_memory()
    room = min([ram, *(nbytes for nbytes in devices if nbytes is not None)])
    slot = max(SMALLEST_SLOT, 1 << max(0, need.largest - 1).bit_length())
    slot = min(preferred, slot)
    while slot > need.slot and room // slot < need.window * depth:
        slot //= 2
    return max(slot, need.slot)
