"""What a schedule holds over its steps: a curve of a bounded number of points, and a line of blocks that shows it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..graph.graph import Kind, MergeGraph
from .schedule import Schedule
from .traffic import fixed_ram

_BLOCKS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True, slots=True)
class Moment:
    """Some neighbouring steps, or a part of a long one.

    Args:
        first: the number of the first step in it, from 1.
        last: that of the last.
        node: the node of the step in it that holds the most RAM.
        index: the pass of that step, from 0.
        ram: bytes held then, the program included.
        vram: the most bytes held on one GPU.
    """

    first: int
    last: int
    node: int
    index: int
    ram: int
    vram: int


def timeline(graph: MergeGraph, schedule: Schedule, points: int) -> list[Moment]:
    """The memory that the steps hold one after the other, as `points` moments in which equally many bytes are moved.

    What is read ahead of a step is held too, and not in it: `Schedule.peak_ram` counts it.
    """
    weights = [_moved(graph, step.node, step.sources) for step in schedule.steps]
    total = sum(weights)
    if not total:
        return []
    firsts, lasts = [0] * points, [0] * points
    most = [-1] * points
    vram = [0] * points
    steps = schedule.steps
    past = 0
    for number, (step, weight) in enumerate(zip(steps, weights, strict=True)):
        if not weight:
            continue
        begin = past * points // total
        past += weight
        end = max(begin + 1, -(-past * points // total))
        for place in range(begin, min(end, points)):
            firsts[place] = firsts[place] or number + 1
            lasts[place] = number + 1
            if most[place] < 0 or step.ram > steps[most[place]].ram:
                most[place] = number
            vram[place] = max(vram[place], step.vram)
    fixed, slot = fixed_ram(schedule), schedule.slot_bytes
    held = max(
        (d.threads * w for d, w in zip(schedule.budget.devices, schedule.workspace, strict=True) if d.vram), default=0
    )
    return [
        Moment(first, last, steps[top].node, steps[top].index, fixed + steps[top].ram * slot, on_gpu * slot + held)
        for first, last, top, on_gpu in zip(firsts, lasts, most, vram, strict=True)
    ]


def _moved(graph: MergeGraph, node: int, sources: Sequence[int]) -> int:
    """What a step is worth on the axis: the bytes that it goes through."""
    nbytes = sum(graph.reads[read].nbytes for read in sources)
    return nbytes + (graph.nbytes(node) if graph.operation(node).kind is not Kind.COPY else 0)


def sparkline(values: Sequence[int], top: int) -> str:
    """``▂▂▅█▅▂`` for values between 0 and `top`."""
    last = len(_BLOCKS) - 1
    return "".join(_BLOCKS[min(last, max(0, round(value * last / top)))] if top else _BLOCKS[0] for value in values)
