"""Explains one output tensor: its sources, parameters, chunks and steps, and where it is written."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher, get_close_matches
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from ..engine.graph.graph import Kind, Operation
from ..engine.recipe.parameters import layer_position
from ..engine.recipe.types import modules_of
from ..engine.schedule.tiling import tile_length
from ..errors import UsageError
from ..io.units import data_size, listed, memory_size, plural
from ..methods.kernel.access import GatheredRows
from .parameters import StageParameters, stage_parameters, values_section
from .sections import Grid, Section
from .tensors.sources import Source, find_sources, sources_section
from .tensors.vocabulary import section_of

if TYPE_CHECKING:
    from ..engine.recipe.types import Slice
    from ..engine.run.plan import Plan

_NAMES = 3
_NUMBER = re.compile(r"\d+")


@dataclass(frozen=True, slots=True)
class SliceOf:
    """The slice of the recipe that an output layer belongs to.

    Args:
        number: number of the slice in its module, from 1.
        slices: number of slices in the module.
        module: name of the module.
        layer: layer of the output.
        ranges: model and layer range [first, end) of each source.
        layers: layer of each source that the output layer is made of.
        position: position of the layer in a gradient, from 0 to 1.
    """

    number: int
    slices: int
    module: str
    layer: int
    ranges: tuple[tuple[str, int, int], ...]
    layers: tuple[int, ...]
    position: float


@dataclass(frozen=True, slots=True)
class Destination:
    """A location in the output.

    Args:
        name: name of the tensor.
        file: name of the shard.
        offset: offset of the tensor's first byte in the shard.
    """

    name: str
    file: str
    offset: int


@dataclass(frozen=True, slots=True)
class Explanation:
    """How one output tensor is made.

    Args:
        name: name of the tensor.
        shape: shape of the tensor.
        dtype: dtype of the output.
        nbytes: size in bytes.
        how: kind of the operation: ``copy``, ``same`` or ``merge``.
        method: name of the merge method.
        tensors_from: filter of the recipe's `tensors_from` that chose the source; empty if none did.
        parameters: values for this tensor after gradients and filters; a tuple has one value for each source. If the
            tensor goes through several stages, the values of each: ``{"0. slerp": {"t": 0.5}, "1. ties": ...}``.
        stages: parameters of each stage that the tensor goes through, with the names of the stage's sources.
        slice: slice of the recipe; None outside the layers.
        sources: input tensors in recipe order.
        passes: number of passes over the sources.
        chunks: number of chunks.
        chunk: elements in a chunk (bytes, if nothing is computed).
        tile: elements that are computed at once, which on the CPU are those of a chunk; 0 if nothing is computed.
        device: name of the device that computes.
        steps: numbers of the tensor's steps in the schedule, from 1.
        destinations: locations of the tensor, then of identical tensors that are made with it.
        vocabulary: where the rows of the models' embeddings come from, if the tensor is gathered from them; else None.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    how: str
    method: str
    tensors_from: str
    parameters: dict[str, Any]
    stages: tuple[StageParameters, ...]
    slice: SliceOf | None
    sources: tuple[Source, ...]
    passes: int
    chunks: int
    chunk: int
    tile: int
    device: str
    steps: tuple[int, ...]
    destinations: tuple[Destination, ...]
    vocabulary: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the content of ``plan --explain --json``."""
        from dataclasses import asdict

        return asdict(self)


def explain(plan: Plan, name: str) -> Explanation:
    """Explain the output tensor `name`. Raises UsageError with the closest names if there is none."""
    graph, layout, schedule = plan.built.graph, plan.layout, plan.schedule
    number = next((number for number, output in enumerate(graph.outputs) if output.label == name), None)
    if number is None:
        raise UsageError(_missing_tensor(plan, name))
    node = graph.outputs[number].node
    computing = graph.results_with(node)[0]
    operation = plan.built.inlined.operation(computing)
    same = [number, *(other for other, output in enumerate(graph.outputs) if output.node == node and other != number)]
    chunk = schedule.chunk_elements[node]
    steps = [(position, step) for position, step in enumerate(schedule.steps, 1) if step.node == computing]
    device = steps[0][1].device if steps else 0
    merged = operation.kind is Kind.MERGE
    stages = stage_parameters(plan, computing)
    return Explanation(
        name=name,
        shape=graph.shape(node),
        dtype=graph.node_dtype[node].name,
        nbytes=graph.nbytes(node),
        how=operation.kind.value,
        method=stages[0].method if len(stages) == 1 else operation.method,
        tensors_from=next((each.filter for each in plan.stage.tensors_from if each.filter in name), ""),
        parameters=stages[0].parameters if len(stages) == 1 else {each.label: each.parameters for each in stages},
        stages=stages,
        slice=slice_of(plan, name),
        sources=find_sources(plan, computing, operation),
        passes=graph.operation(computing).passes,
        chunks=schedule.chunks(graph, computing),
        chunk=chunk,
        tile=_tile(plan, computing, device) if merged else 0,
        device=schedule.budget.devices[device].name if merged else "",
        steps=tuple(position for position, _ in steps),
        destinations=tuple(
            Destination(graph.outputs[n].label, layout.shards[layout.shard_of[n]].name, layout.offset_of[n])
            for n in same
        ),
        vocabulary=_vocabulary(plan, operation),
    )


def _vocabulary(plan: Plan, operation: Operation) -> dict[str, Any] | None:
    """Return where the rows of the models' embeddings come from, if an operation gathers them; else None."""
    gathers = any(isinstance(access, GatheredRows) for access in operation.accesses)
    return plan.built.vocabulary.to_dict() if gathers and plan.built.vocabulary is not None else None


