"""Inspects a checkpoint: tensors, layers, dtypes, sizes and files, from the headers alone."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from ...errors import CheckpointError
from ...io.checkpoint.checkpoint import Checkpoint
from ...io.tensors.refs import TensorRef
from ...io.units import data_size, plural, short_number
from .adapters.loaded import Adapter
from .adapters.values import with_adapters
from .checks.formats import format_name
from .checks.identify import check_is_model, not_a_model
from .contents.describe import Description, describe_checkpoint
from .contents.diffusion import layers_of
from .experts.storage import ExpertStorage, storage_of
from .formats.registry import tensors_of, unknown_quantized
from .layers import LayerMap, Stack
from .logical import LogicalTensor, LogicalTensors, Tensors, label_of
from .open import open_adapters, open_named

_FILES_SHOWN = 8
_OUTSIDE_SHOWN = 12


@dataclass(frozen=True, slots=True)
class Inspection:
    """The result of inspecting a checkpoint.

    Args:
        checkpoint: the checkpoint.
        layers: the checkpoint's stacks of layers; None if they can't be determined.
        remarks: unusual properties of the checkpoint.
        values: what the model consists of: its stored tensors, or values that are computed from several of them.
        description: what the checkpoint is.
        experts: how experts are stored.
        adapters: adapters that are applied to the checkpoint.
    """

    checkpoint: Checkpoint
    layers: LayerMap | None
    remarks: tuple[str, ...]
    values: Tensors
    description: Description
    experts: ExpertStorage = field(default_factory=ExpertStorage)
    adapters: tuple[Adapter, ...] = ()

    def __repr__(self) -> str:
        """One line with the path, layers and size."""
        layers = f"{plural(self.layers.main.count, 'layer')}, " if self.stacks and self.layers is not None else ""
        size = (
            f"{short_number(total_elements(self.values.values()))} parameters, {data_size(total_bytes(self.tensors))}"
        )
        remarks = f", {plural(len(self.remarks), 'remark')}" if self.remarks else ""
        path = os.fspath(self.checkpoint.path)
        return f"<Inspection of {path!r}: {plural(len(self.values), 'tensor')}, {layers}{size}{remarks}>"

    @property
    def tensors(self) -> Sequence[TensorRef]:
        """All stored tensors, in file order, those of adapters last."""
        own = tuple(self.checkpoint.tensors.values())
        return own + tuple(ref for adapter in self.adapters for ref in adapter.checkpoint.tensors.values())

    def in_stack(self, stack: Stack) -> list[tuple[str, TensorRef | LogicalTensor]]:
        """The tensors in the layers of a stack, extra layers included."""
        prefix = stack.prefix + "."
        return [
            (name, ref)
            for name, ref in self.values.items()
            if name.startswith(prefix) and name[len(prefix) :].split(".", 1)[0].isdigit()
        ]

    def outside(self) -> list[tuple[str, TensorRef | LogicalTensor]]:
        """The tensors outside all stacks of layers."""
        inside = {name for stack in self.stacks for name, _ in self.in_stack(stack)}
        return [(name, ref) for name, ref in self.values.items() if name not in inside]

    @property
    def stacks(self) -> tuple[Stack, ...]:
        """Every numbered list of layers, the main ones first."""
        return self.layers.stacks if self.layers is not None else ()

    def to_dict(self, *, tensors: bool = False) -> dict[str, Any]:
        """The inspection as plain data, as ``inspect --json`` prints it. Sizes are in bytes."""
        checkpoint = self.checkpoint
        config = checkpoint.config or {}
        data: dict[str, Any] = {
            "path": os.fspath(checkpoint.path),
            "adapters": [adapter.to_dict() for adapter in self.adapters],
            "content": self.description.to_dict(),
            "format": checkpoint.kind,
            "architectures": config.get("architectures"),
            "model_type": config.get("model_type"),
            "tensors": len(self.values),
            "parameters": total_elements(self.values.values()),
            "bytes": total_bytes(self.tensors),
            "layers": self.layers.main.count if self.layers is not None else None,
            "stacks": [
                {
                    "prefix": stack.prefix,
                    "layers": stack.count,
                    "extra_layers": list(stack.extras),
                    "main": self.layers is not None and stack in self.layers.mains,
                    "config_key": ".".join((*stack.config_path, stack.config_key)) if stack.config_key else None,
                    "tensors": len(inside := self.in_stack(stack)),
                    "bytes": stored_bytes(ref for _, ref in inside),
                }
                for stack in self.stacks
            ],
            "outside": [name for name, _ in self.outside()],
            "experts": self.experts.to_dict(),
            "dtypes": {
                name: {"tensors": len(group), "parameters": total_elements(group), "bytes": stored_bytes(group)}
                for name, group in self.by_dtype().items()
            },
            "formats": {
                name: {
                    "tensors": len(found),
                    "parameters": total_elements(found),
                    "bytes": sum(each.stored_bytes for each in found),
                }
                for name, found in self.formats().items()
            },
            "files": [
                {"name": file.name, "tensors": len(refs), "bytes": total_bytes(refs)}
                for file, refs in self.by_file().items()
            ],
            "ignored": [file.name for file in checkpoint.ignored],
            "metadata": dict(checkpoint.metadata),
            "remarks": list(self.remarks),
        }
        if tensors:
            data["tensor_list"] = [_listed(name, tensor) for name, tensor in self.values.items()]
        return data

    def by_dtype(self) -> dict[str, list[TensorRef | LogicalTensor]]:
        """The tensors of each dtype and format, ordered by the size of what is stored, the largest first."""
        groups: dict[str, list[TensorRef | LogicalTensor]] = {}
        for tensor in self.values.values():
            groups.setdefault(label_of(tensor), []).append(tensor)
        return dict(sorted(groups.items(), key=lambda item: -stored_bytes(item[1])))

    def formats(self) -> dict[str, list[LogicalTensor]]:
        """The quantized tensors of each format that can be decoded."""
        groups: dict[str, list[LogicalTensor]] = {}
        for value in self.values.values() if isinstance(self.values, LogicalTensors) else ():
            if isinstance(value, LogicalTensor) and value.quantized:
                groups.setdefault(value.format, []).append(value)
        return groups

    def by_file(self) -> dict[Path, list[TensorRef]]:
        """The stored tensors in each file, in the order of the file names."""
        sources = (self.checkpoint, *(adapter.checkpoint for adapter in self.adapters))
        files: dict[Path, list[TensorRef]] = {file: [] for source in sources for file in source.files}
        for ref in self.tensors:
            files[ref.file].append(ref)
        return files


def inspect_model(model: str | os.PathLike[str]) -> Inspection:
    """Inspect a checkpoint.

    Args:
        model: a directory, a file of weights, an index, or a Hub repository, or one of these with ``+adapter``.

    Raises:
        UsageError: if the name is not valid.
        CheckpointError: if the checkpoint is missing or damaged, or an adapter doesn't fit it.
    """
    reference, checkpoint = open_named(os.fspath(model))
    adapters = open_adapters(reference)
    remarks = list(checkpoint.remarks)
    values = tensors_of(checkpoint)
    if adapters:
        check_is_model(reference.base.text, checkpoint)
        values = with_adapters(reference.text, checkpoint, values, adapters)
        remarks += filter(None, (each.remark(reference.base.text, checkpoint) for each in adapters))
    description = describe_checkpoint(checkpoint)
    layers: LayerMap | None = None
    try:
        layers = layers_of(values, checkpoint.config)
    except CheckpointError as error:  # the rest of the inspection may show the cause
        remarks += [] if description.diffusion is not None else [str(error)]
    remarks += [problem.partition("\n")[0].rstrip(":") for problem in islice(not_a_model(checkpoint), 1)]
    quantized = unknown_quantized(checkpoint, values)
    if quantized:
        name, reason = next(iter(quantized.items()))
        label = format_name(checkpoint, quantized)
        count = plural(len(quantized), "tensor")
        remarks.append(f"{count} quantized or a scale of a quantized one: {label} ({name}: {reason})")
    if description.kind == "state dict" and not checkpoint.standalone:
        remarks.append("there is no config.json next to the weights")
    experts = storage_of(checkpoint.tensors)
    return Inspection(checkpoint, layers, tuple(remarks), values, description, experts, adapters)


def _listed(name: str, tensor: TensorRef | LogicalTensor) -> dict[str, Any]:
    """A tensor of ``inspect --json --tensors``."""
    shown: dict[str, Any] = {"name": name, "dtype": tensor.dtype.name, "shape": list(tensor.shape)}
    if isinstance(tensor, TensorRef):
        return shown | {"bytes": tensor.nbytes, "file": tensor.file.name, "offset": tensor.offset}
    parts = [_listed(part.name, part.ref) for part in tensor.parts]
    return shown | {"format": tensor.format, "bytes": tensor.stored_bytes, "parts": parts}


def total_elements(refs: Iterable[TensorRef | LogicalTensor]) -> int:
    """Number of elements of all `refs`."""
    return sum(ref.elements for ref in refs)


def total_bytes(refs: Iterable[TensorRef]) -> int:
    """Size of all `refs` in bytes."""
    return sum(ref.nbytes for ref in refs)


def stored_bytes(tensors: Iterable[TensorRef | LogicalTensor]) -> int:
    """Size in bytes of what all `tensors` are stored as."""
    return sum(tensor.nbytes if isinstance(tensor, TensorRef) else tensor.stored_bytes for tensor in tensors)
