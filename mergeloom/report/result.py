"""The summary after a merge: measured values next to the planned ones."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ..engine.run.survival.findings import text_of
from ..engine.run.survival.shares import by_group
from ..io.units import data_size, duration, memory_size, plural, rate
from .plan import layers_text
from .sections import Grid, Section, plain
from .time import REMEDIES
from .unused import unused_section

if TYPE_CHECKING:
    from ..engine.execute.lanes import LaneTime
    from ..engine.execute.measurements import Measured
    from ..engine.run.merge import Result
    from ..engine.run.plan import Plan
    from ..engine.run.survival.shares import TensorShare

_BUSY = 0.6
"""The share of a lane's time above which it is called the bottleneck."""
_MIN_SECONDS = 2.0
"""The duration below which a merge is too short to find its bottleneck."""
_OVERFLOWS_SHOWN = 10


def result_text(result: Result) -> str:
    """Return the summary of a merge as plain lines."""
    return plain(result_sections(result))


def result_sections(result: Result) -> list[Section]:
    """Return the sections of the summary; none if the merge was already complete."""
    plan, measured, earlier = result.plan, result.measured, result.earlier
    if result.out is not None and not measured.seconds:
        return []
    rehearsal = result.out is None
    moved = measured.bytes_read + measured.bytes_written  # 0 if earlier runs did everything, or it was reflinked
    busiest = bottleneck(measured, gpu=_uses_gpu(plan))
    fields = [
        ("time", duration(measured.seconds)),
        *([("throughput", f"{rate(moved, measured.seconds)} read and written")] if moved else []),
        ("read", _compare(measured.bytes_read, plan.bytes_read, earlier.bytes_read)),
        (
            "discarded" if rehearsal else "written",
            _compare(measured.bytes_written, plan.bytes_written, earlier.bytes_written),
        ),
        *_reflink_fields(result),
        *([("layers", layers_text(plan))] if plan.built.matched_by_name else []),
        *_memory_fields(result),
        *([("bottleneck", busiest)] if moved and busiest else []),
        *_estimate_fields(result),
    ]
    lanes = tuple(
        (name, str(lane.threads), f"{lane.worked:.1f} s", f"{lane.waited:.1f} s", f"{_busy(lane, measured):.0%}")
        for name, lane in measured.lanes.items()
        if name != "compute" or plan.computes
    )
    header = ("lane", "threads", "worked", "waited", "busy")
    title = "Rehearsal complete: nothing was written" if rehearsal else f"Merged into {result.out}"
    sections = [Section(title, fields, Grid(header, lanes, frozenset(header[1:])) if lanes else None)]
    if measured.overflowed:
        sections.append(overflow_section(result))
    if result.shares:
        sections.append(survival_section(result.shares))
    if unused := unused_section(plan):
        sections.append(unused)
    return sections


def _reflink_fields(result: Result) -> Iterator[tuple[str, str]]:
    """Describe what was reflinked, and why the other copied tensors were not."""
    plan, measured = result.plan, result.measured
    if plan.bytes_shared:
        yield "reflinked", _compare(measured.bytes_shared, plan.bytes_shared, result.earlier.bytes_shared)
    for reason, nbytes in plan.unshared:
        yield "not reflinked", f"{data_size(nbytes)}: {reason}"
    for number, nbytes in measured.io.refused.items():
        reason = f"refused by the file system ({os.strerror(number)}), copied instead"
        yield "not reflinked", f"{data_size(nbytes)}: {reason}"


def _memory_fields(result: Result) -> Iterator[tuple[str, str]]:
    """Compare peak RAM and VRAM with the plan."""
    schedule, measured = result.plan.schedule, result.measured
    planned, limit = memory_size(schedule.peak_ram, up=True), memory_size(schedule.budget.ram)
    yield "peak RAM", f"{memory_size(result.peak_rss, up=True)}; planned {planned}, limit {limit}"
    if _uses_gpu(result.plan):
        planned = memory_size(schedule.peak_vram, up=True)
        yield "peak VRAM", f"{memory_size(measured.vram_peak, up=True)}; planned {planned}"
    for name, vram in measured.reduced_vram.items():
        yield "VRAM reduced to", f"{memory_size(vram)} on {name}: another process used the rest"


