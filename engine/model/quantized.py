"""Which tensors are quantized: their values mean nothing without others (scales, zero points) beside them."""

from __future__ import annotations

from collections.abc import Mapping

from ...io.safetensors.tensors import TensorRef

_SCALES = ("_scale_inv", "_scale", "_scales", ".absmax", ".SCB")
"""Endings that a scale's name has beyond that of the tensor that it scales."""
_PACKED = ("qweight", "weight_packed")
"""The last components of packed weights' names; what stands beside them is theirs, but for the bias."""
_PACKED_ENDINGS = ("_blocks", "_packed")


def quantized_tensors(tensors: Mapping[str, TensorRef]) -> Mapping[str, str]:
    """The quantized tensors among `tensors`, and their scales, each with the reason in words."""
    found: dict[str, str] = {}
    packed: dict[str, str] = {}
    for name in tensors:
        for ending in _SCALES:
            scaled = name.removesuffix(ending)
            if scaled == name:
                continue
            if ending == ".SCB":
                scaled += ".weight"
            if scaled in tensors:
                found[scaled] = f"{name} scales it"
                found[name] = f"it scales {scaled}"
        module, _, last = name.rpartition(".")
        if last in _PACKED:
            packed[module] = name
        if last in _PACKED or name.endswith(_PACKED_ENDINGS):
            found[name] = "its name is that of packed values"
    for name in tensors:
        module, _, last = name.rpartition(".")
        if module in packed and last != "bias":
            found.setdefault(name, f"it belongs to {packed[module]}")
    return found
