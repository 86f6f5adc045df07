"""Refuses quantized tensors where their values are needed, and formats that can't be written."""

from __future__ import annotations

from collections.abc import Iterable

from ....errors import CheckpointError
from ....io.tensors.dtypes import Kind as ElementKind
from ....io.units import data_size
from ...model.checks.formats import format_name, unquantized
from ...model.logical import LogicalTensor
from ..values import Input


def refuse_quantized(inputs: Iterable[Input], why: str = "") -> None:
    """Raise CheckpointError if any of the tensors is quantized, since arithmetic needs the actual values.

    Args:
        inputs: the tensors.
        why: another reason why a quantized tensor can't be used, or empty.
    """
    for each in inputs:
        if isinstance(each.kind, LogicalTensor):
            continue
        dtype = each.kind.dtype
        reason = each.model.quantized.get(each.name)
        if reason is None and dtype.kind is ElementKind.FLOAT and dtype.bits % 8 == 0 and dtype.name != "F8_E8M0":
            continue
        reason = reason or f"it is {dtype.name}"
        checkpoint = each.model.checkpoint
        label = format_name(checkpoint, each.model.quantized or (each.name,))
        raise CheckpointError(
            f"tensor {each.name} of {each.model.name} is quantized ({label}; {reason}){why}: dequantization is not "
            f"supported yet; {unquantized(each.model.reference.text, checkpoint)}. passthrough without dtype copies "
            "the tensor unchanged"
        )


def refuse_format(donor: Input, *, encodes: bool) -> None:
    """Raise CheckpointError if a computed tensor can't be stored in the format of the tensor that `same` refers to.

    Args:
        donor: that tensor.
        encodes: whether the stage's output is stored in formats at all.
    """
    tensor = donor.kind
    if not isinstance(tensor, LogicalTensor) or not tensor.decoded or (encodes and tensor.encoding is not None):
        return
    if tensor.adapted and not tensor.quantized:
        return  # stored like the base
    where = "which mergeloom reads but does not write" if encodes else "which an intermediate stage does not write"
    raise CheckpointError(
        f"tensor {donor.name} of {donor.model.name} is stored in the format {tensor.format}, {where}, and out_dtype "
        f"`same` needs it: set a dtype for such tensors, as in `out_dtype: [{{filter: {donor.name}, value: bfloat16}}, "
        f"{{value: same}}]` ({data_size(tensor.stored_bytes)} become {data_size(2 * tensor.elements)})"
    )
