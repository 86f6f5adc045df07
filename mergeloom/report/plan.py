"""What people read of a merge: the dry run before it, and what was measured after it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..engine.graph.build import Model
from ..engine.graph.graph import Kind
from ..engine.schedule.timeline import sparkline, timeline
from ..engine.schedule.traffic import ReadAgain, bytes_of_reads, downloaded, fixed_ram, peak_of, read_again
from ..io.units import big_number, data_size, duration, listed, memory_size, plural, ranges, rate
from .sections import Grid, Section, plain

if TYPE_CHECKING:
    from ..engine.cost.estimate import Estimate
    from ..engine.execute.tasks import LaneTime, Measured
    from ..engine.run.merge import Result
    from ..engine.run.plan import Plan

_BUSY = 0.6
"""The share of a lane's time above which it is called the bottleneck."""
_SHORTEST = 2.0
"""Seconds below which a merge is too short for its lanes to tell anything."""

_REMEDIES = {
    "read": "reading the inputs: a faster disk for them would help most",
    "upload": "copying to the GPU: a wider bus would help most",
    "download": "the GPU, computing or copying back: a faster GPU, or a second one, would help most",
    "copy": "copying, by the kernel: a faster disk would help most, or one whose file system shares blocks",
    "write": "writing the output: a faster disk for OUT would help most",
    "cores": "the cores, computing and copying: more or faster ones, or a GPU, would help most",
}
_BLOCKS = 40
"""The length of the line that shows memory over the steps."""


# ------------------------------------------------------------------------------------------------ before


def plan_text(plan: Plan) -> str:
    """The dry run as plain lines."""
    return plain(plan_sections(plan))


def headline(plan: Plan) -> str:
    """A merge in one line: ``linear of 2 models: 16 layers, 1.24B parameters, 2.47GB``."""
    return _headline(plan, plan.output_dict())


def _headline(plan: Plan, said: Mapping[str, Any]) -> str:
    layers = f"{plural(said['layers'], 'layer')}, " if said["layers"] else ""
    parameters = big_number(said["parameters"]).partition("(")[2].rstrip(")") or str(said["parameters"])
    models = plural(len(plan.built.models), "model")
    return f"{plan.stage.merge_method} of {models}: {layers}{parameters} parameters, {data_size(said['bytes'])}"


def plan_sections(plan: Plan, more: Sequence[Section] = ()) -> list[Section]:
    """The dry run: what a merge makes, takes, does and needs; then `more`, what isn't used, and the warnings."""
    said = plan.output_dict()
    read = bytes_of_reads(plan.built.graph, plan.schedule)
    sections = [
        Section(_headline(plan, said)),
        _output(plan, said),
        _inputs(plan, read),
        _work(plan),
        _memory(plan),
    ]
    if again := read_again_lines(read_again(plan.built.graph, plan.schedule, read)):
        hint = "`mergeloom plan --what-if` shows what more memory would save."
        sections.insert(4, Section("Read more than once", lines=[*again, hint]))
    sections += more
    if unused := unused_lines(plan):
        sections.append(Section("Not used", lines=unused))
    if plan.warnings:
        sections.append(Section("Warnings", lines=plan.warnings, warns=True))
    return sections


def read_again_lines(groups: Sequence[ReadAgain], most: int = 4) -> list[str]:
    """What is read again, and why, in a few lines."""
    lines = [
        f"{group.pattern} ({plural(group.tensors, 'tensor')}, {data_size(group.nbytes)}): {group.times:.1f} times, "
        f"since {group.reason}"
        for group in groups[:most]
    ]
    if rest := groups[most:]:
        count, again = sum(group.tensors for group in rest), sum(group.read - group.nbytes for group in rest)
        lines.append(f"and {plural(count, 'other tensor')}, of which {data_size(again)} are read again")
    return lines


def _output(plan: Plan, said: Mapping[str, Any]) -> Section:
    shards = plan.layout.shards_in("")
    same = plan.files.config_from == plan.files.tokenizer_from
    largest = f", the largest of {data_size(max(shard.nbytes for shard in shards))}" if len(shards) > 1 else ""
    return Section(
        "Output",
        (
            ("parameters", f"{big_number(said['parameters'])} in {plural(said['tensors'], 'tensor')}"),
            ("layers", f"{said['layers']:,}"),
            ("size", f"{data_size(said['bytes'])} in {plural(len(shards), 'file')}{largest}"),
            ("disk", f"{data_size(plan.disk)}; nothing is stored twice on the way"),
            ("dtype", ", ".join(said["dtypes"])),
            ("config from", plan.files.config_from),
            *([] if same else [("tokenizer from", plan.files.tokenizer_from)]),
            *(("saved beside", _saved(made.folder, plan.output_dict(made))) for made in plan.saved),
        ),
    )


