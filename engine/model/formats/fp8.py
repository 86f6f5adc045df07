"""Finds weights in FP8 with scales: one for each block of rows and columns, for each row, or for the tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ....errors import CheckpointError
from ....io.checkpoint.checkpoint import Checkpoint
from ....io.tensors.dtypes import DTYPES, DType
from ....io.tensors.dtypes import Kind as ElementKind
from ....io.tensors.refs import TensorRef
from ....io.tensors.table import described
from ....methods.formats.scaled import FP8_BLOCKS, FP8_CHANNELS, FP8_TENSOR
from ....methods.kernel.access import BlockRows, Shape
from ....methods.kernel.decoder import Decoder
from ..logical import Decode, LogicalTensor, Part
from .declared import Declared, Weights, declared_weights, nominal_dtype

POWERS = DTYPES["F8_E8M0"]
_SCALE_DTYPES = ("F32", "BF16", "F16", "F8_E8M0", "U8")
"""Dtypes of scales. Bytes are exponents: the numbers of F8_E8M0, which older libraries don't have."""
_COMPANIONS = (
    *("input_scale", "activation_scale", "input_scale_ub", "input_global_scale", "qscale_act", "scale_input"),
    "weight_shape",
)
"""Last components of names of what is only used while the model runs, or follows from the parts."""


def is_fp8(dtype: DType) -> bool:
    """Whether codes of this dtype are numbers in FP8."""
    return dtype.kind is ElementKind.FLOAT and dtype.bits == 8 and dtype != POWERS


def find_fp8(checkpoint: Checkpoint) -> Iterator[LogicalTensor]:
    """Find the FP8 tensors with scales.

    Raises:
        CheckpointError: a scale has a shape or dtype that does not fit its codes.
    """
    tensors = checkpoint.tensors
    declared, nominal, decodes = Declared(), nominal_dtype(checkpoint), dict[tuple[Decoder, Shape], Decode]()
    for number, (name, codes) in enumerate(described(tensors, lambda each: is_fp8(each.dtype))):
        if number == 0:
            declared = declared_weights(checkpoint)
        scale = scale_name(name, tensors)
        if scale is None or len(codes.shape) < 2:
            continue
        part, decoder = _scale(checkpoint, name, codes.shape, scale, declared)
        decode = decodes.setdefault((decoder, ()), Decode(decoder))
        yield LogicalTensor(
            name, codes.shape, nominal, (Part(name, tensors[name]), part), decode, companions(name, tensors)
        )


def scale_name(name: str, tensors: Mapping[str, TensorRef]) -> str | None:
    """The name of the scales of some codes; None if there are none that are known."""
    module = name.rpartition(".")[0]
    known = (
        *(f"{name}_scale_inv", f"{name}_scale", f"{module}.scale", f"{module}.qscale_weight"),
        f"{module}.scale_weight",  # ComfyUI
    )
    return next((each for each in known if each in tensors), None)


def companions(name: str, tensors: Mapping[str, TensorRef]) -> tuple[Part, ...]:
    """What belongs to codes without being part of their values: activation scales, or a shape."""
    module = name.rpartition(".")[0]
    found = (f"{module}.{last}" for last in _COMPANIONS)
    return tuple(Part(each, tensors[each]) for each in found if each in tensors)


def _scale(checkpoint: Checkpoint, name: str, shape: Shape, scale: str, declared: Declared) -> tuple[Part, Decoder]:
    """The scales of some codes as a part of the value, and how they are used."""
    ref = checkpoint.tensors[scale]
    if ref.dtype.name not in _SCALE_DTYPES:
        raise CheckpointError(
            f"{checkpoint.path}: {scale} is {ref.dtype.name}, which is not a dtype of scales: expected one of "
            f"{', '.join(_SCALE_DTYPES)}. Download the model again"
        )
    dtype = POWERS if ref.dtype.name == "U8" else ref.dtype
    *stack, rows, columns = shape
    weights = declared.of(8, is_float=True)
    if ref.elements == 1 and not stack:
        return Part.seen_as(scale, ref, BlockRows(max(1, rows), max(1, columns)), (1, 1), dtype), FP8_TENSOR
    if weights is not None and weights.block is not None:
        access = BlockRows(*weights.block)
        if not access.part_shape_fits(shape, ref.shape) or len(ref.shape) != len(shape):
            raise _misfit(checkpoint, name, shape, scale, ref.shape, weights)
        return Part.seen_as(scale, ref, access, ref.shape, dtype), FP8_BLOCKS
    if ref.shape in ((*stack, rows, 1), (*stack, rows)):
        return Part.seen_as(scale, ref, BlockRows(1, max(1, columns)), (*stack, rows, 1), dtype), FP8_CHANNELS
    if stack and ref.shape in (tuple(stack), (*stack, 1), (*stack, 1, 1)):
        access = BlockRows(max(1, rows), max(1, columns))
        return Part.seen_as(scale, ref, access, (*stack, 1, 1), dtype), FP8_TENSOR
    raise _misfit(checkpoint, name, shape, scale, ref.shape, weights)


def _misfit(
    checkpoint: Checkpoint, name: str, shape: Shape, scale: str, found: Shape, weights: Weights | None
) -> CheckpointError:
    """The error for scales whose shape does not fit."""
    if weights is None or weights.block is None:
        stated = "config.json does not say which elements share a scale (weight_block_size)"
    else:
        rows, columns = weights.block
        expected = [*shape[:-2], -(-shape[-2] // rows), -(-shape[-1] // columns)]
        stated = f"config.json has blocks of {rows} x {columns} ({weights.key}), which need {expected}"
    return CheckpointError(
        f"{checkpoint.path}: {scale} of shape {list(found)} does not fit {name} of shape {list(shape)}: {stated}. "
        "Download the model and its config.json again"
    )
