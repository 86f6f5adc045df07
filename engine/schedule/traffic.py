"""Byte counts of a schedule: reads and re-reads of each input and their reasons, downloads, and the peak step."""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ...io.units import memory_size, plural
from ..graph.extents import bytes_before
from ..graph.graph import Kind, MergeGraph
from .schedule import Schedule

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


@dataclass(frozen=True, slots=True)
class Peak:
    """The step with the peak use of a memory.

    Args:
        step: number of the step, from 1.
        tensor: name of the output tensor.
        index: number of the pass, from 1.
        passes: number of passes.
        nbytes: size of the buffers that the step holds in bytes, cached inputs included, read-ahead excluded.
    """

    step: int
    tensor: str
    index: int
    passes: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class ReadAgain:
    """Input tensors of one pattern of names that are read more than once.

    Args:
        pattern: names of the tensors, with * for the numbers in which they differ.
        tensors: number of tensors.
        nbytes: total size of the tensors in bytes.
        read: bytes that are read, re-reads included.
        reason: reason for the re-reads, in words.
        limited_by_budget: whether more memory can save re-reads.
    """

    pattern: str
    tensors: int
    nbytes: int
    read: int
    reason: str
    limited_by_budget: bool

    @property
    def times(self) -> float:
        """Average number of reads of each byte."""
        return self.read / self.nbytes


def fixed_ram(schedule: Schedule) -> int:
    """Return the RAM held all the time in bytes: the program and the workspaces."""
    return schedule.fixed_ram


def peak_of(graph: MergeGraph, schedule: Schedule, *, vram: bool = False) -> Peak | None:
    """Return the first step with the peak use of RAM, or of VRAM; None if no step uses any."""
    slots = schedule.steps.vram if vram else schedule.steps.ram
    best = slots.first_highest()
    if best < 0:
        return None
    step = schedule.steps[best]
    tensor = graph.label(step.node)
    passes = graph.operation(step.node).passes
    return Peak(best + 1, tensor, step.index + 1, passes, slots[best] * schedule.slot_bytes)


def downloaded(graph: MergeGraph, schedule: Schedule) -> int:
    """Return the bytes copied back from the GPUs: those of every tensor that a GPU computes."""
    separate = [device.vram is not None for device in schedule.budget.devices]
    total = 0
    for step in schedule.steps if any(separate) else ():
        operation = graph.operation(step.node)
        if operation.kind is Kind.MERGE and step.index == operation.passes - 1 and separate[step.device]:
            first = step.first * schedule.chunk_elements[step.node]
            for result in graph.results(step.node):
                total += graph.nbytes(result) - bytes_before(graph, result, first)
    return total


def bytes_of_reads(graph: MergeGraph, schedule: Schedule) -> Sequence[int]:
    """Return the bytes read of each input tensor, by read number; their sum is `Schedule.bytes_read`."""
    totals = array("Q", bytes(8 * len(graph.reads)))
    nodes, counts = schedule.steps.bytes_read()
    for value, count in zip(_distinct_sources(graph, nodes), counts, strict=True):
        if count:
            totals[value] += count
    return totals


def _distinct_sources(graph: MergeGraph, nodes: Sequence[int]) -> Iterator[int]:
    """Return the distinct sources of some nodes, one node after another."""
    repeating = {number for number, node in enumerate(graph.class_nodes) if _repeats(graph, node)}
    classes = graph.node_class
    for node, sources in zip(nodes, graph.node_sources.of(nodes), strict=True):
        if repeating and classes[node] in repeating:
            yield from [sources[place] for place in graph.places(node)]
        else:
            yield from sources


def _repeats(graph: MergeGraph, node: int) -> bool:
    return len(graph.places(node)) < len(graph.node_sources[node])


def bytes_of_models(graph: MergeGraph, read: Sequence[int]) -> list[tuple[int, int]]:
    """Return, for each model, the bytes of its tensors that are used and the bytes that the read lane reads."""
    used, total = [0] * len(graph.models), [0] * len(graph.models)
    sizes = [each.nbytes for each in graph.reads.classes]
    for number, kind, nbytes in zip(graph.read_models, graph.reads.class_numbers, read, strict=True):
        used[number] += sizes[kind]
        total[number] += nbytes
    return list(zip(used, total, strict=True))


def read_again(graph: MergeGraph, schedule: Schedule, read: Sequence[int]) -> list[ReadAgain]:
    """Return the input tensors that are read more than once, with the reason; most re-read bytes first."""
    if not schedule.bytes_reread:
        return []
    passes = [0] * len(graph.reads)
    users = [0] * len(graph.reads)
    method = [""] * len(graph.reads)
    for node, sources in enumerate(graph.node_sources):
        operation = graph.operation(node)
        for source in {value for value in sources if value >= 0}:
            passes[source] = max(passes[source], operation.passes)
            users[source] += 1
            method[source] = operation.method
    room = memory_size(schedule.ram_slots * schedule.slot_bytes)
    if any(schedule.vram_slots):
        room += f" of RAM and {memory_size(max(schedule.vram_slots) * schedule.slot_bytes)} of VRAM"
    groups: dict[tuple[str, str, bool], list[int]] = {}
    for number, nbytes in enumerate(read):
        if nbytes <= graph.reads[number].nbytes:
            continue
        limited = passes[number] > 1 or users[number] > 1
        if passes[number] > 1:
            times = "twice" if passes[number] == 2 else f"{passes[number]} times"
            reason = f"{method[number]} goes through them {times}, and the buffers hold {room}"
        elif limited:
            reason = f"each is needed by {plural(users[number], 'output tensor')}, and the buffers hold {room}"
        else:  # the rows of an embedding, for several models of one merge
            reason = "parts of each are used in several places of one output tensor"
        groups.setdefault((pattern_of(graph.read_names[number]), reason, limited), []).append(number)
    result = [
        ReadAgain(
            pattern,
            tensors=len(numbers),
            nbytes=sum(graph.reads[number].nbytes for number in numbers),
            read=sum(read[number] for number in numbers),
            reason=reason,
            limited_by_budget=limited,
        )
        for (pattern, reason, limited), numbers in groups.items()
    ]
    return sorted(result, key=lambda group: group.nbytes - group.read)


def pattern_of(name: str) -> str:
    """Return a tensor's name with * for its numbers, such as ``model.layers.*.mlp.up_proj.weight``."""
    return _NUMBER.sub("*", name)