def _saved(folder: str, said: Mapping[str, Any]) -> str:
    """A stage that is written, too: ``middle/: 12 layers, 1.24B parameters, 2.47GB in 1 file, BF16``."""
    layers = f"{plural(said['layers'], 'layer')}, " if said["layers"] else ""
    files = plural(said["shards"], "file")
    parameters = f"{big_number(said['parameters'])} parameters"
    return f"{folder}/: {layers}{parameters}, {data_size(said['bytes'])} in {files}, {', '.join(said['dtypes'])}"


def _inputs(plan: Plan, read: Sequence[int]) -> Section:
    base = plan.stage.base_model
    by_model = plan.bytes_read_by_model(read)
    again = plan.schedule.bytes_reread > 0
    rows = []
    for model in plan.built.models:
        refs = model.checkpoint.tensors.values()
        layers = " + ".join(str(stack.count) for stack in model.layers.mains) or "0"
        rows.append(
            (
                model.name + (" (base)" if model.reference == base else ""),
                layers,
                f"{len(refs):,}",
                data_size(sum(ref.nbytes for ref in refs)),
                data_size(by_model[model.number][0]),
                *([_times(*by_model[model.number])] if again else []),
                ", ".join(sorted({ref.dtype.name for ref in refs})),
            )
        )
    header = ("model", "layers", "tensors", "size", "used", *(["read"] if again else []), "dtypes")
    return Section("Inputs", grid=Grid(header, tuple(rows), frozenset(header[1:-1])))


def _times(used: int, read: int) -> str:
    """How often the bytes that are used are read: ``1x``, ``3.2x``."""
    return f"{read / used:.2g}x" if used else ""


def _work(plan: Plan) -> Section:
    graph, schedule = plan.built.graph, plan.schedule
    again = ", every byte once"
    if schedule.bytes_reread:
        again = f", {data_size(schedule.bytes_reread)} of it again, since the budget holds no more"
    copied, shared = plan.bytes_copied, plan.bytes_shared
    bytes_out = sum(graph.nbytes(output.node) for output in graph.outputs)
    aside = f", {data_size(copied)} of it by the kernel alone" if copied else ""
    fields = [
        ("reads", f"{data_size(plan.bytes_read)}{again}"),
        ("writes", f"{data_size(plan.bytes_written)}{aside}"),
    ]
    if shared:
        fields.append(("shares", f"{data_size(shared)} with the inputs: neither read nor written, and no disk taken"))
    elif plan.out is None and (passed := bytes_out - plan.bytes_computed):
        fields.append(("could share", f"up to {data_size(passed)} with the inputs: give OUT to see"))
    fields += [("not shared", f"{data_size(nbytes)}: {reason}") for reason, nbytes in plan.unshared]
    if missing := [file for file in plan.downloads if not file.present]:
        size = data_size(sum(file.to_fetch for file in missing))
        fields.append(("downloads", f"{size} in {plural(len(missing), 'file')}, before the merge"))
    if schedule.uploaded:
        back = data_size(downloaded(graph, schedule))
        fields.append(("uploads", f"{data_size(schedule.uploaded)} to the GPU, and {back} back"))
    counts: Counter[str] = Counter()
    for output in graph.outputs:
        operation = graph.operation(output.node)
        counts["copied" if operation.kind is not Kind.MERGE else f"by {operation.method}"] += 1
    made = ", ".join(f"{number:,} {how}" for how, number in counts.most_common())
    fields.append(("tensors", f"{made}; in {plural(len(schedule.steps), 'step')}"))
    devices = schedule.budget.devices
    if plan.computes:
        threads = sum(device.threads for device in devices)
        names = ", ".join(device.name for device in devices)
        fields.append(("device", f"{names}, {plural(threads, 'thread')}"))
        pieces = f"up to {memory_size(schedule.slot_bytes)}"
        tiles = ", ".join(f"{elements:,}" for elements in dict.fromkeys(schedule.tile_elements))
        fields.append(("pieces", f"{pieces}, computed in tiles of {tiles} elements"))
    else:
        fields.append(("device", "none: bytes are only copied"))
    return Section("Work", fields)


