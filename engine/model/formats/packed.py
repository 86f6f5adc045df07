"""Finds weights in integers and in 4-bit formats: compressed-tensors, ModelOpt's NVFP4, DeepSeek-V4's experts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from ....errors import CheckpointError
from ....io.checkpoint.checkpoint import Checkpoint
from ....io.tensors.dtypes import DTYPES, DType
from ....io.tensors.refs import TensorRef
from ....io.tensors.table import class_of, components, described
from ....methods.formats.scaled import (
    INT4_PACKED,
    INT8,
    INT8_PACKED,
    MXFP4,
    NVFP4_DIVIDED,
    NVFP4_MULTIPLIED,
)
from ....methods.kernel.access import ALIGNED, Access, BlockRows, Nibbles, Shape, Slice
from ....methods.kernel.decoder import Decoder
from ..logical import Decode, LogicalTensor, Part
from ..values.columns import Another
from .declared import Declared, declared_weights, nominal_dtype
from .fp8 import COMPANIONS, POWERS, SiblingNames
from .missing import missing, refuse_missing_scales

_BYTES = DTYPES["U8"]
_CODES = ("I8", "U8", "I32")
_SCALES = ("F32", "BF16", "F16")
_POWERS = ("F8_E8M0", "U8")

_SIBLINGS = ("weight_zero_point", "weight_g_idx", "weight_scale", "weight_global_scale", "weight_scale_2", "scale")
"""Last components of the names that decide about codes in a module, besides its companions."""

_Found = tuple[Decoder, Shape, tuple[Part, ...]]


def find_packed(checkpoint: Checkpoint) -> Iterator[LogicalTensor | Another]:
    """Find the weights whose codes are integers, or have four bits.

    Weights with more than codes and scales, such as zero points or a permutation, are left out: they are not decoded.

    Raises:
        CheckpointError: the shapes of codes and scales do not fit together, or scales are missing.
    """
    tensors = checkpoint.tensors
    finder: _Finder | None = None
    nominal = nominal_dtype(checkpoint)
    known: dict[tuple[object, ...], LogicalTensor] = {}  # by the classes of what a module has, of which there are few
    for name, codes in described(tensors, lambda each: each.dtype.name in _CODES and len(each.shape) == 2):
        finder = finder or _Finder(checkpoint)
        module, _, last = name.rpartition(".")
        classes = (last, id(codes), *finder.classes(module))
        if like := known.get(classes):
            names = tuple([f"{module}.{part.name.rpartition('.')[2]}" for part in like.all_parts])
            yield Another(like, f"{module}.weight" if last == "weight_packed" else name, names)
            continue
        found = finder.find(name, codes.dtype)
        if found is not None:
            decoder, shape, parts = found
            logical = f"{module}.weight" if last == "weight_packed" else name
            companions = tuple(map(finder.part, finder.names.companions(name)))
            known[classes] = LogicalTensor(logical, shape, nominal, parts, finder.decode(decoder), companions)
            yield known[classes]


class _Finder:
    """Finds the parts of one weight at a time.

    Args:
        checkpoint: the checkpoint.

    Attributes:
        names: finds what belongs to codes.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._tensors: Mapping[str, TensorRef] = checkpoint.tensors
        self._declared: Declared = declared_weights(checkpoint)
        self.names = SiblingNames(checkpoint.tensors)
        last = components(checkpoint.tensors)
        self._siblings = [each for each in (*_SIBLINGS, *COMPANIONS) if each in last]
        self._decodes: dict[int, Decode] = {}

    def classes(self, module: str) -> Iterator[int]:
        """What distinguishes modules in which the same codes are other values: the classes of what else they have."""
        for last in self._siblings:
            name = f"{module}.{last}"
            yield id(class_of(self._tensors, name)) if name in self._tensors else 0

    def decode(self, decoder: Decoder) -> Decode:
        """The use of a decoder, the same object for all tensors."""
        return self._decodes.setdefault(id(decoder), Decode(decoder))

    def part(self, name: str, access: Access = ALIGNED) -> Part:
        """A stored tensor as it is."""
        return Part(name, self._tensors[name], access)

    def find(self, name: str, dtype: DType) -> _Found | None:
        """The decoder, the shape and the parts of the weight whose codes have a name; None if they are not known."""
        module, _, last = name.rpartition(".")
        if any(f"{module}.{each}" in self._tensors for each in ("weight_zero_point", "weight_g_idx")):
            return None
        finders: dict[tuple[str, str], Callable[[str, str], _Found | None]] = {
            ("weight_packed", "I32"): self._integers,
            ("weight_packed", "U8"): self._packed_floats,
            ("weight", "U8"): self._modelopt,
            ("weight", "I8"): self._bytes,
        }
        find = finders.get((last, dtype.name))
        return None if find is None else find(name, module)

    def _integers(self, name: str, module: str) -> _Found | None:
        """compressed-tensors' ``pack-quantized``: 4 or 8 bits, the first in the lowest bits of 32."""
        scale = f"{module}.weight_scale"
        weights = self._declared.of(4, is_float=False) or self._declared.of(8, is_float=False)
        if weights is None or not weights.symmetric:
            return None
        if not self._has_scales(name, scale, weights.key):
            return None
        codes, scales = self._tensors[name], self._tensors[scale]
        rows, words = codes.shape
        columns = words * 32 // weights.bits
        if weights.group and scales.shape[1:]:
            grouped = scales.shape[1] * weights.group
            if -(-grouped * weights.bits // 32) == words:  # the last word is not full
                columns = grouped
        part = self._scales(name, (rows, columns), scale, weights.group or columns, weights.key, _SCALES)
        access: Access = Nibbles("U4")
        if weights.bits == 8:
            access = ALIGNED if columns == 4 * words else Slice(0, 4 * words)
        raw = Part.seen_as(name, codes, access, (rows, 4 * words), _BYTES)
        return INT4_PACKED if weights.bits == 4 else INT8_PACKED, (rows, columns), (raw, part)

    def _packed_floats(self, name: str, module: str) -> _Found | None:
        """compressed-tensors' ``mxfp4-pack-quantized`` and ``nvfp4-pack-quantized``."""
        scale, total = f"{module}.weight_scale", f"{module}.weight_global_scale"
        weights = self._declared.of(4, is_float=True)
        if weights is None:
            return None
        if not self._has_scales(name, scale, weights.key):
            return None
        codes, scales = self._tensors[name], self._tensors[scale]
        shape = (codes.shape[0], 2 * codes.shape[1])
        part = Part(name, codes, Nibbles("F4"))
        if total in self._tensors:
            group = self._scales(name, shape, scale, weights.group or 16, weights.key, ("F8_E4M3",))
            return NVFP4_DIVIDED, shape, (part, group, self._total(name, shape, total))
        if scales.dtype.name == "F8_E4M3":
            raise missing(self._checkpoint, name, total, weights.key)
        if scales.dtype.name not in _POWERS:
            return None
        return MXFP4, shape, (part, self._scales(name, shape, scale, weights.group or 32, weights.key, _POWERS))

    def _modelopt(self, name: str, module: str) -> _Found | None:
        """ModelOpt's NVFP4."""
        scale, total = f"{module}.weight_scale", f"{module}.weight_scale_2"
        absent = next((each for each in (scale, total) if each not in self._tensors), None)
        if absent is not None:
            if "nvfp4" in self._declared.method:
                raise missing(self._checkpoint, name, absent, f"{self._declared.key}.quant_algo")
            return None
        codes = self._tensors[name]
        shape = (codes.shape[0], 2 * codes.shape[1])
        group = self._scales(name, shape, scale, 16, self._declared.key, ("F8_E4M3",))
        return NVFP4_MULTIPLIED, shape, (Part(name, codes, Nibbles("F4")), group, self._total(name, shape, total))

    def _bytes(self, name: str, module: str) -> _Found | None:
        """compressed-tensors' ``int-quantized``, and DeepSeek-V4's experts: two numbers of E2M1 in each byte."""
        codes, scale, power = self._tensors[name], f"{module}.weight_scale", f"{module}.scale"
        weights = self._declared.of(8, is_float=False)
        if weights is not None and weights.symmetric:
            if not self._has_scales(name, scale, weights.key):
                return None
            group = self._scales(name, codes.shape, scale, weights.group or codes.shape[1], weights.key, _SCALES)
            return INT8, codes.shape, (Part(name, codes), group)
        if power in self._tensors and self._tensors[power].dtype == POWERS and self._declared.expert_dtype != "fp8":
            shape = (codes.shape[0], 2 * codes.shape[1])
            part = Part.seen_as(name, codes, Nibbles("F4"), codes.shape, _BYTES)
            return MXFP4, shape, (part, self._scales(name, shape, power, 32, "expert_dtype", _POWERS))
        if self._declared.expert_dtype == "fp4":
            self._has_scales(name, power, "expert_dtype")
        return None

    def _has_scales(self, name: str, scale: str, key: str) -> bool:
        """Whether codes have scales of this name. Raises CheckpointError if they have none of any name."""
        if scale in self._tensors:
            return True
        refuse_missing_scales(self._checkpoint, self.names.siblings(name), name, scale, key)
        return False

    def _scales(self, name: str, shape: Shape, scale: str, group: int, key: str, dtypes: tuple[str, ...]) -> Part:
        """Scales of groups of columns, or one for each row or for the tensor."""
        ref = self._tensors[scale]
        rows, columns = shape
        if ref.dtype.name not in dtypes:
            raise CheckpointError(
                f"{self._checkpoint.path}: {scale} is {ref.dtype.name}, which is not a dtype of the scales of {name}: "
                f"expected {' or '.join(dtypes)}. Download the model again"
            )
        if columns % group:
            raise CheckpointError(
                f"{self._checkpoint.path}: {name} of shape {list(self._tensors[name].shape)} holds {columns} values in "
                f"each row, which can't be divided into groups of {group} that share a scale (config.json: {key}); "
                f"{scale} has the shape {list(ref.shape)}. Download the model and its config.json again"
            )
        dtype = POWERS if ref.dtype.name == "U8" else ref.dtype
        if ref.elements == 1 and group == columns:
            return Part.seen_as(scale, ref, BlockRows(rows, columns), (1, 1), dtype)
        expected = (rows, -(-columns // group))
        if ref.shape not in (expected, expected[:1] if group == columns else expected):
            raise CheckpointError(
                f"{self._checkpoint.path}: {scale} of shape {list(ref.shape)} does not fit {name}, whose value has the "
                f"shape {list(shape)}: with a scale for each {group} columns (config.json: {key}) it has the shape "
                f"{list(expected)}. Download the model and its config.json again"
            )
        return Part.seen_as(scale, ref, BlockRows(1, group), expected, dtype)

    def _total(self, name: str, shape: Shape, total: str) -> Part:
        """The scale of a complete tensor."""
        ref = self._tensors[total]
        if ref.elements != 1 or ref.dtype.name != "F32":
            raise CheckpointError(
                f"{self._checkpoint.path}: {total} is {ref.dtype.name} of shape {list(ref.shape)}: expected one F32 "
                f"for all of {name}. Download the model again"
            )
        return Part.seen_as(total, ref, BlockRows(*shape), (1, 1))
