"""Finds the experts of gpt-oss: MXFP4 in blocks of 16 bytes, whose values are the transposed matrices.

``X_blocks`` of shape (experts, outputs, groups, 16) and ``X_scales`` of shape (experts, outputs, groups) are the value
``X`` of shape (experts, 32 x groups, outputs) of the unquantized model (transformers, integrations/mxfp4.py).
"""

from __future__ import annotations

from collections.abc import Iterator

from ....errors import CheckpointError
from ....io.checkpoint.checkpoint import Checkpoint
from ....io.tensors.table import described
from ....methods.formats.scaled import MXFP4
from ....methods.kernel.access import TransposedSlice
from ..logical import Decode, LogicalTensor, Part
from .declared import declared_weights, nominal_dtype
from .fp8 import POWERS
from .missing import missing

_BLOCKS, _SCALES = "_blocks", "_scales"
_BYTES = 16
"""Bytes of a group: 32 numbers of four bits."""


def find_mxfp4_blocks(checkpoint: Checkpoint) -> Iterator[LogicalTensor]:
    """Find the tensors in blocks, if config.json has ``quant_method: mxfp4``.

    Raises:
        CheckpointError: the shapes of blocks and scales do not fit together, or scales are missing.
    """
    tensors, decode, nominal = checkpoint.tensors, Decode(MXFP4), nominal_dtype(checkpoint)
    is_declared: bool | None = None
    for name, _ in described(tensors, lambda each: each.dtype.name == "U8" and len(each.shape) == 4):
        value = name.removesuffix(_BLOCKS)
        if value == name:
            continue
        if is_declared is None:
            is_declared = declared_weights(checkpoint).method == "mxfp4"
        if not is_declared:
            return
        if f"{value}{_SCALES}" not in tensors:
            raise missing(checkpoint, name, f"{value}{_SCALES}", "quantization_config.quant_method")
        blocks, scales = tensors[name], tensors[f"{value}{_SCALES}"]
        experts, outputs, groups, size = blocks.shape
        if size != _BYTES or scales.shape != (experts, outputs, groups) or scales.dtype.name != "U8":
            raise CheckpointError(
                f"{checkpoint.path}: {name} of shape {list(blocks.shape)} and {value}{_SCALES} ({scales.dtype.name}) "
                f"of shape {list(scales.shape)} do not fit together: MXFP4 has {_BYTES} bytes in the last dimension of "
                "blocks, and a scale in U8 for each of them. Download the model again"
            )
        width = groups * _BYTES
        parts = (
            Part.seen_as(
                name, blocks, TransposedSlice(0, width, 1, outputs * width, 2, "F4"), (experts, outputs, width)
            ),
            Part.seen_as(
                f"{value}{_SCALES}", scales, TransposedSlice(0, groups, 1, outputs * groups, 32), scales.shape, POWERS
            ),
        )
        yield LogicalTensor(value, (experts, 2 * width, outputs), nominal, parts, decode)
