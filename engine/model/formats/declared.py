"""What config.json says about the format of a model's quantized weights."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ....errors import CheckpointError
from ....io.checkpoint.checkpoint import Checkpoint
from ....io.open_source import quoted
from ....io.tensors.dtypes import BF16, DTYPES, DType
from ....methods.formats import scaled
from ....methods.kernel.decoder import Decoder
from ..checks.formats import quantization_config
from ..logical import LogicalTensor

_BLOCKS = re.compile(r"(\d{1,6})x(\d{1,6})")
_CODES: dict[Decoder, tuple[int, bool]] = {
    **dict.fromkeys((scaled.FP8_BLOCKS, scaled.FP8_CHANNELS, scaled.FP8_TENSOR), (8, True)),
    **dict.fromkeys((scaled.INT8, scaled.INT8_PACKED), (8, False)),
    scaled.INT4_PACKED: (4, False),
    **dict.fromkeys((scaled.MXFP4, scaled.NVFP4_MULTIPLIED, scaled.NVFP4_DIVIDED), (4, True)),
}
"""Bits of the codes of each format, and whether they are floating-point numbers."""
_NOMINAL = {"bfloat16": BF16, "float16": DTYPES["F16"], "float32": DTYPES["F32"]}


@dataclass(frozen=True, slots=True)
class Weights:
    """How weights are quantized.

    Args:
        key: key in config.json that says so, for error messages.
        bits: bits of a code.
        is_float: whether codes are floating-point numbers.
        strategy: what shares a scale: ``tensor``, ``channel``, ``block``, ``group``, or empty if it isn't stated.
        block: rows and columns of a block; None if they aren't stated.
        group: columns that share a scale; 0 if there are no groups.
        symmetric: whether there are no zero points.
    """

    key: str
    bits: int = 8
    is_float: bool = True
    strategy: str = ""
    block: tuple[int, int] | None = None
    group: int = 0
    symmetric: bool = True

    @property
    def shared(self) -> tuple[int, int] | None:
        """Rows and columns that share a scale: those of a block or a group; None if neither is stated."""
        return self.block or ((1, self.group) if self.group else None)


@dataclass(frozen=True, slots=True)
class Declared:
    """The description of quantized weights in config.json.

    Args:
        key: its key; empty without a description.
        stated: the key in it that names the format.
        method: value of ``quant_method``, or of ``quant_algo`` for ModelOpt, in lowercase.
        form: value of ``format``, in lowercase.
        weights: the ways in which weights are quantized.
        expert_dtype: DeepSeek-V4's ``expert_dtype``; empty if it isn't stated.
        power_of_two: whether scales are powers of two, whatever their dtype.
    """

    key: str = ""
    stated: str = ""
    method: str = ""
    form: str = ""
    weights: tuple[Weights, ...] = ()
    expert_dtype: str = ""
    power_of_two: bool = False

    def of(self, bits: int, *, is_float: bool) -> Weights | None:
        """The only way in which weights with such codes are quantized; None if none or several are described."""
        found = [each for each in self.weights if each.bits == bits and each.is_float == is_float]
        return found[0] if len(found) == 1 else None


def declared_weights(checkpoint: Checkpoint) -> Declared:
    """Read the description of quantized weights in config.json.

    Raises:
        CheckpointError: a key of the description has an invalid value.
    """
    found = quantization_config(checkpoint.config)
    if found is None:
        return Declared()
    key, section = found
    method, stated = str(section.get("quant_method") or "").lower(), f"{key}.quant_method"
    if method == "modelopt":
        method, stated = str(section.get("quant_algo") or method).lower(), f"{key}.quant_algo"
    experts = section.get("expert_dtype", (checkpoint.config or {}).get("expert_dtype"))
    weights: tuple[Weights, ...] = ()
    if isinstance(groups := section.get("config_groups"), Mapping):
        weights = tuple(
            _of_group(checkpoint, f"{key}.config_groups.{name}.weights", group["weights"])
            for name, group in groups.items()
            if isinstance(group, Mapping) and isinstance(group.get("weights"), Mapping)
        )
    elif method in ("fp8", "mxfp8"):
        size = section.get("weight_block_size")
        block = None if size is None else _block(checkpoint, f"{key}.weight_block_size", size)
        sized = f"{key}.weight_block_size" if block else stated
        weights = (Weights(sized, strategy="block" if block else "", block=block),)
    elif method == "fbgemm_fp8":
        weights = (Weights(stated, strategy="channel"),)
    form, powers = str(section.get("format") or "").lower(), section.get("scale_fmt") == "ue8m0"
    return Declared(key, stated, method, form, weights, str(experts or "").lower(), powers)


def key_of(checkpoint: Checkpoint, tensor: LogicalTensor) -> str:
    """Return the key in config.json that describes the format of a quantized value; empty if none does."""
    declared = declared_weights(checkpoint)
    if not declared.key or tensor.decode is None or tensor.decode.decoder not in _CODES:
        return declared.key
    bits, is_float = _CODES[tensor.decode.decoder]
    weights = declared.of(bits, is_float=is_float)
    if weights is not None:
        return weights.key
    return "expert_dtype" if bits == 4 and declared.method == "fp8" else declared.stated


def _of_group(checkpoint: Checkpoint, key: str, weights: Mapping[str, Any]) -> Weights:
    """The weights of a group of compressed-tensors."""
    bits, group = weights.get("num_bits"), weights.get("group_size")
    if not isinstance(bits, int):
        raise CheckpointError(f"{checkpoint.path}: config.json: {key}.num_bits is {quoted(bits)}, not a number")
    structure = weights.get("block_structure")
    block = None if structure is None else _block(checkpoint, f"{key}.block_structure", structure)
    return Weights(
        key,
        bits,
        weights.get("type") == "float",
        str(weights.get("strategy") or ""),
        block,
        group if isinstance(group, int) and group > 0 else 0,
        weights.get("symmetric") is not False,
    )


def _block(checkpoint: Checkpoint, key: str, value: object) -> tuple[int, int]:
    """The rows and columns of a block: ``[128, 128]`` or ``"128x128"``."""
    numbers: Sequence[object] = value if isinstance(value, Sequence) else ()
    if isinstance(value, str) and (match := _BLOCKS.fullmatch(value)):
        numbers = [int(match[1]), int(match[2])]
    if len(numbers) == 2 and all(type(number) is int and number > 0 for number in numbers):
        rows, columns = numbers
        assert isinstance(rows, int)
        assert isinstance(columns, int)
        return rows, columns
    raise CheckpointError(
        f"{checkpoint.path}: config.json: {key} is {quoted(value)}: expected rows and columns of a block, such as "
        "[128, 128]"
    )


def nominal_dtype(checkpoint: Checkpoint) -> DType:
    """The dtype of a model's values if they were not quantized: that of config.json, or else bfloat16."""
    config = checkpoint.config or {}
    sections = [config, *(value for key, value in config.items() if key.endswith("_config"))]
    for section in sections:
        for key in ("dtype", "torch_dtype"):
            name = section.get(key) if isinstance(section, Mapping) else None
            if isinstance(name, str) and name.removeprefix("torch.") in _NOMINAL:
                return _NOMINAL[name.removeprefix("torch.")]
    return BF16
