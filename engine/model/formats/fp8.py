"""Finds weights in FP8 with scales: one for each block of rows and columns, for each row, or for the tensor."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

from ....errors import CheckpointError
from ....io.checkpoint.checkpoint import Checkpoint
from ....io.tensors.dtypes import DTYPES, DType
from ....io.tensors.dtypes import Kind as ElementKind
from ....io.tensors.refs import TensorRef
from ....io.tensors.table import class_of, components, described
from ....methods.formats.fp8_encoder import EXPONENTS, SCALE_DTYPES
from ....methods.formats.scaled import FP8_BLOCKS, FP8_CHANNELS, FP8_TENSOR
from ....methods.kernel.access import BlockRows, Shape
from ..logical import Decode, Encoding, LogicalTensor, Part
from ..values.columns import Another
from .declared import Declared, Weights, declared_weights, nominal_dtype
from .missing import refuse_missing_scales

POWERS = DTYPES["F8_E8M0"]
_SCALE_DTYPES = ("F32", "BF16", "F16", "F8_E8M0", "U8")
"""Dtypes of scales. Bytes are exponents: the numbers of F8_E8M0, which older libraries don't have."""
COMPANIONS = (
    *("input_scale", "activation_scale", "input_scale_ub", "input_global_scale", "qscale_act", "scale_input"),
    "weight_shape",
)
"""Last components of names of what is only used while the model runs, or follows from the parts."""
_BLOCKS, _CHANNELS, _TENSOR = (Decode(each) for each in (FP8_BLOCKS, FP8_CHANNELS, FP8_TENSOR))


def is_fp8(dtype: DType) -> bool:
    """Whether codes of this dtype are numbers in FP8."""
    return dtype.kind is ElementKind.FLOAT and dtype.bits == 8 and dtype != POWERS


def find_fp8(checkpoint: Checkpoint) -> Iterator[LogicalTensor | Another]:
    """Find the FP8 tensors with scales.

    Raises:
        CheckpointError: a scale has a shape or dtype that does not fit its codes, or is missing.
    """
    tensors, nominal = checkpoint.tensors, nominal_dtype(checkpoint)
    names, declared = SiblingNames(tensors), Declared()
    known: dict[tuple[int, ...], LogicalTensor] = {}  # by the classes of what is stored, of which there are few
    for number, (name, codes) in enumerate(described(tensors, lambda each: is_fp8(each.dtype))):
        if number == 0:
            declared = declared_weights(checkpoint)
        scale = names.scale(name)
        if len(codes.shape) < 2:
            continue
        if scale is None:
            weights = declared.of(8, is_float=True)
            if weights is not None:
                ending = "_scale_inv" if weights.block else "_scale"
                refuse_missing_scales(checkpoint, names.siblings(name), name, name + ending, weights.key)
            continue
        others = (scale, *names.companions(name))
        classes = (id(codes), *(id(class_of(tensors, each)) for each in others))
        if classes in known:
            yield Another(known[classes], name, (name, *others))
            continue
        use = _use(checkpoint, name, codes.shape, scale, declared)
        scales = Part.seen_as(scale, tensors[scale], use.access, use.shape, use.dtype)
        parts, companions = (Part(name, tensors[name]), scales), tuple(Part(each, tensors[each]) for each in others[1:])
        encoding = _encoding(use, codes.dtype, scales)
        known[classes] = LogicalTensor(name, codes.shape, nominal, parts, use.decode, companions, encoding)
        yield known[classes]


class SiblingNames:
    """Finds what belongs to codes by name.

    Args:
        tensors: the tensors of a checkpoint.
    """

    def __init__(self, tensors: Mapping[str, TensorRef]) -> None:
        self._tensors = tensors
        last = components(tensors)
        self._companions = [each for each in COMPANIONS if each in last]
        self._in_module = [each for each in ("scale", "qscale_weight", "scale_weight") if each in last]
        self._modules: dict[str, set[str]] = {}  # only made for codes without known scales

    def scale(self, name: str) -> str | None:
        """The name of the scales of some codes; None if there are none that are known."""
        for suffix in ("_scale_inv", "_scale"):
            if (scale := name + suffix) in self._tensors:
                return scale
        module = name.rpartition(".")[0]
        return next((scale for each in self._in_module if (scale := f"{module}.{each}") in self._tensors), None)

    def siblings(self, name: str) -> Collection[str]:
        """Return the last components of the names in the module of some codes."""
        if not self._modules:
            for each in self._tensors:
                module, _, last = each.rpartition(".")
                self._modules.setdefault(module, set()).add(last)
        return self._modules[name.rpartition(".")[0]]

    def companions(self, name: str) -> list[str]:
        """The names of what belongs to codes without being part of their values: activation scales, or a shape."""
        if not self._companions:
            return []
        module = name.rpartition(".")[0]
        found = (f"{module}.{last}" for last in self._companions)
        return [each for each in found if each in self._tensors]


