"""Refuses quantized tensors where their values are needed, and formats that can't be written."""

from __future__ import annotations

from collections.abc import Iterable

from ....errors import CheckpointError
from ....io.tensors.dtypes import Kind as ElementKind
from ....io.units import data_size, plural
from ....methods.formats.scaled import FP8_BLOCKS, FP8_CHANNELS
from ...model.checks.formats import format_name, unquantized
from ...model.formats.declared import key_of
from ...model.logical import Encoding, LogicalTensor
from ...recipe.entries.block_format import BlockFormat
from ...recipe.entries.dtype_lookup import Refuse
from ..encoding.sizes import quantized_sizes
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


def refuse_format(donor: Input, refuse: Refuse, blocks: BlockFormat | None, *, encodes: bool) -> None:
    """Raise CheckpointError if a computed tensor can't be stored in the format of the tensor that `same` refers to.

    Args:
        donor: that tensor.
        refuse: says which tensors can't be stored as FP8 blocks instead.
        blocks: the format that the recipe asks for, for other tensors; None if it asks for none.
        encodes: whether the stage's output is stored in formats at all.
    """
    tensor = donor.kind
    if not isinstance(tensor, LogicalTensor) or not tensor.decoded:
        return
    if tensor.adapted and not tensor.quantized:
        return  # stored like the base
    if encodes and tensor.encoding is not None:
        if blocks is None or donor.stored_as(Encoding.of(blocks)):
            return
        raise CheckpointError(
            f"{_described(donor, tensor)}, which is not that of `fp8_blocks` ({blocks.label}), and config.json can "
            "only describe one: use out_dtype `same` or `fp8_blocks` for all quantized tensors, or bfloat16 for those "
            "of one of the two"
        )
    if encodes:
        where = f"which mergeloom reads but does not write{_difference(tensor)}"
        sizes = quantized_sizes(donor.model, refuse, writable=False)
    else:  # nor does it write FP8 blocks
        where = "which an intermediate stage does not write"
        sizes = quantized_sizes(donor.model, lambda *_: where, writable=True)
    raise CheckpointError(
        f"{_described(donor, tensor)}, {where}, and out_dtype `same` needs it. Set {sizes.alternatives} for the "
        f"{plural(sizes.tensors, 'tensor')} in such formats ({data_size(sizes.stored)} as stored), for some of them "
        "with `filter`"
    )


def _described(donor: Input, tensor: LogicalTensor) -> str:
    """The tensor with its format, and the key in config.json that says so."""
    key = key_of(donor.model.checkpoint, tensor)
    stated = f" (config.json: {key})" if key else ""
    return f"tensor {donor.name} of {donor.model.name} is stored in the format {tensor.stored_format}{stated}"


def _difference(tensor: LogicalTensor) -> str:
    """What differs from a written format of the same name, in parentheses; empty if no format of this name is."""
    if tensor.decode is None or tensor.decode.decoder not in (FP8_BLOCKS, FP8_CHANNELS):
        return ""
    codes, *scales = (part.as_stored.dtype.name for part in tensor.own_parts)
    return f" with codes in {codes} and scales in {' and '.join(scales)}"
