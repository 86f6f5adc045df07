"""The memory that a schedule holds over time, as a bounded number of moments and as a sparkline."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from ..graph.graph import Kind, MergeGraph
from .schedule import Schedule
from .traffic import fixed_ram

_BLOCKS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True, slots=True)
class Moment:
    """Some consecutive steps, or a part of a long step.

    Args:
        first: number of the first step, from 1.
        last: number of the last step.
        node: node of the step that holds more RAM than the others.
        index: pass of that step, from 0.
        ram: RAM held during that step in bytes, the program included.
        vram: peak memory held on one GPU in bytes.
    """

    first: int
    last: int
    node: int
    index: int
    ram: int
    vram: int


def timeline(graph: MergeGraph, schedule: Schedule, points: int) -> list[Moment]:
    """Return the memory that the steps hold, as `points` moments that process equally many bytes.

    Chunks that are read ahead are not counted; `Schedule.peak_ram` includes them.
    """
    sizes = graph.by_class(lambda node: _bytes_processed(graph, node, graph.places(node)))
    weights = array("Q", map(sizes.__getitem__, schedule.steps.bytes_read()[0]))
    total = sum(weights)
    if not total:
        return []
    firsts, lasts = [0] * points, [0] * points
    highest = [-1] * points
    vram = [0] * points
    steps = schedule.steps
    past = 0
    for number, weight in enumerate(weights):
        if not weight:
            continue
        begin = past * points // total
        past += weight
        end = max(begin + 1, -(-past * points // total))
        for point in range(begin, min(end, points)):
            firsts[point] = firsts[point] or number + 1
            lasts[point] = number + 1
            if highest[point] < 0 or steps.ram[number] > steps.ram[highest[point]]:
                highest[point] = number
            vram[point] = max(vram[point], steps.vram[number])
    fixed, slot = fixed_ram(schedule), schedule.slot_bytes
    held = max(
        (d.threads * w for d, w in zip(schedule.budget.devices, schedule.workspace, strict=True) if d.vram), default=0
    )
    return [
        Moment(first, last, steps[top].node, steps[top].index, fixed + steps[top].ram * slot, on_gpu * slot + held)
        for first, last, top, on_gpu in zip(firsts, lasts, highest, vram, strict=True)
    ]


def _bytes_processed(graph: MergeGraph, node: int, places: Sequence[int]) -> int:
    """Return the bytes of a step's sources and output: its width on the time axis."""
    sources = graph.node_sources[node]
    nbytes = sum(graph.value_nbytes(sources[place]) for place in places)
    return nbytes + (graph.nbytes(node) if graph.operation(node).kind is not Kind.COPY else 0)


def sparkline(values: Sequence[int], top: int) -> str:
    """Return values between 0 and `top` as a line of blocks, such as ``▂▂▅█▅▂``."""
    last = len(_BLOCKS) - 1
    return "".join(_BLOCKS[min(last, max(0, round(value * last / top)))] if top else _BLOCKS[0] for value in values)
