"""How one output tensor is made: of which bytes of which files, by which arithmetic, in what pieces, to which place."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from ..engine.graph.graph import Kind, Operation
from ..engine.recipe.parameters import layer_position
from ..engine.recipe.types import modules_of
from ..engine.schedule.tiling import tile_length
from ..errors import UsageError
from ..io.units import data_size, listed, memory_size, plural
from .sections import Grid, Section

if TYPE_CHECKING:
    from ..engine.recipe.types import Slice
    from ..engine.run.plan import Plan

_NAMES = 3
_NUMBER = re.compile(r"\d+")


@dataclass(frozen=True, slots=True)
class SliceOf:
    """The slice of the recipe that a layer of the output is of.

    Args:
        number: of the slice in its module, from 1.
        slices: how many the module has.
        module: its name.
        layer: the layer of the output.
        ranges: of each source the model and the layers [first, end).
        layers: the layer of each source that this one is made of.
        position: where it stands in a gradient, from 0 to 1.
    """

    number: int
    slices: int
    module: str
    layer: int
    ranges: tuple[tuple[str, int, int], ...]
    layers: tuple[int, ...]
    position: float


@dataclass(frozen=True, slots=True)
class Source:
    """One input tensor.

    Args:
        model: as the recipe has it.
        name: of the tensor.
        file: in which it lies.
        offset: of its first byte there.
        nbytes: its size.
        dtype: as it is stored.
        shape: of it.
        base: whether it is the base model's.
        bytes_read: of it, re-reads included, for all output tensors that need it.
    """

    model: str
    name: str
    file: str
    offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]
    base: bool
    bytes_read: int


@dataclass(frozen=True, slots=True)
class Destination:
    """A place of the output: file, offset of the first byte in it, and the name of the tensor there."""

    name: str
    file: str
    offset: int


@dataclass(frozen=True, slots=True)
class Explanation:
    """How one output tensor is made.

    Args:
        name: of it.
        shape: of it.
        dtype: to which it is rounded.
        nbytes: its size.
        how: ``copy``, ``same`` or ``merge``.
        method: the merge method.
        parameters: the values that hold for this tensor, after gradients and filters; a tuple has one for each source.
        slice: where it stands in the recipe; None outside the layers.
        sources: in recipe order.
        passes: how often it goes through them.
        chunks: how many pieces are read, and the elements (bytes, where nothing is computed) of each.
        tile: the elements that are computed on at once; 0 where nothing is computed.
        device: that computes it.
        steps: the numbers of its steps in the schedule, from 1.
        destinations: of the tensor itself, and of others that are equal and made with it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    how: str
    method: str
    parameters: dict[str, Any]
    slice: SliceOf | None
    sources: tuple[Source, ...]
    passes: int
    chunks: int
    chunk: int
    tile: int
    device: str
    steps: tuple[int, ...]
    destinations: tuple[Destination, ...]

    def to_dict(self) -> dict[str, Any]:
        """As ``plan --explain --json`` prints it."""
        from dataclasses import asdict

        return asdict(self)


def explain(plan: Plan, name: str) -> Explanation:
    """How the output tensor `name` is made. Raises UsageError where there is none, with the nearest names."""
    graph, layout, schedule = plan.built.graph, plan.layout, plan.schedule
    number = next((number for number, output in enumerate(graph.outputs) if output.label == name), None)
    if number is None:
        raise UsageError(_no_such_tensor(plan, name))
    node = graph.outputs[number].node
    operation = graph.operation(node)
    same = [number, *(other for other, output in enumerate(graph.outputs) if output.node == node and other != number)]
    chunk = schedule.chunk_elements[node]
    steps = [(place, step) for place, step in enumerate(schedule.steps, 1) if step.node == node]
    device = steps[0][1].device if steps else 0
    merged = operation.kind is Kind.MERGE
    return Explanation(
        name=name,
        shape=graph.shape(node),
        dtype=graph.node_dtype[node].name,
        nbytes=graph.nbytes(node),
        how=operation.kind.value,
        method=operation.method,
        parameters=dict(operation.parameters),
        slice=slice_of(plan, name),
        sources=_sources(plan, node, operation),
        passes=operation.passes,
        chunks=schedule.chunks(graph, node),
        chunk=chunk,
        tile=min(tile_length(graph, node, schedule.tile_elements[device]), graph.elements(node), chunk)
        if merged
        else 0,
        device=schedule.budget.devices[device].name if merged else "",
        steps=tuple(place for place, _ in steps),
        destinations=tuple(
            Destination(graph.outputs[n].label, layout.shards[layout.shard_of[n]].name, layout.offset_of[n])
            for n in same
        ),
    )


