"""Which tensors are quantized: their values mean nothing without others (scales, zero points) beside them."""

from __future__ import annotations

from collections.abc import Mapping

from ..io.tensors import TensorRef

_SCALES = ("_scale_inv", "_scale", ".scales", "_scales", ".absmax", ".quant_state.bitsandbytes__nf4")
_PACKED = (".qweight", ".qzeros", ".g_idx", ".weight_packed", "_blocks")


def quantized_tensors(tensors: Mapping[str, TensorRef]) -> Mapping[str, str]:
    """The quantized tensors among `tensors`, and their scales, each with the reason in words."""
    found: dict[str, str] = {}
    for name in tensors:
        for ending in _SCALES:
            if name.endswith(ending) and name[: -len(ending)] in tensors:
                found[name[: -len(ending)]] = f"{name} scales it"
                found[name] = f"it scales {name[: -len(ending)]}"
        if name.endswith(_PACKED):
            found[name] = "its name is that of packed values"
    return found