def _estimate_fields(result: Result) -> Iterator[tuple[str, str]]:
    """Compare the time with its estimate; nothing if the merge was too short, or an earlier run did a part."""
    seconds, estimate = result.measured.seconds, result.estimate
    if seconds >= _MIN_SECONDS and estimate is not None and estimate.seconds:
        ratio = seconds / estimate.seconds
        times = f"{ratio:,.0f}" if ratio >= 9.5 else f"{ratio:.2g}"
        yield "estimate", f"{duration(estimate.seconds)} from assumed rates; the merge took {times} times as long"


def _compare(measured: int, planned: int, earlier: int) -> str:
    """Format measured bytes, with the planned bytes where they differ, and those of earlier runs."""
    before = f"; {data_size(earlier)} before this run" if earlier else ""
    if measured + earlier == planned:
        return f"{data_size(planned)}, as planned{before}"
    return f"{measured + earlier:,} bytes; planned {planned:,}{before}"


def bottleneck(measured: Measured, *, gpu: bool = False) -> str:
    """Name the busiest lane, and what would make the merge faster; empty if the merge was too short to find it.

    Args:
        measured: measurements of the merge.
        gpu: whether a GPU computed.
    """
    if measured.seconds < _MIN_SECONDS or not measured.lanes:
        return ""
    name, lane = max(measured.lanes.items(), key=lambda item: _busy(item[1], measured))
    share = _busy(lane, measured)
    if share < _BUSY:
        return f"none: the busiest lane, {name}, was busy {share:.0%} of the time"
    computing = "computing: more or faster cores, or a GPU, would help most"
    if gpu:
        computing = "computing: a faster GPU, or a second one, would help most"
    return f"{REMEDIES.get(name, computing)} ({share:.0%} busy)"


def _uses_gpu(plan: Plan) -> bool:
    return any(device.vram is not None for device in plan.schedule.budget.devices)


def _busy(lane: LaneTime, measured: Measured) -> float:
    """The share of the merge's time that a lane's threads worked."""
    return lane.worked / (lane.threads * measured.seconds) if lane.threads and measured.seconds else 0.0


def overflow_section(result: Result) -> Section:
    """List the tensors in which finite inputs gave values too large for the output's dtype."""
    graph, overflowed = result.plan.built.graph, result.measured.overflowed
    dtypes = {output.label: graph.node_dtype[output.node].name for output in graph.outputs}
    worst = sorted(overflowed.items(), key=lambda item: (-item[1], item[0]))
    lines = [
        f"{name}: {plural(count, 'value')} too large for {dtypes.get(name, 'its dtype')}"
        for name, count in worst[:_OVERFLOWS_SHOWN]
    ]
    if rest := worst[_OVERFLOWS_SHOWN:]:
        count = sum(count for _, count in rest)
        lines.append(f"and {plural(count, 'value')} in {plural(len(rest), 'other tensor')}")
    lines.append("They are infinite or NaN in the output. Use a wider out_dtype or smaller weights.")
    return Section("Overflow", lines=lines, warns=True)


def survival_section(shares: Sequence[TensorShare]) -> Section:
    """Show what rounding keeps of the change from the base model, for each group of tensors."""
    rows = [
        (group, f"{count:,}", text_of(share), text_of(min(each.share for each in shares if each.group == group)))
        for group, (share, count) in by_group(shares).items()
    ]
    header = ("group", "tensors", "kept", "lowest tensor")
    title = f"Change from the base model that rounding to {' and '.join(dict.fromkeys(s.stored for s in shares))} keeps"
    return Section(title, grid=Grid(header, tuple(rows), frozenset(header[1:])))