def _sources(plan: Plan, node: int, operation: Operation) -> tuple[Source, ...]:
    from ..engine.schedule.traffic import bytes_of_reads

    graph = plan.built.graph
    read = bytes_of_reads(graph, plan.schedule)
    return tuple(
        Source(
            graph.models[graph.read_models[number]],
            graph.read_names[number],
            str(graph.reads[number].file),
            graph.reads[number].offset,
            graph.reads[number].nbytes,
            graph.reads[number].dtype.name,
            graph.reads[number].shape,
            place == operation.base,
            read[number],
        )
        for place, number in enumerate(graph.node_sources[node])
    )


def slice_of(plan: Plan, name: str) -> SliceOf | None:
    """The slice that an output tensor is of; None for one outside the layers, and for layers beyond the slices."""
    donor = plan.built.models[plan.built.donor]
    found = donor.layers.split(name)
    if found is None:
        return None
    stack = next(number for number, stack in enumerate(donor.layers.mains) if stack.prefix == found.stack)
    for module in modules_of(plan.stage):
        if plan.stage.modules is not None and donor.layers.module(module.name) != donor.layers.mains[stack]:
            continue
        first = 0
        slices = module.slices or ()
        for number, part in enumerate(slices, 1):
            ranges = _ranges(plan, part, stack)
            count = ranges[0][2] - ranges[0][1]
            if found.index < first + count:
                inside = found.index - first
                return SliceOf(
                    number,
                    len(slices),
                    module.name,
                    found.index,
                    ranges,
                    tuple(start + inside for _, start, _ in ranges),
                    layer_position(inside, count),
                )
            first += count
    return None


def _ranges(plan: Plan, part: Slice, stack: int) -> tuple[tuple[str, int, int], ...]:
    """The layers of each source of a slice."""
    models = {model.reference: model for model in plan.built.models}
    whole = plan.built.stacks[stack].sources if stack < len(plan.built.stacks) else ()
    found = []
    for source in part.sources:
        model = models.get(source.model)
        count = model.layers.mains[stack].count if model is not None else len(whole)
        first, end = source.layer_range or (0, count)
        found.append((source.model.text, first, end))
    return tuple(found)


def _no_such_tensor(plan: Plan, name: str) -> str:
    """What there is instead: the nearest names, or the reason why an input tensor of that name is not in the output."""
    for unused in plan.built.unused:
        if name in unused.tensors:
            return f"--explain {name}: {unused.model} has it, but no output tensor is made of it: {unused.reason}"
    near = nearest_names(name, [output.label for output in plan.built.graph.outputs])
    if not near:
        return (
            f"--explain {name}: the output has no tensor of that name; `mergeloom inspect MODEL --tensors` lists names"
        )
    return f"--explain {name}: the output has no tensor of that name; did you mean {' or '.join(near)}?"


def nearest_names(name: str, names: Sequence[str]) -> list[str]:
    """Up to three of the names: those that end with what was asked for or hold it, else those that look like it.

    Names that differ only in their numbers are compared once: there may be 90,000 of them.
    """
    near = [other for other in names if other.endswith(name)] or [other for other in names if name in other]
    if near:
        return near[:_NAMES]
    patterns: dict[str, list[str]] = {}
    for other in names:
        patterns.setdefault(_NUMBER.sub("*", other), []).append(other)
    numbers = _NUMBER.findall(name)

    def strangeness(other: str) -> int:
        return sum(a != b for a, b in zip_longest(numbers, _NUMBER.findall(other)))

    close = get_close_matches(_NUMBER.sub("*", name), patterns, n=_NAMES, cutoff=0.5)
    return [min(patterns[pattern], key=strangeness) for pattern in close]