def _memory(plan: Plan) -> Section:
    graph, schedule = plan.built.graph, plan.schedule
    budget = schedule.budget
    curve = timeline(graph, schedule, _BLOCKS)
    buffers = schedule.ram_slots * schedule.slot_bytes
    work = fixed_ram(schedule) - budget.baseline
    parts = f"{memory_size(budget.baseline)} of it for the program itself"
    parts += " (as measured on this machine)" if plan.options.machine is not None else ""
    parts += f", {memory_size(work)} for workspaces" if work else ""
    fields = [
        ("peak RAM", f"{memory_size(schedule.peak_ram, up=True)} of {memory_size(budget.ram)}; {parts}"),
        *_held(plan, buffers, [moment.ram for moment in curve], schedule.peak_ram),
        ("least RAM", f"{memory_size(schedule.minimum_ram, up=True)}{_set_by(plan)}"),
    ]
    vram = [device.vram for device in budget.devices if device.vram is not None]
    if vram:
        on_each = " on each GPU" if len(vram) > 1 else ""
        peak = memory_size(schedule.peak_vram, up=True)
        slots = max(schedule.vram_slots) * schedule.slot_bytes
        fields += [
            ("peak VRAM", f"{peak} of {memory_size(max(vram))}{on_each}"),
            *_held(plan, slots, [moment.vram for moment in curve], schedule.peak_vram, vram=True),
            ("least VRAM", memory_size(schedule.minimum_vram, up=True)),
        ]
    return Section("Memory", fields)


def _held(plan: Plan, buffers: int, curve: Sequence[int], top: int, *, vram: bool = False) -> list[tuple[str, str]]:
    """The step and the tensor that hold the most of the buffers, and what all steps hold; nothing without steps."""
    peak = peak_of(plan.built.graph, plan.schedule, vram=vram)
    if peak is None:
        return []
    which = f"pass {peak.index} of {peak.passes} of " if peak.passes > 1 else ""
    held = f"{memory_size(peak.nbytes)} of {memory_size(buffers)} of buffers; the rest is read ahead"
    if peak.nbytes > 0.98 * buffers:
        held = f"{memory_size(peak.nbytes)}, or all of the buffers"
    step = f"step {peak.step:,} of {len(plan.schedule.steps):,}, {which}{peak.tensor}: {held}"
    return [("set by", step), ("over time", sparkline(curve, top))]


def _set_by(plan: Plan) -> str:
    node = plan.schedule.minimum_ram_node
    return "" if node is None else f", which {plan.built.graph.label(node)} needs"


def time_section(found: Estimate) -> Section:
    """How long it will take, why, and how that is known."""
    if not found.seconds:
        return Section("Time", [("about", "no time: there is nothing to read or write")])
    slowest = found.bottleneck
    remedy = _REMEDIES.get(slowest.name, "computing: faster GPUs, or more of them, would help most")
    fields = [
        ("about", f"{duration(found.seconds)}, between {duration(found.low)} and {duration(found.high)}"),
        ("bottleneck", remedy),
    ]
    rows = tuple(
        (lane.name, data_size(lane.nbytes), lane.rate.text, lane.rate.origin, duration(lane.seconds))
        for lane in found.lanes
    )
    header = ("lane", "moves", "a second", "known", "alone")
    lines = [f"{note[:1].upper()}{note[1:]}." for note in found.rates.notes]
    if option := found.rates.option:
        lines.append(f"To plan with these rates again: {option}")
    return Section("Time", fields, Grid(header, rows, frozenset(("moves", "a second", "alone"))), lines)


def unused_lines(plan: Plan) -> list[str]:
    """Input tensors that no output needs: model, which, how many, and why."""
    models = {model.name: model for model in plan.built.models}
    names: dict[tuple[str, str], list[str]] = {}
    for unused in plan.built.unused:
        # the cause without the layer, which the names contain: one line for all layers in no slice
        names.setdefault((unused.model, unused.cause), []).extend(unused.tensors)
    lines = []
    for (model, reason), tensors in names.items():
        which = f"{_collapsed(models[model], tensors)}: " if tensors else ""
        lines.append(f"{model}: {which}{reason}")
    return lines


def _collapsed(model: Model, tensors: Iterable[str]) -> str:
    """``layers 4-5 (32 tensors)``, or the names where there are few."""
    patterns: dict[str, set[int]] = {}
    layers: set[int] = set()
    count = outside = 0
    for name in tensors:
        count += 1
        layer = model.layers.split(name)
        if layer is None:
            outside += 1
            patterns.setdefault(name, set())
        else:
            layers.add(layer.index)
            patterns.setdefault(f"{layer.stack}.{{}}.{layer.rest}", set()).add(layer.index)
    if len(patterns) <= 3:
        shown = [name.replace("{}", _braced(found), 1) if found else name for name, found in patterns.items()]
        return ", ".join(shown)
    if not layers:
        return f"{listed(patterns)} ({plural(count, 'tensor')})"
    where = f"layer{'s' if len(layers) > 1 else ''} {ranges(layers)}"
    beside = f" and {outside:,} outside the layers" if outside else ""
    return f"{where}{beside} ({plural(count, 'tensor')})"


def _braced(numbers: set[int]) -> str:
    text = ranges(numbers)
    return text if len(numbers) == 1 else f"{{{text}}}"


# ------------------------------------------------------------------------------------------------ after


def summary_text(result: Result) -> str:
    """What a merge did, as plain lines."""
    return plain(summary_sections(result))


