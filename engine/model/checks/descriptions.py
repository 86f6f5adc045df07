"""Finds settings in a description of quantized weights that mergeloom does not know, so codes may mean other values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

_SETTINGS: dict[str, dict[str, frozenset[str]]] = {
    "fp8": {
        # float8_e4m3fnuz, for one, has the same bits and other values
        "fmt": frozenset(("e4m3", "e4m3fn", "float8_e4m3fn", "e5m2", "float8_e5m2")),
        "scale_fmt": frozenset(("float", "float32", "fp32", "ue8m0")),
        "expert_dtype": frozenset(("fp8", "fp4")),
    },
    "fbgemm_fp8": {},
    "mxfp4": {},
    "modelopt": {"quant_algo": frozenset(("fp8", "nvfp4", "w4a16_nvfp4", "mixed_precision"))},
    "compressed-tensors": {
        "format": frozenset(
            (
                *("dense", "int-quantized", "float-quantized", "naive-quantized", "pack-quantized", "mixed-precision"),
                *("mxfp4-pack-quantized", "mxfp8-quantized", "nvfp4-pack-quantized"),
            )
        )
    },
}
"""By ``quant_method``, the settings that decide how codes become values, and the values of them that are known."""
_SETTINGS["mxfp8"] = _SETTINGS["fp8"]
NOT_DECODED = frozenset(
    (
        *("aqlm", "auto-round", "awq", "bitnet", "bitsandbytes", "eetq", "exl2", "exl3", "fouroversix", "fp_quant"),
        *("gptq", "higgs", "hqq", "metal", "mlx", "quanto", "quark", "sinq", "spqr", "torchao", "vptq"),
    )
)
"""Values of ``quant_method`` of known formats that mergeloom does not decode."""


def unknown_setting(section: Mapping[str, Any]) -> str | None:
    """Return the first setting of a description whose value is unknown, as ``key value``; None if all are known.

    Args:
        section: ``quantization_config``; without ``quant_method``, only tensors show a format.
    """
    method = section.get("quant_method")
    if not method:
        return None
    known = _SETTINGS.get(str(method).lower())
    if known is None:
        return f"quant_method {method}"
    for key, values in known.items():
        for place, value in _values(section, key):
            if value is not None and str(value).lower() not in values:
                return f"{place} {value}"
    return None


def _values(section: Mapping[str, Any], key: str) -> Iterable[tuple[str, Any]]:
    """Yield a setting of a description and of its groups, each with the keys that lead to it."""
    yield key, section.get(key)
    groups = section.get("config_groups")
    for name, group in groups.items() if isinstance(groups, Mapping) else ():
        if isinstance(group, Mapping):
            yield f"config_groups.{name}.{key}", group.get(key)
