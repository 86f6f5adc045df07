"""The dry run before a merge, as people read it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..engine.graph.graph import Kind, MergeGraph
from ..engine.model.logical import class_counts, label_of
from ..engine.schedule.timeline import sparkline, timeline
from ..engine.schedule.traffic import ReadAgain, bytes_of_reads, downloaded, fixed_ram, peak_of, read_again
from ..io.tensors.table import total_bytes
from ..io.units import big_number, data_size, memory_size, plural, short_number
from .alternatives import formats_section
from .parameters import methods_of, parameters_section
from .sections import Grid, Section, plain
from .tensors.vocabulary import vocabulary_section
from .unused import unused_section

if TYPE_CHECKING:
    from ..engine.files.sources import OutputModel
    from ..engine.run.plan import Plan

_COLUMNS = 40
"""The number of columns of the memory timeline."""
_REREAD_GROUPS = 4
"""How many groups of re-read tensors are listed."""


def plan_text(plan: Plan) -> str:
    """Return the dry run as plain lines."""
    return plain(plan_sections(plan))


def headline(plan: Plan) -> str:
    """Summarize a merge in one line: ``linear of 2 models: 16 layers, 1.24B parameters, 2.47GB``."""
    output = plan.output_dict()
    layers = f"{plural(output['layers'], 'layer')}, " if output["layers"] else ""
    size = f"{short_number(output['parameters'])} parameters, {data_size(output['bytes'])}"
    return f"{plan.stage.merge_method} of {plural(len(plan.built.named), 'model')}: {layers}{size}"


def plan_sections(plan: Plan, more: Sequence[Section] = ()) -> list[Section]:
    """Return the sections of the dry run, with `more` before the unused tensors and the warnings."""
    read = bytes_of_reads(plan.built.graph, plan.schedule)
    sections = [
        Section(headline(plan)),
        output_section(plan),
        formats_section(plan),
        inputs_section(plan, read),
        renamed_section(plan),
        vocabulary_section(plan),
        work_section(plan),
        parameters_section(plan),
        reread_section(plan, read),
        memory_section(plan),
        *more,
        unused_section(plan),
        warnings_section(plan),
    ]
    return [section for section in sections if section is not None]


def warnings_section(plan: Plan) -> Section | None:
    """List the plan's warnings; None if there are none."""
    return Section("Warnings", lines=plan.warnings, warns=True) if plan.warnings else None


def renamed_section(plan: Plan) -> Section | None:
    """List the prefixes that the recipe replaces in each model; None if there are none."""
    lines = []
    for model in plan.built.files:
        rename = plan.recipe.renames.get(model.reference)
        if rename is not None:
            pairs = ", ".join(f"{old!r} {f'becomes {new!r}' if new else 'is removed'}" for old, new in rename.pairs)
            lines.append(f"{model.name}: {pairs} ({plural(len(model.checkpoint.stored), 'tensor')})")
    return Section("Renamed", lines=lines) if lines else None


def reread_section(plan: Plan, read: Sequence[int]) -> Section | None:
    """List the inputs that are read more than once, with the reason; None if there are none.

    Args:
        plan: plan of the merge.
        read: bytes read of each input tensor, by its number in the graph.
    """
    groups = read_again(plan.built.graph, plan.schedule, read)
    if not groups:
        return None
    lines = reread_lines(groups)
    if any(group.limited_by_budget for group in groups):
        lines.append("`mergeloom plan --what-if` shows what more memory would save.")
    return Section("Read more than once", lines=lines)


def reread_lines(groups: Sequence[ReadAgain]) -> list[str]:
    """Describe groups of re-read tensors: the first few one by one, the others in one line."""
    lines = [
        f"{group.pattern} ({plural(group.tensors, 'tensor')}, {data_size(group.nbytes)}): read {_times(group)}: "
        f"{group.reason}"
        for group in groups[:_REREAD_GROUPS]
    ]
    if rest := groups[_REREAD_GROUPS:]:
        count, nbytes = sum(group.tensors for group in rest), sum(group.read - group.nbytes for group in rest)
        lines.append(f"and {plural(count, 'other tensor')}, with {data_size(nbytes)} of re-reads")
    return lines


def _times(group: ReadAgain) -> str:
    """How often a group is read; for a small part that is read again, its size."""
    times = f"{group.times:.3g}"
    return f"once, and {data_size(group.read - group.nbytes)} again" if times == "1" else f"{times} times"


def output_section(plan: Plan) -> Section:
    """Describe the output: parameters, layers, files, dtypes and donors."""
    output = plan.output_dict()
    shards = plan.layout.shards_in("")
    one_donor = plan.files.config_from == plan.files.tokenizer_from
    largest = f", the largest of {data_size(max(shard.nbytes for shard in shards))}" if len(shards) > 1 else ""
    return Section(
        "Output",
        (
            ("parameters", f"{big_number(output['parameters'])} in {tensors_text(output)}"),
            ("layers", layers_text(plan)),
            ("size", f"{data_size(output['bytes'])} in {plural(len(shards), 'file')}{largest}"),
            ("disk", f"{data_size(plan.disk)}; no temporary files"),
            ("dtype", ", ".join(plan.output_formats())),
            ("metadata from" if plan.files.config is None else "config from", plan.files.config_from),
            *([] if one_donor else [("tokenizer from", plan.files.tokenizer_from)]),
            *(("also saved", _saved_stage(plan, stage)) for stage in plan.saved),
        ),
    )


