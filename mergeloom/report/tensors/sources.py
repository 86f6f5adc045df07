"""Describes the sources of one output tensor: the values that it is computed from, and where they are stored."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

from ...engine.model.logical import LogicalTensor, LogicalTensors
from ...io.tensors.assembled import stored_parts
from ...io.tensors.refs import TensorRef
from ...io.units import data_size
from ...methods.kernel.decoder import Encoder
from ..sections import Grid, Section

if TYPE_CHECKING:
    from ...engine.graph.graph import MergeGraph, Operation
    from ...engine.model.inputs import Model
    from ...engine.run.plan import Plan
    from ...methods.kernel.access import Access


_Leaf = tuple[int, str, "Access"]
"""A loaded tensor: the number of its model, its name, and which of its elements are used."""


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
    leaves: dict[_Leaf, Source] = {}
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
    bases, values = _base_reads(plan, node), _values(plan.built.models, leaves)
    sources: dict[tuple[int, str], Source] = {}
    for leaf, stored in leaves.items():
        model, name, _ = leaf
        based, found = (model, name) in bases, values.get(leaf, [])
        if not found or _is_source(plan.built.models[model], name):
            sources.setdefault((model, name), replace(stored, base=stored.base or based))
        for value in (each for each in found if each.uses[0] == leaf):  # in the order of their first parts
            parts = tuple(leaves[use] for use in value.uses)
            key = value.model.number, value.tensor.name
            is_base = based and (not value.is_shared or value.model.reference == plan.recipe.stages[-1].base_model)
            sources.setdefault(key, _computed(value, parts, base=is_base))
    return tuple(sources.values())


class _Value(NamedTuple):
    """A value of a model that is computed from parts.

    Args:
        model: the model.
        tensor: the value.
        uses: for each part, the number of the model that has it, its name and its access.
    """

    model: Model
    tensor: LogicalTensor
    uses: tuple[_Leaf, ...]

    @property
    def is_shared(self) -> bool:
        """Whether parts are other models' tensors: it has adapters, or rows of other models."""
        return self.tensor.adapted


def _is_source(model: Model, name: str) -> bool:
    """Whether the recipe names a model that has the tensor as it is stored, not only as a part of others' values."""
    return model.named and name in model.tensors and isinstance(model.tensors[name], TensorRef)


def _values(models: Sequence[Model], leaves: Collection[_Leaf]) -> dict[_Leaf, list[_Value]]:
    """Return for each part the values that it belongs to and all of whose parts are loaded.

    A value of a base is left out if one with adapters has its parts, too.
    """
    numbers = {model.reference: model.number for model in models}
    found: dict[_Leaf, list[_Value]] = {}
    for model in sorted(models, key=lambda each: not each.reference.adapters):
        if not isinstance(model.tensors, LogicalTensors):
            continue
        parts = dict.fromkeys(part for _, part, _ in leaves)
        names = model.tensors if model.reference.adapters else chain.from_iterable(map(model.tensors.values_of, parts))
        for tensor in map(model.tensors.__getitem__, dict.fromkeys(names)):
            if not isinstance(tensor, LogicalTensor):
                continue
            owners = [numbers.get(part.owner or model.reference.base, -1) for part in tensor.parts]
            uses = tuple((owner, part.name, part.access) for owner, part in zip(owners, tensor.parts, strict=True))
            if not all(use in leaves for use in uses) or (not model.named and any(use in found for use in uses)):
                continue
            for use in uses:
                found.setdefault(use, []).append(_Value(model, tensor, uses))
    return found


def _computed(value: _Value, parts: tuple[Source, ...], *, base: bool) -> Source:
    """Return the source of a value that is computed from parts."""
    first, tensor = parts[0], value.tensor
    read = sum(part.bytes_read for part in parts)
    kind = tensor.dtype.name, tensor.shape, base, read, tensor.format, parts
    return Source(value.model.name, tensor.name, tensor.name, first.file, first.offset, tensor.stored_bytes, *kind)


def _base_reads(plan: Plan, node: int) -> set[tuple[int, str]]:
    """Return the models and names of what the base of a node is computed from, if the recipe has a single stage."""
    graph = plan.built.unfused
    if graph is None or plan.built.intermediates:
        return set()
    node = _method_node(graph, graph.outputs[plan.built.graph.outputs.nodes.index(node)].node)
    base = graph.operation(node).base
    if base is None:
        return set()
    value = graph.node_sources[node][base]
    reads = (value,) if value >= 0 else graph.reads_of(~value)
    return {(graph.read_models[read], graph.read_names[read]) for read in reads}


def _method_node(graph: MergeGraph, node: int) -> int:
    """Return the node of the method whose output a node stores: encoders and conversions know no base."""
    while (value := graph.node_sources[node][0]) < 0 and (kernel := graph.operation(node).kernel) is not None:
        if kernel.copies is None and not isinstance(kernel.bound[0], Encoder):
            break
        node = ~value
    return node


def sources_section(sources: Sequence[Source]) -> Section:
    """Return the table of the sources; below a value that is computed from parts, its parts."""
    rows = []
    for source in sources:
        model = source.model + (" (base)" if source.base else "")
        if not source.parts:
            rows.append(_stored_row(model, source.name + _renamed(source), source))
            continue
        rows.append((model, source.name, f"{source.dtype} ({source.format})", str(list(source.shape)), *[""] * 4))
        for part in source.parts:
            owner = "" if source.model.startswith(part.model) else part.model
            rows.append(_stored_row(owner, f"  from {part.name}{_renamed(part)}", part))
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
