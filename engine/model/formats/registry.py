"""The formats that mergeloom reads, and the tensors of a checkpoint in any of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain

from ....io.checkpoint.checkpoint import Checkpoint
from ..checks.descriptions import unknown_setting
from ..checks.formats import quantization_config
from ..logical import ArrangedTensors, LogicalTensor, LogicalTensors, Tensors
from ..quantized import quantized_tensors
from ..values.columns import Another
from .fp8 import find_fp8
from .mxfp4_blocks import find_mxfp4_blocks
from .packed import find_packed
from .skip_lists import unlisted
from .strided import find_views

Format = Callable[[Checkpoint], Iterable[LogicalTensor | Another]]
"""A function that finds the values of a format in a checkpoint: first by its config.json, then by their names."""

FORMATS: dict[str, Format] = {
    "view": find_views,
    "fp8": find_fp8,
    "packed": find_packed,
    "mxfp4 blocks": find_mxfp4_blocks,
}
"""The known formats by name."""


def tensors_of(checkpoint: Checkpoint) -> Tensors:
    """Return the tensors of a checkpoint: the stored ones, but for those that are parts of values in a known format.

    Raises:
        CheckpointError: a value is of a known format, but its parts don't fit together, or contradict config.json.
    """
    found = _found(checkpoint)
    first = next(found, None)
    return checkpoint.tensors if first is None else LogicalTensors(checkpoint.tensors, chain([first], found))


def _found(checkpoint: Checkpoint) -> Iterator[LogicalTensor | Another]:
    """Find the values of a checkpoint that are not just stored tensors."""
    if isinstance(checkpoint.tensors, ArrangedTensors):
        yield from checkpoint.tensors.found
    for find in _formats_of(checkpoint) if checkpoint.files else ():  # the output of a stage has no files
        yield from unlisted(checkpoint, find(checkpoint))


def _formats_of(checkpoint: Checkpoint) -> Iterable[Format]:
    """The formats that a checkpoint's tensors can be in: none for codes if config.json describes an unknown one."""
    described = quantization_config(checkpoint.config)
    if described is not None and unknown_setting(described[1]) is not None:
        return (find_views,)
    return FORMATS.values()


def unknown_quantized(checkpoint: Checkpoint, tensors: Tensors) -> Mapping[str, str]:
    """Return the quantized tensors that are in no known format, with what belongs to them, each with the reason."""
    return quantized_tensors(checkpoint, tensors.parts if isinstance(tensors, LogicalTensors) else ())