def slice_of(plan: Plan, name: str) -> SliceOf | None:
    """Return the slice of an output tensor; None outside the layers, and for layers beyond the slices."""
    donor = plan.built.models[plan.built.donor]
    layer = donor.layers.split(name)
    if layer is None:
        return None
    stack = next(number for number, stack in enumerate(donor.layers.mains) if stack.prefix == layer.stack)
    for module in modules_of(plan.stage):
        if plan.stage.modules is not None and donor.layers.module(module.name) != donor.layers.mains[stack]:
            continue
        first = 0
        slices = module.slices or ()
        for number, part in enumerate(slices, 1):
            ranges = _ranges(plan, part, stack)
            count = ranges[0][2] - ranges[0][1]
            if layer.index < first + count:
                index = layer.index - first
                return SliceOf(
                    number,
                    len(slices),
                    module.name,
                    layer.index,
                    ranges,
                    tuple(start + index for _, start, _ in ranges),
                    layer_position(index, count),
                )
            first += count
    return None


def _ranges(plan: Plan, part: Slice, stack: int) -> tuple[tuple[str, int, int], ...]:
    """Return the model and the layer range of each source of a slice."""
    models = {model.reference: model for model in plan.built.models}
    stage_layers = plan.built.stacks[stack].sources if stack < len(plan.built.stacks) else ()
    ranges = []
    for source in part.sources:
        model = models.get(source.model)
        count = model.layers.mains[stack].count if model is not None else len(stage_layers)
        first, end = source.layer_range or (0, count)
        ranges.append((source.model.text, first, end))
    return tuple(ranges)


def _missing_tensor(plan: Plan, name: str) -> str:
    """Return the error for an unknown tensor: the closest names, or the reason why an input tensor is not used."""
    for unused in plan.built.unused:
        if name in unused.tensors:
            return f"--explain {name}: this tensor of {unused.model} is not used by the output: {unused.reason}"
    near = nearest_names(name, [output.label for output in plan.built.graph.outputs])
    if not near:
        return f"--explain {name}: no such output tensor; `mergeloom inspect MODEL --tensors` lists names"
    return f"--explain {name}: no such output tensor; did you mean {' or '.join(near)}?"


def nearest_names(name: str, names: Sequence[str]) -> list[str]:
    """Return up to three names that end with `name`, contain it or contain its parts in order, or else resemble it.

    Names that resemble it much less than the nearest one are left out. Names that differ only in their numbers are
    compared once: there can be 90,000.
    """
    parts = re.compile(r"(?:.*\.)?" + r"\.(?:.*\.)?".join(map(re.escape, name.split("."))) + r"(?:\..*)?")
    for matches in (lambda other: other.endswith(name), lambda other: name in other, parts.fullmatch):
        near = [other for other in names if matches(other)]
        if near:
            return near[:_NAMES]
    patterns: dict[str, list[str]] = {}
    for other in names:
        patterns.setdefault(_NUMBER.sub("*", other), []).append(other)
    numbers = _NUMBER.findall(name)

    def differing_numbers(other: str) -> int:
        return sum(a != b for a, b in zip_longest(numbers, _NUMBER.findall(other)))

    wanted = _NUMBER.sub("*", name)
    close = get_close_matches(wanted, patterns, n=_NAMES, cutoff=0.5)
    ratios = [SequenceMatcher(None, pattern, wanted).ratio() for pattern in close]
    close = [pattern for pattern, ratio in zip(close, ratios, strict=True) if 1 - ratio <= 2 * (1 - ratios[0])]
    return [min(patterns[pattern], key=differing_numbers) for pattern in close]