class _Use(NamedTuple):
    """How the scales of a class are used.

    Args:
        access: which scale belongs to an element.
        shape: shape of the scales for this access.
        dtype: dtype that their bits are read as.
        decode: computes the values.
        power_of_two: whether scales in other dtypes than F8_E8M0 are powers of two.
    """

    access: BlockRows
    shape: Shape
    dtype: DType
    decode: Decode
    power_of_two: bool


def _encoding(use: _Use, codes: DType, scales: Part) -> Encoding | None:
    """How other values are stored like these; None for scales in F16, one for all of a tensor, or another FP8."""
    stored = scales.as_stored.dtype
    if codes.name != "F8_E4M3" or stored.name not in SCALE_DTYPES or use.decode is _TENSOR:
        return None
    return Encoding(use.access, stored, use.power_of_two and stored.name not in EXPONENTS)


def _use(checkpoint: Checkpoint, name: str, shape: Shape, scale: str, declared: Declared) -> _Use:
    """How the scales of some codes are used."""
    ref = checkpoint.tensors[scale]
    if ref.dtype.name not in _SCALE_DTYPES:
        raise CheckpointError(
            f"{checkpoint.path}: {scale} is {ref.dtype.name}, which is not a dtype of scales: expected one of "
            f"{', '.join(_SCALE_DTYPES)}. Download the model again"
        )
    dtype = POWERS if ref.dtype.name == "U8" else ref.dtype
    *stack, rows, columns = shape
    complete = BlockRows(max(1, rows), max(1, columns))
    weights = declared.of(8, is_float=True)
    if weights is not None and weights.shared is not None:
        access = BlockRows(*weights.shared)
        if access.part_shape_fits(shape, ref.shape) and len(ref.shape) == len(shape):
            return _Use(access, ref.shape, dtype, _BLOCKS, declared.power_of_two)
        if ref.elements != 1 or len(ref.shape) == len(shape):
            raise _misfit(checkpoint, name, shape, scale, ref.shape, weights)
    by_row = rows == 1 and ref.shape != () and weights is not None and weights.strategy == "channel"
    if ref.elements == 1 and not stack and not by_row:
        return _Use(complete, (1, 1), dtype, _TENSOR, declared.power_of_two)
    if ref.shape in ((*stack, rows, 1), (*stack, rows)):
        return _Use(BlockRows(1, max(1, columns)), (*stack, rows, 1), dtype, _CHANNELS, declared.power_of_two)
    if stack and ref.shape in (tuple(stack), (*stack, 1), (*stack, 1, 1)):
        return _Use(complete, (*stack, 1, 1), dtype, _TENSOR, declared.power_of_two)
    raise _misfit(checkpoint, name, shape, scale, ref.shape, weights)


def _misfit(
    checkpoint: Checkpoint, name: str, shape: Shape, scale: str, found: Shape, weights: Weights | None
) -> CheckpointError:
    """The error for scales whose shape does not fit."""
    if weights is None or weights.shared is None:
        stated = "config.json does not say which elements share a scale (weight_block_size)"
    else:
        rows, columns = weights.shared
        expected = [*shape[:-2], -(-shape[-2] // rows), -(-shape[-1] // columns)]
        stated = f"config.json has blocks of {rows} x {columns} ({weights.key}), which need {expected}"
    return CheckpointError(
        f"{checkpoint.path}: {scale} of shape {list(found)} does not fit {name} of shape {list(shape)}: {stated}. "
        "Download the model and its config.json again"
    )
