"""The schedule step by step, as rows that `plan --steps` prints."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..graph.graph import MergeGraph
from .schedule import Schedule
from .step_list import NOTHING, CachedRange
from .tiling import ChunkedRead, chunked_sources


@dataclass(frozen=True, slots=True)
class SourceBytes:
    """The bytes that a step reads of one input tensor.

    Args:
        tensor: label of the input tensor, ``model: name``, or of an intermediate one.
        nbytes: tensor bytes read from files; 0 if every chunk is cached.
    """

    tensor: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class SourceChunks:
    """Chunks of one input tensor that a step keeps in the cache or drops from it.

    Args:
        tensor: label of the input tensor, ``model: name``.
        chunk_length: elements in a chunk (bytes, if nothing is computed).
        ram: number of chunks in RAM.
        vram: number of chunks on the device.
    """

    tensor: str
    chunk_length: int
    ram: int
    vram: int


@dataclass(frozen=True, slots=True)
class StepRow:
    """One step of a schedule: one pass over the sources of one output tensor.

    Args:
        step: number of the step, from 1.
        tensor: label of the output tensor.
        index: number of the pass, from 1.
        passes: number of passes that the output tensor takes.
        device: name of the device that computes, such as ``cpu`` or ``cuda:0``.
        read: bytes read from files, for each source.
        uploaded: bytes copied to the device.
        kept: chunks of the step's sources that stay cached after it.
        dropped: cached chunks that are freed before the step and read again later.
        ram: slots of RAM held during the step, at most.
        vram: slots held on the device during the step, at most.
    """

    step: int
    tensor: str
    index: int
    passes: int
    device: str
    read: tuple[SourceBytes, ...]
    uploaded: int
    kept: tuple[SourceChunks, ...]
    dropped: tuple[SourceChunks, ...]
    ram: int
    vram: int


def step_rows(graph: MergeGraph, schedule: Schedule) -> Iterator[StepRow]:
    """Yield one row for each step of a schedule, in the order in which the steps are dispatched."""
    cached: dict[ChunkedRead, CachedRange] = {}
    names = graph.node_names()

    def chunks(source: ChunkedRead, ram: int, vram: int) -> SourceChunks:
        return SourceChunks(_label(graph, source.read), source.chunk_length, ram, vram)

    for number, step in enumerate(schedule.steps, 1):
        dropped = []
        for source, stays in step.drop:
            before = cached.pop(source, NOTHING)
            dropped.append(chunks(source, before.ram - stays.ram, before.vram - stays.vram))
            cached[source] = stays
        sources = chunked_sources(graph, step.node, schedule.chunk_elements[step.node], schedule.slot_bytes)
        kept = []
        for source, held in zip(sources, step.keep, strict=True):
            cached[source] = held
            if held.ram or held.vram:
                kept.append(chunks(source, held.ram, held.vram))
        yield StepRow(
            step=number,
            tensor=names[step.node],
            index=step.index + 1,
            passes=graph.operation(step.node).passes,
            device=schedule.budget.devices[step.device].name,
            read=tuple(
                SourceBytes(_label(graph, source.read), nbytes)
                for source, nbytes in zip(sources, step.bytes_read, strict=True)
            ),
            uploaded=step.uploaded,
            kept=tuple(kept),
            dropped=tuple(dropped),
            ram=step.ram,
            vram=step.vram,
        )


def _label(graph: MergeGraph, read: int) -> str:
    if read < 0:
        return f"{graph.operation(~read).method} (intermediate)"
    return f"{graph.models[graph.read_models[read]]}: {graph.read_names[read]}"