# ------------------------------------------------------------------------------------------------ report


def explanation_sections(explanation: Explanation) -> list[Section]:
    """Return the sections that describe an explanation."""
    shape = " x ".join(f"{size:,}" for size in explanation.shape) or "scalar"
    fields = [
        ("tensor", f"{explanation.dtype}, {shape}, {data_size(explanation.nbytes)}"),
        ("method", _method(explanation)),
    ]
    if explanation.tensors_from:
        fields.append(("chosen by", f"tensors_from, filter {explanation.tensors_from!r}"))
    sections = [Section(explanation.name, fields)]
    if explanation.slice is not None:
        sections.append(_slice(explanation.slice))
    sections.append(sources_section(explanation.sources))
    if explanation.vocabulary is not None:
        sections.append(section_of(explanation.vocabulary))
    several = len(explanation.stages) > 1
    sections += [values_section(values, several=several) for values in explanation.stages if values.parameters]
    sections += [_work(explanation), _destinations(explanation)]
    return sections


def _method(explanation: Explanation) -> str:
    if explanation.how == "copy":
        return f"{explanation.method}: a copy of the source's bytes"
    if explanation.how == "same":
        return "copy; the merge fails if the sources differ"
    return f"{explanation.method} of {plural(len(explanation.sources), 'tensor')}"


def _slice(part: SliceOf) -> Section:
    number = f"{part.number} of {part.slices}" + (f" in module {part.module}" if part.module != "default" else "")
    layers = [
        f"layer {layer} of {model}" + (f" [{first}, {end})" if part.slices > 1 else "")
        for (model, first, end), layer in zip(part.ranges, part.layers, strict=True)
    ]
    fields = [
        ("slice", number),
        ("output layer", str(part.layer)),
        ("input layers", listed(layers, 8)),
        ("gradients", f"position {part.position:.4g}, from 0 (first layer of the slice) to 1 (last layer)"),
    ]
    return Section("Slice", fields)


def _tile(plan: Plan, node: int, device: int) -> int:
    graph, schedule = plan.built.graph, plan.schedule
    chunk = min(graph.elements(node), schedule.chunk_elements[node])
    separate = schedule.budget.devices[device].separate
    return min(tile_length(graph, node, schedule.tile_elements[device]), chunk) if separate else chunk


def _work(explanation: Explanation) -> Section:
    fields = []
    if explanation.passes > 1:
        reductions = plural(explanation.passes - 1, "reduction")
        fields.append(("passes", f"{explanation.passes}: {reductions} and the output"))
    chunks = plural(explanation.chunks, "chunk")
    if explanation.how == "merge":
        size = f"{chunks} of up to {explanation.chunk:,} elements" if explanation.chunks > 1 else "1 chunk"
        tile = f", tile {explanation.tile:,} elements" if explanation.device != "cpu" else ""
        fields.append(("chunks", size + tile))
        fields.append(("device", explanation.device))
    else:
        fields.append(("chunks", f"{chunks} of up to {memory_size(explanation.chunk)}"))
    if explanation.steps:
        fields.append(("steps", _span(explanation.steps)))
    return Section("Work", fields)


def _span(steps: Sequence[int]) -> str:
    """Format step numbers: ``86``, ``3 to 8``, ``3, 12``."""
    consecutive = len(steps) > 1 and steps[-1] - steps[0] == len(steps) - 1
    return f"{steps[0]:,} to {steps[-1]:,}" if consecutive else ", ".join(f"{step:,}" for step in steps)


def _destinations(explanation: Explanation) -> Section:
    rows = tuple((place.name, place.file, f"{place.offset:,}") for place in explanation.destinations)
    lines = ("Identical tensors: computed once, written to each location.",) if len(rows) > 1 else ()
    return Section("Destination", grid=Grid(("tensor", "file", "offset"), rows, frozenset(("offset",))), lines=lines)
