"""Inspects a checkpoint: tensors, layers, dtypes, sizes and files, from the headers alone."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from ...errors import CheckpointError
from ...io.safetensors.checkpoint import Checkpoint
from ...io.safetensors.tensors import TensorRef
from ...io.units import plural
from .checks.formats import format_name
from .checks.identify import not_a_model
from .layers import LayerMap, Stack, find_layers
from .open import open_model, reference_of
from .quantized import quantized_tensors

_FILES_SHOWN = 8
_OUTSIDE_SHOWN = 12


@dataclass(frozen=True, slots=True)
class Inspection:
    """The result of inspecting a checkpoint.

    Args:
        checkpoint: the checkpoint.
        layers: the checkpoint's stacks of layers; None if they can't be determined.
        remarks: unusual properties of the checkpoint.
    """

    checkpoint: Checkpoint
    layers: LayerMap | None
    remarks: tuple[str, ...]

    @property
    def tensors(self) -> Sequence[TensorRef]:
        """All tensors, in file order."""
        return tuple(self.checkpoint.tensors.values())

    def in_stack(self, stack: Stack) -> list[tuple[str, TensorRef]]:
        """The tensors in the layers of a stack, extra layers included."""
        prefix = stack.prefix + "."
        return [
            (name, ref)
            for name, ref in self.checkpoint.tensors.items()
            if name.startswith(prefix) and name[len(prefix) :].split(".", 1)[0].isdigit()
        ]

    def outside(self) -> list[tuple[str, TensorRef]]:
        """The tensors outside all stacks of layers."""
        inside = {name for stack in self.stacks for name, _ in self.in_stack(stack)}
        return [(name, ref) for name, ref in self.checkpoint.tensors.items() if name not in inside]

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
            "architectures": config.get("architectures"),
            "model_type": config.get("model_type"),
            "tensors": len(checkpoint.tensors),
            "parameters": total_elements(self.tensors),
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
                    "bytes": total_bytes(ref for _, ref in inside),
                }
                for stack in self.stacks
            ],
            "outside": [name for name, _ in self.outside()],
            "dtypes": {
                name: {"tensors": len(refs), "parameters": total_elements(refs), "bytes": total_bytes(refs)}
                for name, refs in self.by_dtype().items()
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
            data["tensor_list"] = [
                {
                    "name": name,
                    "dtype": ref.dtype.name,
                    "shape": list(ref.shape),
                    "bytes": ref.nbytes,
                    "file": ref.file.name,
                    "offset": ref.offset,
                }
                for name, ref in checkpoint.tensors.items()
            ]
        return data

    def by_dtype(self) -> dict[str, list[TensorRef]]:
        """The tensors of each dtype, ordered by total size, the largest first."""
        groups: dict[str, list[TensorRef]] = {}
        for ref in self.tensors:
            groups.setdefault(ref.dtype.name, []).append(ref)
        return dict(sorted(groups.items(), key=lambda item: -total_bytes(item[1])))

    def by_file(self) -> dict[Path, list[TensorRef]]:
        """The tensors in each file, in the order of the file names."""
        files: dict[Path, list[TensorRef]] = {file: [] for file in self.checkpoint.files}
        for ref in self.tensors:
            files[ref.file].append(ref)
        return files


def inspect_model(model: str | os.PathLike[str]) -> Inspection:
    """Inspect a checkpoint.

    Args:
        model: a directory, a .safetensors file, an index, or a Hub repository.

    Raises:
        UsageError: if the name is not valid.
        CheckpointError: if the checkpoint is missing or damaged.
    """
    checkpoint = open_model(reference_of(str(model)))
    remarks = list(checkpoint.remarks)
    layers: LayerMap | None = None
    try:
        layers = find_layers(checkpoint.tensors, checkpoint.config)
    except CheckpointError as error:  # the rest of the inspection may show the cause
        remarks.append(str(error))
    remarks += [problem.partition("\n")[0].rstrip(":") for problem in islice(not_a_model(checkpoint), 1)]
    quantized = quantized_tensors(checkpoint)
    if quantized:
        name, reason = next(iter(quantized.items()))
        label = format_name(checkpoint, quantized)
        count = plural(len(quantized), "tensor")
        remarks.append(f"{count} quantized or a scale of a quantized one: {label} ({name}: {reason})")
    if checkpoint.config is None:
        remarks.append("there is no config.json next to the weights")
    return Inspection(checkpoint, layers, tuple(remarks))


def total_elements(refs: Iterable[TensorRef]) -> int:
    """Number of elements of all `refs`."""
    return sum(ref.elements for ref in refs)


def total_bytes(refs: Iterable[TensorRef]) -> int:
    """Size of all `refs` in bytes."""
    return sum(ref.nbytes for ref in refs)
