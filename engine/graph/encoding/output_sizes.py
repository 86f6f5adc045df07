"""Compares the size of an output with quantized tensors with those that it would have in other formats."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from ....io.tensors.dtypes import BF16
from ....io.tensors.dtypes import Kind as ElementKind
from ...model.inputs import Model
from ...model.logical import LogicalTensor, LogicalTensors
from ..graph import MergeGraph
from .linear import LinearWeights, without_numbers
from .output_values import OutputValue, has_formats, output_values
from .sizes import sizes_of


@dataclass(frozen=True, slots=True)
class OutputSizes:
    """The sizes of an output in bytes, by the form of the tensors that are quantized in it or in the donor.

    Args:
        tensors: number of these tensors.
        as_stored: if all of them are stored as in the donor.
        bfloat16: if all of them are in bfloat16.
        fp8_blocks: if those that can be are stored as FP8 blocks, and the others in bfloat16; 0 if none can be.
        format: names of the donor's formats; empty if it is not quantized.
        writable: whether mergeloom writes that format.
    """

    tensors: int
    as_stored: int
    bfloat16: int
    fp8_blocks: int
    format: str
    writable: bool

    def to_dict(self) -> dict[str, object]:
        """Return the sizes as plain data, as ``plan --json`` prints them."""
        return {
            "tensors": self.tensors,
            "as_stored": self.as_stored,
            "bfloat16": self.bfloat16,
            "fp8_blocks": self.fp8_blocks or None,
            "stored_format": self.format or None,
            "stored_format_is_written": self.writable,
        }


def output_sizes(graph: MergeGraph, models: Sequence[Model], donor: Model) -> OutputSizes | None:
    """Return the sizes of an output in other formats; None if neither the output nor the donor is quantized.

    Args:
        graph: complete graph of a merge.
        models: the models that it reads.
        donor: the model that config.json comes from.
    """
    if not has_formats(graph, models):
        return None
    stored = _quantized(donor)
    own = {kind: like.own_bytes for kind, like in stored.items()}
    groups: Counter[tuple[str, tuple[int, ...], int]] = Counter()
    names: dict[tuple[str, tuple[int, ...], int], str] = {}
    rest = 0
    for value in output_values(graph, models):
        kind = without_numbers(value.name)
        like = stored.get(kind)
        matches = like is not None and like.shape == value.shape
        dtype = graph.node_dtype[value.node]
        if value.copied is not None:
            nbytes = value.copied.stored_bytes
        elif matches and dtype.kind is ElementKind.FLOAT and (dtype.bits >= 16 or value.format):
            nbytes = own[kind]
        elif value.format:
            nbytes = _unquantized_bytes(donor, value)
        else:
            rest += graph.nbytes(value.node)
            continue
        group = kind, value.shape, nbytes
        groups[group] += 1
        names.setdefault(group, value.name)
    sizes = sizes_of(
        ((names[group], group[1], group[2], count) for group, count in groups.items()), LinearWeights(donor).refuse
    )
    if not sizes.tensors:
        return None
    return OutputSizes(
        sizes.tensors,
        rest + sizes.stored,
        rest + sizes.plain,
        rest + sizes.blocks if sizes.encoded else 0,
        " and ".join(dict.fromkeys(each.stored_format for each in stored.values())),
        all(each.encoding is not None for each in stored.values()),
    )


def _quantized(donor: Model) -> dict[str, LogicalTensor]:
    """A quantized value of each kind that the donor has, by the name without numbers."""
    tensors, found = donor.tensors, {}
    for name in tensors.quantized if isinstance(tensors, LogicalTensors) else ():
        if (kind := without_numbers(name)) not in found and isinstance(tensor := tensors[name], LogicalTensor):
            found[kind] = tensor
    return found


def _unquantized_bytes(donor: Model, value: OutputValue) -> int:
    """The bytes of a value that the donor does not store quantized."""
    own = donor.tensors.get(value.name)
    return (BF16 if own is None else own.dtype).nbytes(prod(value.shape))
