"""Candidates for a schedule: the best order of the nodes for one slot size, and what a graph requires of a budget."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass

from ...methods.kernel.access import ALIGNED
from ..graph.extents import bytes_before, bytes_of_chunks, output_width
from ..graph.graph import MergeGraph
from .assignment import assign_devices
from .budget import Budget, DeviceBudget
from .order import orders
from .requirements import Requirements, requirements
from .simulate import Simulation
from .tiling import chunk_count, chunk_elements, clusters

PARTIAL_BYTES = 8 << 20
"""RAM set aside for each compute thread, for the partial results of reductions."""


@dataclass(frozen=True, slots=True)
class Problem:
    """A graph to schedule within a budget, and the minimum that it requires.

    Args:
        graph: graph to schedule.
        budget: limits of the schedule.
        done: for each node that an earlier run has started or finished, the bytes that it wrote.
        again: nodes that an earlier run has finished, computed again for others that use them.
        needs: requirements of the graph on each device.
        devices: number of the device of each node.
    """

    graph: MergeGraph
    budget: Budget
    done: Mapping[int, int]
    again: Set[int]
    needs: tuple[Requirements, ...]
    devices: list[int]

    @classmethod
    def of(cls, graph: MergeGraph, budget: Budget, done: Mapping[int, int]) -> Problem:
        """Return the problem, with the requirements of the nodes that are left."""
        finished = {
            node for node in done if all(done.get(each, 0) >= graph.nbytes(each) for each in graph.results(node))
        }
        again = _computed_again(graph, finished)
        needs = tuple(
            requirements(graph, device.tile_elements, finished - again, separate=device.separate)
            for device in budget.devices
        )
        return cls(graph, budget, done, again, needs, assign_devices(graph, len(budget.devices)))

    @property
    def partials(self) -> int:
        """RAM for the partial results of reductions, in bytes."""
        return sum(device.threads * PARTIAL_BYTES for device, need in self._in_ram() if need.reduces)

    @property
    def fixed_ram(self) -> int:
        """RAM held all the time in bytes: the program, and the memory of compute threads."""
        threads = sum(device.threads * (need.workspace + need.allocated) for device, need in self._in_ram())
        return self.budget.baseline + threads + self.partials

    @property
    def minimum_ram(self) -> int:
        """Smallest RAM budget that works, in bytes."""
        return max(self.fixed_ram + self.needs[0].window * self.needs[0].slot, self.budget.held)

    @property
    def minimum_vram(self) -> int:
        """Smallest VRAM budget that works on every device with its own memory, in bytes."""
        separate = [pair for pair in zip(self.budget.devices, self.needs, strict=True) if pair[0].separate]
        return max((need.window * need.slot + device.threads * need.workspace for device, need in separate), default=0)

    def slot_memory(self) -> tuple[int, list[int | None]]:
        """Return the bytes for slots in RAM and on each device; None for a device that computes in RAM."""
        devices = [
            None if device.vram is None else device.vram - device.threads * need.workspace
            for device, need in zip(self.budget.devices, self.needs, strict=True)
        ]
        return self.budget.ram - self.fixed_ram, devices

    def _in_ram(self) -> list[tuple[DeviceBudget, Requirements]]:
        """Return the devices whose compute threads take RAM, with their requirements."""
        pairs = zip(self.budget.devices, self.needs, strict=True)
        return [(device, need) for device, need in pairs if not device.separate and need.computes]


@dataclass(frozen=True, slots=True)
class Candidate:
    """The best order of the nodes for one slot size.

    Args:
        slot: size of a slot in bytes.
        chunks: for each node, the elements in a chunk.
        ram_slots: number of slots that fit RAM.
        vram_slots: number of slots that fit each device's own memory.
        first: first chunk to write of each node that an earlier run has started.
        left: nodes that still have chunks to write, or are computed again.
        simulation: simulation of the order.
    """

    slot: int
    chunks: list[int]
    ram_slots: int
    vram_slots: tuple[int, ...]
    first: dict[int, int]
    left: Set[int] | Sequence[int]
    simulation: Simulation

    def unique_bytes(self, graph: MergeGraph) -> int:
        """Return the bytes of all tensors that must be read at least once."""
        if len(self.left) == len(graph.node_operation) and not any(each.accesses for each in graph.operations):
            sizes = [each.nbytes for each in graph.reads.classes]
            return sum(map(sizes.__getitem__, graph.reads.class_numbers))  # every read has a node that uses it
        if graph.shares_reads or graph.users():
            return self._needed(graph, self.left)
        return graph.total(lambda node: self._needed(graph, (node,)), self.left)

    def _needed(self, graph: MergeGraph, nodes: Iterable[int]) -> int:
        """Return the bytes that some nodes need of all their reads, each counted once."""
        needed: dict[int, dict[int, int]] = {}  # for each read, the bytes that each access to it needs
        for node in nodes:
            accesses = graph.access_numbers(node)
            for place, value in enumerate(graph.node_sources[node]):
                if value >= 0:
                    access, nbytes = 0, graph.reads.class_of(value).nbytes
                    if accesses:
                        count = chunk_count(graph, node, self.chunks[node])
                        access = accesses[place]
                        nbytes = min(nbytes, bytes_of_chunks(graph, node, place, self.chunks[node], 0, count))
                    of_read = needed.setdefault(value, {})
                    of_read[access] = max(of_read.get(access, 0), nbytes)
        return sum(min(graph.reads.class_of(read).nbytes, sum(each.values())) for read, each in needed.items())

    def bytes_written(self, graph: MergeGraph) -> int:
        """Return the bytes of all output tensors without those that an earlier run wrote."""
        if not self.first and len(self.left) == len(graph.tasks()):
            return graph.total(graph.nbytes, graph.outputs.nodes)
        sizes, total = graph.by_class(graph.nbytes), 0
        left = self.left if isinstance(self.left, range) else frozenset(self.left)
        for node in graph.outputs.nodes:
            computing = node if node in left else graph.results_with(node)[0]
            if computing in left:
                total += sizes[node]
                if computing in self.first:
                    total -= bytes_before(graph, node, self.first[computing] * self.chunks[node])
        return total


def plan_for_slot(problem: Problem, slot: int) -> Candidate:
    """Return the best order of the nodes for a slot size, of the orders worth simulating."""
    graph, done = problem.graph, problem.done
    chunks = chunk_elements(graph, slot)
    ram, devices = problem.slot_memory()
    ram_slots = ram // slot
    vram_slots = tuple(0 if nbytes is None else nbytes // slot for nbytes in devices)
    first = _first_chunks(graph, chunks, done)
    left: Set[int] | Sequence[int] = graph.tasks()
    if first or graph.users():
        started = {node for node in left if first.get(node, 0) < max(1, chunk_count(graph, node, chunks[node]))}
        active = started | problem.again
        left = active - _needless(graph, active)
    from_chunk = {node: chunk for node, chunk in first.items() if node not in problem.again}
    window = problem.needs[0].window
    best: Simulation | None = None  # the others are not kept: each has all steps of the merge
    for order in orders(graph):
        simulation = Simulation(graph, chunks, slot, ram_slots, vram_slots, problem.devices, window, from_chunk)
        simulation.run([node for node in order if node in left] if done else order)
        if best is None or _rank(simulation) < _rank(best):
            best = simulation
        if simulation.fits and simulation.bytes_read == simulation.bytes_once:
            break  # no order reads less
    assert best is not None
    return Candidate(slot, chunks, ram_slots, vram_slots, first, left, best)


def _rank(simulation: Simulation) -> tuple[bool, int, int]:
    return not simulation.fits, simulation.bytes_read, simulation.peak


def _first_chunks(graph: MergeGraph, chunks: list[int], done: Mapping[int, int]) -> dict[int, int]:
    """Return the first chunk to write of each started node; nodes that share sources restart unless finished.

    A node that computes several tensors continues where all of them are written.
    """
    shared = {node for cluster in clusters(graph) for node in cluster} if done else set()
    first = {}
    for node in graph.tasks() if done else ():
        results = graph.results(node)
        written = [done.get(result, 0) for result in results]
        if all(nbytes >= graph.nbytes(result) for result, nbytes in zip(results, written, strict=True)):
            first[node] = max(1, chunk_count(graph, node, chunks[node])) * any(result in done for result in results)
        elif node not in shared:
            first[node] = min(
                _chunks_before(graph, result, chunks[node], nbytes)
                for result, nbytes in zip(results, written, strict=True)
            )
    return {node: chunk for node, chunk in first.items() if chunk}


def _chunks_before(graph: MergeGraph, node: int, chunk: int, nbytes: int) -> int:
    """Return the number of chunks that are complete in the first bytes of a tensor."""
    if graph.operation(node).made is ALIGNED:
        return nbytes // (chunk * output_width(graph, node))
    low, high = 0, chunk_count(graph, graph.results_with(node)[0], chunk)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if bytes_before(graph, node, middle * chunk) <= nbytes else (low, middle - 1)
    return low


def _computed_again(graph: MergeGraph, finished: Set[int]) -> set[int]:
    """Return the finished nodes that others use which are not finished: an output is not read back from its file."""
    if not finished or not graph.users():
        return set()
    left = set(graph.tasks()) - finished
    needed = left - _needless(graph, left)
    stack = list(needed)
    while stack:
        for value in graph.node_sources[stack.pop()]:
            if value < 0 and ~value not in needed:
                needed.add(~value)
                stack.append(~value)
    return needed & set(finished)


def _needless(graph: MergeGraph, left: set[int]) -> set[int]:
    """Return the nodes without an output of which every node that uses them is finished."""
    users = graph.users()
    written = {graph.results_with(output.node)[0] for output in graph.outputs} if users else set()
    needless: set[int] = set()
    for node in sorted(users, reverse=True):  # a node has a higher number than those that it uses
        if node not in written and all(user not in left or user in needless for user in users[node]):
            needless.add(node)
    return needless
