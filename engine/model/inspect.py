"""What a checkpoint holds: tensors, layers, dtypes, sizes and files, from its headers."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import CheckpointError
from ...io.safetensors.checkpoint import Checkpoint
from ...io.safetensors.tensors import TensorRef
from ...io.wording import big_number, data_size, listed, plural, ranges
from ...report.sections import Grid, Section
from .layers import LayerMap, Stack, find_layers, is_head, tied_embedding
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
            "parameters": _elements(self.tensors),
            "bytes": _bytes(self.tensors),
            "layers": self.layers.main.count if self.layers is not None else None,
            "stacks": [
                {
                    "prefix": stack.prefix,
                    "layers": stack.count,
                    "extra_layers": list(stack.extras),
                    "main": self.layers is not None and stack in self.layers.mains,
                    "config_key": ".".join((*stack.config_path, stack.config_key)) if stack.config_key else None,
                    "tensors": len(inside := self.in_stack(stack)),
                    "bytes": _bytes(ref for _, ref in inside),
                }
                for stack in self.stacks
            ],
            "outside": [name for name, _ in self.outside()],
            "dtypes": {
                name: {"tensors": len(refs), "parameters": _elements(refs), "bytes": _bytes(refs)}
                for name, refs in self.by_dtype().items()
            },
            "files": [
                {"name": file.name, "tensors": len(refs), "bytes": _bytes(refs)}
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
        return dict(sorted(found.items(), key=lambda item: -_bytes(item[1])))

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


def inspection_sections(inspection: Inspection, *, tensors: bool = False) -> list[Section]:
    """What people read of a checkpoint.

    Args:
        inspection: of it.
        tensors: whether every tensor is listed, too.
    """
    checkpoint = inspection.checkpoint
    sections = [Section(os.fspath(checkpoint.path), _facts(inspection)), _layers(inspection), _dtypes(inspection)]
    if outside := inspection.outside():
        sections.append(_outside(outside))
    sections.append(_files(inspection))
    if inspection.remarks:
        sections.append(Section("Remarks", lines=inspection.remarks, warns=True))
    if tensors:
        rows = tuple(
            (name, ref.dtype.name, str(list(ref.shape)), data_size(ref.nbytes), ref.file.name)
            for name, ref in checkpoint.tensors.items()
        )
        header = ("tensor", "dtype", "shape", "size", "file")
        sections.append(Section("Tensors", grid=Grid(header, rows, frozenset(("size",)))))
    return sections


def _facts(inspection: Inspection) -> list[tuple[str, str]]:
    config = inspection.checkpoint.config or {}
    names = config.get("architectures")
    tensors = inspection.tensors
    fields = []
    if isinstance(names, list) and names:
        fields.append(("architecture", ", ".join(map(str, names))))
    fields += [
        ("parameters", f"{big_number(_elements(tensors))} in {plural(len(tensors), 'tensor')}"),
        ("size", data_size(_bytes(tensors))),
    ]
    head = next((name for name in inspection.checkpoint.tensors if is_head(name)), None)
    if head is not None:
        fields.append(("head", head))
    elif (
        _is_tied(config) and (embedding := tied_embedding("lm_head.weight", inspection.checkpoint.tensors)) is not None
    ):
        fields.append(("head", f"tied to {embedding}"))
    return fields


def _is_tied(config: Mapping[str, Any]) -> bool:
    """Whether a config, or one inside it, says that the head is the embedding."""
    if config.get("tie_word_embeddings") is True:
        return True
    return any(_is_tied(value) for key, value in config.items() if key.endswith("_config") and isinstance(value, dict))


def _layers(inspection: Inspection) -> Section:
    if not inspection.stacks:
        return Section("Layers", lines=("none were found",))
    rows = []
    mains = inspection.layers.mains if inspection.layers is not None else ()
    for stack in inspection.stacks:
        inside = inspection.in_stack(stack)
        extra = f" + extra {ranges(stack.extras)}" if stack.extras else ""
        key = ".".join((*stack.config_path, stack.config_key)) if stack.config_key else "its names"
        rows.append(
            (
                stack.prefix,
                f"{stack.count}{extra}",
                f"{len(inside):,}",
                data_size(_bytes(ref for _, ref in inside)),
                key if stack in mains else "its names; recipes don't slice it",
            )
        )
    header = ("stack", "layers", "tensors", "size", "known from")
    return Section("Layers", grid=Grid(header, tuple(rows), frozenset(("layers", "tensors", "size"))))


def _dtypes(inspection: Inspection) -> Section:
    rows = tuple(
        (name, f"{len(refs):,}", f"{_elements(refs):,}", data_size(_bytes(refs)))
        for name, refs in inspection.by_dtype().items()
    )
    header = ("dtype", "tensors", "parameters", "size")
    return Section("Dtypes", grid=Grid(header, rows, frozenset(header[1:])))


def _outside(outside: Sequence[tuple[str, TensorRef]]) -> Section:
    rows = tuple(
        (name, ref.dtype.name, str(list(ref.shape)), data_size(ref.nbytes)) for name, ref in outside[:_OUTSIDE_SHOWN]
    )
    more = (f"and {len(outside) - _OUTSIDE_SHOWN:,} more (--tensors lists all)",) if len(outside) > len(rows) else ()
    grid = Grid(("tensor", "dtype", "shape", "size"), rows, frozenset(("size",)))
    return Section("Outside the layers", grid=grid, lines=more)


def _files(inspection: Inspection) -> Section:
    files = list(inspection.by_file().items())
    shown = files if len(files) <= _FILES_SHOWN else [*files[: _FILES_SHOWN // 2], *files[-_FILES_SHOWN // 2 :]]
    rows = [(file.name, f"{len(refs):,}", data_size(_bytes(refs))) for file, refs in shown]
    if len(shown) < len(files):
        left = [refs for _, refs in files[_FILES_SHOWN // 2 : -_FILES_SHOWN // 2]]
        size = data_size(sum(map(_bytes, left)))
        rows.insert(_FILES_SHOWN // 2, (f"... {len(left):,} more", f"{sum(map(len, left)):,}", size))
    ignored = inspection.checkpoint.ignored
    lines = (f"ignored: {listed((file.name for file in ignored), 5)}",) if ignored else ()
    title = "Files" if len(files) == 1 else f"Files: {len(files):,}"
    grid = Grid(("file", "tensors", "size"), tuple(rows), frozenset(("tensors", "size")))
    return Section(title, grid=grid, lines=lines)


def _elements(refs: Iterable[TensorRef]) -> int:
    return sum(ref.elements for ref in refs)


def _bytes(refs: Iterable[TensorRef]) -> int:
    return sum(ref.nbytes for ref in refs)