# ------------------------------------------------------------------------------------------------ for people


def explanation_sections(found: Explanation) -> list[Section]:
    """What people read of it."""
    shape = " x ".join(f"{size:,}" for size in found.shape) or "scalar"
    sections = [
        Section(found.name, [("is", f"{found.dtype}, {shape}: {data_size(found.nbytes)}"), ("made", _how(found))])
    ]
    if found.slice is not None:
        sections.append(_slice(found.slice))
    sections.append(_sources_section(found))
    if found.parameters:
        sections.append(_parameters(found))
    sections += [_work(found), _places(found)]
    return sections


def _how(found: Explanation) -> str:
    if found.how == "copy":
        return f"by {found.method}: the bytes of its source, unchanged"
    if found.how == "same":
        return "by copying, where all sources have the same bytes; the merge finds out"
    return f"by {found.method}, of {plural(len(found.sources), 'tensor')}"


def _slice(found: SliceOf) -> Section:
    where = f"{found.number} of {found.slices}" + (f" of {found.module}" if found.module != "default" else "")
    layers = [
        f"layer {layer} of {model}" + (f", of [{first}, {end})" if found.slices > 1 else "")
        for (model, first, end), layer in zip(found.ranges, found.layers, strict=True)
    ]
    fields = [("slice", where), ("layer", f"{found.layer} of the output"), ("made of", listed(layers, 8))]
    fields.append(("gradients", f"taken at {found.position:.4g}, where 0 is the slice's first layer and 1 its last"))
    return Section("Place", fields)


def _sources_section(found: Explanation) -> Section:
    rows = tuple(
        (
            source.model + (" (base)" if source.base else ""),
            source.name,
            source.dtype,
            str(list(source.shape)),
            data_size(source.nbytes),
            f"{source.offset:,}",
            source.file.rpartition("/")[2],
            f"{source.bytes_read / source.nbytes:.3g}x" if source.nbytes else "",
        )
        for source in found.sources
    )
    header = ("model", "tensor", "dtype", "shape", "size", "offset", "file", "read")
    return Section("Sources", grid=Grid(header, rows, frozenset(("size", "offset", "read"))))


def _parameters(found: Explanation) -> Section:
    shared = {name: value for name, value in found.parameters.items() if not isinstance(value, tuple)}
    each = {name: value for name, value in found.parameters.items() if isinstance(value, tuple)}
    grid = None
    if each:
        rows = tuple(
            (source.model, *("base" if source.base else _shown(value[place]) for value in each.values()))
            for place, source in enumerate(found.sources)
            if all(place < len(value) for value in each.values())
        )
        grid = Grid(("model", *each), rows, frozenset(each))
    return Section("Parameters", [(name, _shown(value)) for name, value in shared.items()], grid)


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _work(found: Explanation) -> Section:
    fields = []
    if found.passes > 1:
        looks = plural(found.passes - 1, "reduction")
        fields.append(("passes", f"{found.passes}: {looks}, and the one that makes the output"))
    if found.how == "merge":
        size = f"of up to {found.chunk:,} elements" if found.chunks > 1 else "that holds all of it"
        fields.append(("pieces", f"{plural(found.chunks, 'chunk')} {size}, computed in tiles of {found.tile:,}"))
        fields.append(("device", found.device))
    else:
        fields.append(("pieces", f"{plural(found.chunks, 'chunk')} of up to {memory_size(found.chunk)}"))
    if found.steps:
        fields.append(("steps", f"{_span(found.steps)} of the schedule"))
    return Section("Work", fields)


def _span(steps: Sequence[int]) -> str:
    whole = len(steps) > 1 and steps[-1] - steps[0] == len(steps) - 1
    return f"{steps[0]:,} to {steps[-1]:,}" if whole else ", ".join(f"{step:,}" for step in steps)


def _places(found: Explanation) -> Section:
    rows = tuple((place.name, place.file, f"{place.offset:,}") for place in found.destinations)
    lines = ("They are equal: read and made once, and written to each place.",) if len(rows) > 1 else ()
    return Section("Destination", grid=Grid(("tensor", "file", "offset"), rows, frozenset(("offset",))), lines=lines)