def summary_sections(result: Result) -> list[Section]:
    """What a merge did, beside what was foretold."""
    plan, measured = result.plan, result.measured
    if result.out is not None and not measured.seconds:
        return []  # it was whole already, as was said
    schedule, earlier = plan.schedule, result.earlier
    moved = measured.bytes_read + measured.bytes_written
    title = f"Merged into {result.out}" if result.out is not None else "Rehearsed: nothing was written"
    fields = [
        ("time", f"{duration(measured.seconds)}, {rate(moved, measured.seconds)} read and written"),
        ("read", _beside(measured.bytes_read + earlier.bytes_read, plan.bytes_read)),
        (
            "written" if result.out is not None else "discarded",
            _beside(measured.bytes_written + earlier.bytes_written, plan.bytes_written),
        ),
        *_sharing(result),
        (
            "peak RAM",
            f"{memory_size(result.peak_rss, up=True)}; foretold {memory_size(schedule.peak_ram, up=True)}, "
            f"allowed {memory_size(schedule.budget.ram)}",
        ),
    ]
    if any(device.vram is not None for device in schedule.budget.devices):
        foretold = memory_size(schedule.peak_vram, up=True)
        fields.append(("peak VRAM", f"{memory_size(measured.vram_peak, up=True)}; foretold {foretold}"))
    for name, vram in measured.reduced_vram.items():
        fields.append(("made do with", f"{memory_size(vram)} of {name}: another process held the rest"))
    fields.append(("bottleneck", bottleneck(measured, gpu=_on_gpu(plan))))
    lanes = tuple(
        (name, str(lane.threads), f"{lane.worked:.1f} s", f"{lane.waited:.1f} s", f"{_busy(lane, measured):.0%}")
        for name, lane in measured.lanes.items()
        if name != "compute" or plan.computes
    )
    header = ("lane", "threads", "worked", "waited", "busy")
    sections = [Section(title, fields, Grid(header, lanes, frozenset(header[1:])) if lanes else None)]
    if measured.overflowed:
        sections.append(overflow_section(result))
    return sections


def _sharing(result: Result) -> Iterator[tuple[str, str]]:
    """What was shared with the inputs, and why what else is only passed through was not."""
    plan, measured = result.plan, result.measured
    if plan.bytes_shared:
        yield "shared", _beside(measured.bytes_shared + result.earlier.bytes_shared, plan.bytes_shared)
    for reason, nbytes in plan.unshared:
        yield "not shared", f"{data_size(nbytes)}: {reason}"
    for number, nbytes in measured.refused.items():
        yield "not shared", f"{data_size(nbytes)}: refused by the file system ({os.strerror(number)}), so copied"


def bottleneck(measured: Measured, *, gpu: bool = False) -> str:
    """Which lane was busy most of the time, and what would make the merge faster.

    Args:
        measured: of the run.
        gpu: whether a GPU computed.
    """
    if measured.seconds < _SHORTEST or not measured.lanes:
        return "too short to tell"
    name, lane = max(measured.lanes.items(), key=lambda item: _busy(item[1], measured))
    share = _busy(lane, measured)
    if share < _BUSY:
        return f"none: the busiest lane, {name}, worked {share:.0%} of the time"
    computing = "computing: a faster GPU, or a second one, would help most"
    if not gpu:
        computing = "computing: more or faster cores, or a GPU, would help most"
    return f"{_REMEDIES.get(name, computing)} ({share:.0%} busy)"


def _on_gpu(plan: Plan) -> bool:
    return any(device.vram is not None for device in plan.schedule.budget.devices)


def _busy(lane: LaneTime, measured: Measured) -> float:
    """The share of the run that a lane's threads worked."""
    return lane.worked / (lane.threads * measured.seconds) if lane.threads and measured.seconds else 0.0


def _beside(measured: int, foretold: int) -> str:
    if measured == foretold:
        return f"{data_size(measured)}, as foretold"
    return f"{measured:,} bytes, where {foretold:,} were foretold"


def overflow_section(result: Result) -> Section:
    """Finite inputs whose result was too large for the output's dtype, by tensor."""
    graph, overflowed = result.plan.built.graph, result.measured.overflowed
    dtypes = {output.label: graph.node_dtype[output.node].name for output in graph.outputs}
    worst = sorted(overflowed.items(), key=lambda item: (-item[1], item[0]))
    lines = [f"{name}: {plural(count, 'value')} beyond {dtypes.get(name, 'its dtype')}" for name, count in worst[:10]]
    if len(worst) > 10:
        rest = sum(count for _, count in worst[10:])
        lines.append(f"and {plural(rest, 'value')} in {plural(len(worst) - 10, 'other tensor')}")
    lines.append("They are infinite or NaN in the output. A wider out_dtype, or smaller weights, would hold them.")
    return Section("Overflow", lines=lines, warns=True)
