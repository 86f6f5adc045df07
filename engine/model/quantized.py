"""Finds quantized tensors: their values have no meaning without other tensors (scales, zero points)."""

from __future__ import annotations

from collections.abc import Mapping

from ...io.safetensors.tensors import TensorRef

_SCALES = ("_scale_inv", "_scale", "_scales", ".absmax", ".SCB")
"""Suffixes that follow a tensor's name in the name of its scale."""
_PACKED = ("qweight", "weight_packed")
"""Last components of packed weights' names; the module's other tensors belong to them, except the bias."""
_PACKED_ENDINGS = ("_blocks", "_packed")


def quantized_tensors(tensors: Mapping[str, TensorRef]) -> Mapping[str, str]:
    """The quantized tensors among `tensors` and their scales, each with the reason."""
    reasons: dict[str, str] = {}
    packed: dict[str, str] = {}
    for name in tensors:
        for ending in _SCALES:
            scaled = name.removesuffix(ending)
            if scaled == name:
                continue
            if ending == ".SCB":
                scaled += ".weight"
            if scaled in tensors:
                reasons[scaled] = f"{name} is its scale"
                reasons[name] = f"it is the scale of {scaled}"
        module, _, last = name.rpartition(".")
        if last in _PACKED:
            packed[module] = name
        if last in _PACKED or name.endswith(_PACKED_ENDINGS):
            reasons[name] = "its name is that of packed values"
    for name in tensors:
        module, _, last = name.rpartition(".")
        if module in packed and last != "bias":
            reasons.setdefault(name, f"it belongs to {packed[module]}")
    return reasons
