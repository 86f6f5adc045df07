"""The report of `mergeloom inspect`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from ..engine.model.contents.diffusion import DiffusionModel
from ..engine.model.inspect import Inspection, stored_bytes, total_bytes, total_elements
from ..engine.model.logical import LogicalTensor, label_of
from ..engine.model.roles import is_head, tied_embedding
from ..io.checkpoint.contents import SAFETENSORS
from ..io.tensors.refs import TensorRef
from ..io.units import big_number, data_size, listed, plural, ranges
from .sections import Grid, Section

_FILES_SHOWN = 8
_NON_LAYER_SHOWN = 12


def inspection_sections(inspection: Inspection, *, tensors: bool = False) -> list[Section]:
    """Return the sections that describe a checkpoint.

    Args:
        inspection: inspection of the checkpoint.
        tensors: whether to list every tensor.
    """
    checkpoint = inspection.checkpoint
    title = "+".join((os.fspath(checkpoint.path), *(adapter.name for adapter in inspection.adapters)))
    sections = [Section(title, _facts(inspection))]
    diffusion = inspection.description.diffusion
    sections += [_layers(inspection) if diffusion is None else _parts(diffusion), _dtypes(inspection)]
    if diffusion is None and (outside := inspection.outside()):
        sections.append(_non_layer_tensors(outside))
    sections.append(_files(inspection))
    if inspection.remarks:
        sections.append(Section("Remarks", lines=inspection.remarks, warns=True))
    if tensors:
        rows = tuple(
            (name, tensor.dtype.name, str(list(tensor.shape)), *_stored(tensor))
            for name, tensor in inspection.values.items()
        )
        header = ("tensor", "dtype", "shape", "size", "file")
        sections.append(Section("Tensors", grid=Grid(header, rows, frozenset(("size",)))))
    return sections


def _facts(inspection: Inspection) -> list[tuple[str, str]]:
    config = inspection.checkpoint.config or {}
    tensors, values = inspection.tensors, inspection.values
    description = inspection.description
    fields = [
        ("architecture" if description.kind == "model" else "content", description.title),
        ("source", description.source_text),
        ("parameters", f"{big_number(total_elements(values.values()))} in {plural(len(values), 'tensor')}"),
        ("size", data_size(total_bytes(tensors))),
    ]
    fields += [("adapter", f"{adapter.name}: {adapter.title}") for adapter in inspection.adapters]
    if inspection.checkpoint.kind != SAFETENSORS:
        fields.insert(2, ("format", inspection.checkpoint.kind))
    for name, found in inspection.formats().items():
        size = data_size(sum(each.stored_bytes for each in found))
        dtypes = " and ".join(sorted({each.dtype.name for each in found}))
        fields.append(("quantized", f"{plural(len(found), 'tensor')} in {name} ({size}), decoded to {dtypes}"))
    if experts := str(inspection.experts):
        fields.append(("experts", experts))
    head = next((name for name in values if is_head(name)), None)
    if head is not None:
        fields.append(("head", head))
    elif _is_tied(config) and (embedding := tied_embedding("lm_head.weight", values)) is not None:
        fields.append(("head", f"tied to {embedding}"))
    return fields


def _stored(tensor: TensorRef | LogicalTensor) -> tuple[str, str]:
    """The size of a tensor, and the file that it is in, or the format that it is stored in."""
    if isinstance(tensor, TensorRef):
        return data_size(tensor.nbytes), tensor.file.name
    return data_size(tensor.stored_bytes), f"{tensor.format} of {plural(len(tensor.parts), 'tensor')}"


def _is_tied(config: Mapping[str, Any]) -> bool:
    """Whether a config, or one nested in it, ties the head to the embedding."""
    if config.get("tie_word_embeddings") is True:
        return True
    return any(_is_tied(value) for key, value in config.items() if key.endswith("_config") and isinstance(value, dict))


def _parts(model: DiffusionModel) -> Section:
    rows = tuple(
        (part.name, part.prefix, f"{part.tensors:,}", f"{part.elements:,}", data_size(part.nbytes))
        for part in model.parts
    )
    header = ("part", "prefix", "tensors", "parameters", "size")
    return Section("Parts", grid=Grid(header, rows, frozenset(header[2:])))


def _layers(inspection: Inspection) -> Section:
    if not inspection.stacks:
        return Section("Layers", lines=("none found",))
    rows = []
    mains = inspection.layers.mains if inspection.layers is not None else ()
    for stack in inspection.stacks:
        inside = inspection.in_stack(stack)
        extra = f" + extra {ranges(stack.extras)}" if stack.extras else ""
        key = ".".join((*stack.config_path, stack.config_key)) if stack.config_key else "tensor names"
        rows.append(
            (
                stack.prefix,
                f"{stack.count}{extra}",
                f"{len(inside):,}",
                data_size(stored_bytes(ref for _, ref in inside)),
                key if stack in mains else "tensor names; recipes can't slice it",
            )
        )
    header = ("stack", "layers", "tensors", "size", "count from")
    return Section("Layers", grid=Grid(header, tuple(rows), frozenset(("layers", "tensors", "size"))))


def _dtypes(inspection: Inspection) -> Section:
    rows = tuple(
        (name, f"{len(group):,}", f"{total_elements(group):,}", data_size(stored_bytes(group)))
        for name, group in inspection.by_dtype().items()
    )
    header = ("dtype", "tensors", "parameters", "size")
    return Section("Dtypes", grid=Grid(header, rows, frozenset(header[1:])))


def _non_layer_tensors(outside: Sequence[tuple[str, TensorRef | LogicalTensor]]) -> Section:
    rows = tuple(
        (name, label_of(tensor), str(list(tensor.shape)), data_size(stored_bytes([tensor])))
        for name, tensor in outside[:_NON_LAYER_SHOWN]
    )
    more = (f"and {len(outside) - _NON_LAYER_SHOWN:,} more (--tensors lists all)",) if len(outside) > len(rows) else ()
    grid = Grid(("tensor", "dtype", "shape", "size"), rows, frozenset(("size",)))
    return Section("Outside the layers", grid=grid, lines=more)


def _files(inspection: Inspection) -> Section:
    files = list(inspection.by_file().items())
    shown = files if len(files) <= _FILES_SHOWN else [*files[: _FILES_SHOWN // 2], *files[-_FILES_SHOWN // 2 :]]
    rows = [(file.name, f"{len(refs):,}", data_size(total_bytes(refs))) for file, refs in shown]
    if len(shown) < len(files):
        omitted = [refs for _, refs in files[_FILES_SHOWN // 2 : -_FILES_SHOWN // 2]]
        size = data_size(sum(map(total_bytes, omitted)))
        rows.insert(_FILES_SHOWN // 2, (f"... {len(omitted):,} more", f"{sum(map(len, omitted)):,}", size))
    ignored = inspection.checkpoint.ignored
    lines = (f"ignored: {listed((file.name for file in ignored), 5)}",) if ignored else ()
    title = "Files" if len(files) == 1 else f"Files: {len(files):,}"
    grid = Grid(("file", "tensors", "size"), tuple(rows), frozenset(("tensors", "size")))
    return Section(title, grid=grid, lines=lines)
