"""What a checkpoint holds: tensors, layers, dtypes, sizes and files, from its headers."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import CheckpointError
from ...io.safetensors.checkpoint import Checkpoint
from ...io.safetensors.tensors import TensorRef
from ...io.units import plural
from .layers import LayerMap, Stack, find_layers
from .open import open_model, reference_of
from .quantized import quantized_tensors

_FILES_SHOWN = 8
_OUTSIDE_SHOWN = 12


@dataclass(frozen=True, slots=True)
class Inspection:
    """A checkpoint, looked at.

    Args:
        checkpoint: its headers.
        layers: which of its tensors are in which layer; None where that can't be told.
        remarks: what is odd about it.
    """

    checkpoint: Checkpoint
    layers: LayerMap | None
    remarks: tuple[str, ...]

    @property
    def tensors(self) -> Sequence[TensorRef]:
        """Where the tensors lie."""
        return tuple(self.checkpoint.tensors.values())

    def in_stack(self, stack: Stack) -> list[tuple[str, TensorRef]]:
        """The tensors in the layers of a stack, extra layers included."""
        found = []
        beginning = stack.prefix + "."
        for name, ref in self.checkpoint.tensors.items():
            if name.startswith(beginning) and name[len(beginning) :].split(".", 1)[0].isdigit():
                found.append((name, ref))
        return found

    def outside(self) -> list[tuple[str, TensorRef]]:
        """The tensors in no layer of any stack."""
        inside = {name for stack in self.stacks for name, _ in self.in_stack(stack)}
        return [(name, ref) for name, ref in self.checkpoint.tensors.items() if name not in inside]

    @property
    def stacks(self) -> tuple[Stack, ...]:
        """Every numbered list of layers, the main ones first."""
        return self.layers.stacks if self.layers is not None else ()

    def to_dict(self, *, tensors: bool = False) -> dict[str, Any]:
        """All of it as plain data, as ``inspect --json`` prints it. Sizes are in bytes."""
        checkpoint = self.checkpoint
        config = checkpoint.config or {}
        found: dict[str, Any] = {
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
            found["tensor_list"] = [
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
        return found

    def by_dtype(self) -> dict[str, list[TensorRef]]:
        """The tensors of each element type, the type with the most bytes first."""
        found: dict[str, list[TensorRef]] = {}
        for ref in self.tensors:
            found.setdefault(ref.dtype.name, []).append(ref)
        return dict(sorted(found.items(), key=lambda item: -total_bytes(item[1])))

    def by_file(self) -> dict[Path, list[TensorRef]]:
        """The tensors in each file, in the order of the files' names."""
        found: dict[Path, list[TensorRef]] = {file: [] for file in self.checkpoint.files}
        for ref in self.tensors:
            found[ref.file].append(ref)
        return found


def inspect_model(model: str | os.PathLike[str]) -> Inspection:
    """Look at a checkpoint.

    Args:
        model: a directory, a .safetensors file, an index, or a repository of the Hub.

    Raises:
        UsageError: where that is no name of a model.
        CheckpointError: where it is missing or damaged.
    """
    checkpoint = open_model(reference_of(str(model)))
    remarks = list(checkpoint.remarks)
    layers: LayerMap | None = None
    try:
        layers = find_layers(checkpoint.tensors, checkpoint.config)
    except CheckpointError as error:  # still worth looking at: that may be how the mistake is found
        remarks.append(str(error))
    quantized = quantized_tensors(checkpoint.tensors)
    if quantized:
        name, reason = next(iter(quantized.items()))
        remarks.append(f"{plural(len(quantized), 'tensor')} quantized, or a scale of one ({name}: {reason})")
    if checkpoint.config is None:
        remarks.append("there is no config.json beside the weights")
    return Inspection(checkpoint, layers, tuple(remarks))


def total_elements(refs: Iterable[TensorRef]) -> int:
    """Number of elements of some tensors."""
    return sum(ref.elements for ref in refs)


def total_bytes(refs: Iterable[TensorRef]) -> int:
    """Size of some tensors in bytes."""
    return sum(ref.nbytes for ref in refs)