def tensors_text(output: Mapping[str, Any]) -> str:
    """Format the number of tensors, ``46,183 tensors (91,991 stored)`` if files hold codes and scales."""
    stored = f" ({output['stored_tensors']:,} stored)" if output["stored_tensors"] != output["tensors"] else ""
    return f"{plural(output['tensors'], 'tensor')}{stored}"


def layers_text(plan: Plan) -> str:
    """Format the number of layers of the output, or say that tensors were matched without layers."""
    if plan.built.matched_by_name:
        return "none identified: tensors are matched by their complete names"
    return f"{plan.built.layers:,}"


def _saved_stage(plan: Plan, stage: OutputModel) -> str:
    """Describe a saved stage: ``middle/: 12 layers, 1,235,814,400 (1.24B) parameters, 2.47GB in 1 file, BF16``."""
    output, dtypes = plan.output_dict(stage), ", ".join(plan.output_formats(stage))
    layers = f"{plural(output['layers'], 'layer')}, " if output["layers"] else ""
    size = f"{data_size(output['bytes'])} in {plural(output['shards'], 'file')}"
    return f"{stage.folder}/: {layers}{big_number(output['parameters'])} parameters, {size}, {dtypes}"


def inputs_section(plan: Plan, read: Sequence[int]) -> Section:
    """Describe the input models, one per row.

    Args:
        plan: plan of the merge.
        read: bytes read of each input tensor, by its number in the graph.
    """
    base = None if plan.stage.base_model is None else plan.stage.base_model.base
    by_model = plan.bytes_read_by_model(read)
    rereads = plan.schedule.bytes_reread > 0
    rows = []
    for model in plan.built.files:
        tensors, stored = model.tensors, model.checkpoint.tensors
        role = " (base)" if model.reference == base else " (adapter)" if model.is_adapter else ""
        layers = " + ".join(str(stack.count) for stack in model.layers.mains) or (
            "0" if model.identified else "unknown"
        )
        rows.append(
            (
                model.name + role,
                "" if model.is_adapter else layers,
                f"{len(tensors):,}",
                data_size(total_bytes(stored)),
                data_size(by_model[model.number][0]),
                *([_times_read(*by_model[model.number])] if rereads else []),
                ", ".join(sorted({label_of(each) for each, _ in class_counts(tensors)})),
            )
        )
    header = ("model", "layers", "tensors", "size", "used", *(["read"] if rereads else []), "dtypes")
    notes = tuple(f"{model.name}: {model.note}" for model in plan.built.named if model.note)
    return Section("Inputs", grid=Grid(header, tuple(rows), frozenset(header[1:-1])), lines=notes)


def _times_read(used: int, read: int) -> str:
    """Format how often the used bytes are read: ``1x``, ``3.2x``."""
    return f"{read / used:.2g}x" if used else ""


def reads_text(plan: Plan) -> str:
    """Format how much of the input is read more than once."""
    nbytes = plan.schedule.bytes_reread
    return f"including {data_size(nbytes)} of re-reads" if nbytes else "no re-reads"


def work_section(plan: Plan) -> Section:
    """Describe the I/O and the computation."""
    graph, schedule = plan.built.graph, plan.schedule
    copied = f", including {data_size(plan.bytes_copied)} by kernel copy" if plan.bytes_copied else ""
    fields = [
        ("reads", f"{data_size(plan.bytes_read)}, {reads_text(plan)}"),
        ("writes", f"{data_size(plan.bytes_written)}{copied}"),
        *_reflink_fields(plan),
    ]
    if missing := [file for file in plan.downloads if not file.present]:
        size = data_size(sum(file.to_fetch for file in missing))
        fields.append(("downloads", f"{size} in {plural(len(missing), 'file')} before the merge"))
    if schedule.uploaded:
        fields.append(
            ("uploads", f"{data_size(schedule.uploaded)} to the GPU, and {data_size(downloaded(graph, schedule))} back")
        )
    if checks := list(_data_checks(plan)):
        fields.append(("data checks", "; ".join(checks)))
    tensors = ", ".join(f"{number:,} {how}" for how, number in _made_by(plan).most_common())
    fields.append(("tensors", f"{tensors}, in {plural(len(schedule.steps), 'step')}"))
    if not plan.computes:
        return Section("Work", [*fields, ("device", "none: tensors are only copied")])
    devices = schedule.budget.devices
    threads = plural(sum(device.threads for device in devices), "thread")
    tiles = [each for device, each in zip(devices, schedule.tile_elements, strict=True) if device.separate]
    tile = "".join(f", tile {elements:,} elements" for elements in dict.fromkeys(tiles))
    fields += [
        ("device", f"{', '.join(device.name for device in devices)}, {threads}"),
        ("chunk size", f"{memory_size(schedule.slot_bytes)}{tile}"),
    ]
    return Section("Work", fields)


