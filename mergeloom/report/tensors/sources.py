"""Describes the sources of one output tensor: the values that it is computed from, and where they are stored."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ...engine.model.logical import LogicalTensor, LogicalTensors
from ...io.tensors.assembled import stored_parts
from ...io.units import data_size
from ..sections import Grid, Section

if TYPE_CHECKING:
    from ...engine.graph.graph import Operation
    from ...engine.model.inputs import Model
    from ...engine.run.plan import Plan
    from ...methods.kernel.access import Access


@dataclass(frozen=True, slots=True)
class Source:
    """One input tensor, or a part of one.

    Args:
        model: name of the model in the recipe.
        name: name of the tensor.
        stored: name of the tensor in the file, which a `rename` of the recipe replaces by `name`.
        file: path of the file, that of the first part if there are several.
        offset: offset of the tensor's first byte in the file.
        nbytes: size in bytes of what is stored.
        dtype: stored dtype; the nominal one of a value that is computed from parts.
        shape: shape of the tensor.
        base: whether it belongs to the base model.
        bytes_read: bytes read of the tensor for all outputs that need it, re-reads included.
        format: format that the value is computed from; empty for a stored tensor.
        parts: stored tensors that the value is computed from; empty for a stored tensor.
        assembled: number of stored tensors that the bytes are assembled from; file and offset are the first one's.
    """

    model: str
    name: str
    stored: str
    file: str
    offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]
    base: bool
    bytes_read: int
    format: str = ""
    parts: tuple[Source, ...] = ()
    assembled: int = 1


def find_sources(plan: Plan, node: int, operation: Operation) -> tuple[Source, ...]:
    """Return the values that a node of the graph without intermediate tensors is computed from."""
    from ...engine.schedule.traffic import bytes_of_reads

    graph = plan.built.inlined
    read = bytes_of_reads(plan.built.graph, plan.schedule)
    leaves: dict[tuple[int, str, Access], Source] = {}
    for place, number in enumerate(graph.node_sources[node]):
        name = graph.read_names[number]
        stored = Source(
            graph.models[graph.read_models[number]],
            name,
            plan.built.models[graph.read_models[number]].checkpoint.stored.get(name, name),
            str(graph.reads[number].file),
            graph.reads[number].offset,
            graph.reads[number].nbytes,
            graph.reads[number].dtype.name,
            graph.reads[number].shape,
            place == operation.base,
            read[number],
            assembled=sum(1 for _ in stored_parts(graph.reads[number])),
        )
        leaves[graph.read_models[number], stored.name, graph.access(node, place)] = stored
    bases = _base_reads(plan, node)
    sources: dict[tuple[int, str], Source] = {}
    for (model, name, access), stored in leaves.items():
        value = next(_values_of(plan.built.models[model], name, access, leaves), None)
        if value is None:
            sources.setdefault((model, name), replace(stored, base=stored.base or (model, name) in bases))
        else:
            parts = tuple(leaves[model, part.name, part.access] for part in value.parts)
            sources.setdefault((model, value.name), _computed(value, parts, base=(model, name) in bases))
    return tuple(sources.values())


def _values_of(model: Model, part: str, access: Access, leaves: Container[object]) -> Iterator[LogicalTensor]:
    """Yield the values of a model that a part belongs to, and all of whose parts are loaded."""
    names = model.tensors.values_of(part) if isinstance(model.tensors, LogicalTensors) else []
    for value in map(model.tensors.__getitem__, names):
        uses = [(each.name, each.access) for each in value.parts] if isinstance(value, LogicalTensor) else []
        if (part, access) in uses and all((model.number, *use) in leaves for use in uses):
            assert isinstance(value, LogicalTensor)
            yield value


def _computed(value: LogicalTensor, parts: tuple[Source, ...], *, base: bool) -> Source:
    """Return the source of a value that is computed from parts."""
    first, read = parts[0], sum(part.bytes_read for part in parts)
    kind = value.dtype.name, value.shape, base, read, value.format, parts
    return Source(first.model, value.name, value.name, first.file, first.offset, value.stored_bytes, *kind)


def _base_reads(plan: Plan, node: int) -> set[tuple[int, str]]:
    """Return the models and names of what the base of a node is computed from, if the recipe has a single stage."""
    graph = plan.built.unfused
    if graph is None or plan.built.intermediates:
        return set()
    node = graph.outputs[plan.built.graph.outputs.nodes.index(node)].node
    base = graph.operation(node).base
    if base is None:
        return set()
    value = graph.node_sources[node][base]
    reads = (value,) if value >= 0 else graph.reads_of(~value)
    return {(graph.read_models[read], graph.read_names[read]) for read in reads}


def sources_section(sources: Sequence[Source]) -> Section:
    """Return the table of the sources; below a value that is computed from parts, its parts."""
    rows = []
    for source in sources:
        model = source.model + (" (base)" if source.base else "")
        if not source.parts:
            rows.append(_stored_row(model, source.name + _renamed(source), source))
            continue
        rows.append((model, source.name, f"{source.dtype} ({source.format})", str(list(source.shape)), *[""] * 4))
        rows += [_stored_row("", f"  from {part.name}{_renamed(part)}", part) for part in source.parts]
    header = ("model", "tensor", "dtype", "shape", "size", "offset", "file", "read")
    return Section("Sources", grid=Grid(header, tuple(rows), frozenset(("size", "offset", "read"))))


def _renamed(source: Source) -> str:
    """The name in the file, if a recipe gives the tensor another one."""
    return f" (stored as {source.stored})" if source.stored != source.name else ""


def _stored_row(model: str, name: str, source: Source) -> tuple[str, ...]:
    """Return the row of a stored tensor."""
    return (
        model,
        name,
        source.dtype,
        str(list(source.shape)),
        data_size(source.nbytes),
        f"{source.offset:,}",
        source.file.rpartition("/")[2] + (f" (first of {source.assembled:,})" if source.assembled > 1 else ""),
        f"{source.bytes_read / source.nbytes:.3g}x" if source.nbytes else "",
    )