def _made_by(plan: Plan) -> Counter[str]:
    """Count the tensors of all models that are written by how they are made; codes and scales are one tensor."""
    graph = plan.built.graph
    how = [_how(graph, node) for node in graph] if graph.uses_nodes else graph.by_class(lambda node: _how(graph, node))
    counts = Counter(map(how.__getitem__, graph.outputs.nodes))
    del counts[""]
    counts["copied"] = sum(each.tensors for each in plan.built.counts.values()) - (counts.total() - counts["copied"])
    return +counts


def _how(graph: MergeGraph, node: int) -> str:
    """Describe how a node's tensor is made; empty for the scales that another node's codes belong to."""
    kind = graph.operation(node).kind
    return f"by {methods_of(graph, node)}" if kind is Kind.MERGE else "" if kind is Kind.RESULT else "copied"


def _data_checks(plan: Plan) -> Iterator[str]:
    """Describe the checks that need the data of the models."""
    if buffers := plan.built.buffers:
        yield f"{plural(len(buffers), 'buffer')}, before the merge starts"
    if plan.compared:
        yield f"what rounding keeps of the change of {plural(plan.compared, 'tensor')}, before the merge publishes"


def _reflink_fields(plan: Plan) -> list[tuple[str, str]]:
    """Describe what is reflinked, or could be, and why the other copied tensors are not."""
    graph = plan.built.graph
    fields = []
    if plan.bytes_shared:
        fields.append(("reflinked", f"{data_size(plan.bytes_shared)}, not read or written, no disk space"))
    elif plan.out is None:
        copied = graph.total(graph.nbytes, graph.outputs.nodes) - plan.bytes_computed
        if copied:
            fields.append(("reflinkable", f"up to {data_size(copied)} (pass OUT to check)"))
    return fields + [("not reflinked", f"{data_size(nbytes)}: {reason}") for reason, nbytes in plan.unshared]


def memory_section(plan: Plan, *, timelines: bool = True) -> Section:
    """Describe peak and minimum RAM and VRAM.

    Args:
        plan: plan of the merge.
        timelines: whether to draw memory over the steps as a line of blocks.
    """
    graph, schedule = plan.built.graph, plan.schedule
    budget = schedule.budget
    curve = timeline(graph, schedule, _COLUMNS) if timelines else []
    workspaces = fixed_ram(schedule) - budget.baseline
    program = f"{memory_size(budget.baseline)} program"
    program += " (measured on this machine)" if plan.options.machine is not None else ""
    program += f", {memory_size(workspaces)} workspaces" if workspaces else ""
    node = schedule.minimum_ram_node
    required_by = "" if node is None else f" (required by {graph.label(node)})"
    fields = [
        (
            "peak RAM",
            f"{memory_size(schedule.peak_ram, up=True)} of {memory_size(budget.ram)}: {program}, the rest buffers",
        ),
        *_peak_fields(plan, [moment.ram for moment in curve], vram=False),
        ("minimum RAM", f"{memory_size(schedule.minimum_ram, up=True)}{required_by}"),
    ]
    vram = [device.vram for device in budget.devices if device.vram is not None]
    if vram:
        on_each = " on each GPU" if len(vram) > 1 else ""
        fields += [
            ("peak VRAM", f"{memory_size(schedule.peak_vram, up=True)} of {memory_size(max(vram))}{on_each}"),
            *_peak_fields(plan, [moment.vram for moment in curve], vram=True),
            ("minimum VRAM", memory_size(schedule.minimum_vram, up=True)),
        ]
    return Section("Memory", fields)


def _peak_fields(plan: Plan, curve: Sequence[int], *, vram: bool) -> list[tuple[str, str]]:
    """Name the step with the largest working set, and draw memory over the steps; nothing without steps."""
    schedule = plan.schedule
    peak = peak_of(plan.built.graph, schedule, vram=vram)
    if peak is None:
        return []
    buffers = (max(schedule.vram_slots) if vram else schedule.ram_slots) * schedule.slot_bytes
    number = f"pass {peak.index} of {peak.passes} of " if peak.passes > 1 else ""
    ahead = f"{memory_size(buffers - peak.nbytes)} read-ahead" if peak.nbytes < 0.98 * buffers else "no read-ahead"
    step = f"step {peak.step:,} of {len(schedule.steps):,}, {number}{peak.tensor}"
    fields = [("peak at", f"{step}: {memory_size(peak.nbytes)} working set, {ahead}")]
    if curve:
        fields.append(("timeline", sparkline(curve, schedule.peak_vram if vram else schedule.peak_ram)))
    return fields
